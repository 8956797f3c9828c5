"""The control channel's decoder stays in step with every client, and nothing makes it fail or swell."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fuzz import effort
from tests.fuzz.mutations import cuts, spoiled
from vtpm.errors import ProtocolError
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind
from vtpm.wire.emulator import (
    LAYOUTS,
    MAX_HASH_BYTES,
    Command,
    ControlDecoder,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Malformed,
    Plain,
    Reply,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    command_of,
    decode_reply,
    encode_reply,
    encode_request,
    is_whole_reply,
)

_u32 = st.integers(0, 2**32 - 1)
_kind = st.sampled_from(StateKind)
_locality = st.integers(0, 4)
# Data that looks like requests.
_data = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from([b"\0\0\0", b"\x0e", b"\x05"])).map(b"".join))
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(SetLocality, _locality),
    st.builds(ResetEstablished, _locality),
    st.builds(Plain, st.sampled_from([command for command in Command if not LAYOUTS[command].request.size])),
    st.builds(Init, _u32),
    st.builds(HashData, _data),
    st.builds(GetStateBlob, _u32, _kind, _u32),
    st.builds(SetStateBlob, _u32, _kind, _data),
    st.builds(SetBufferSize, _u32),
    st.builds(GetInfo, st.integers(0, 2**64 - 1), _u32),
    st.builds(LockStorage, _u32),
)
paddings = st.one_of(st.just(b""), st.just(bytes(3)), st.binary(min_size=3, max_size=3))


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    command = draw(st.sampled_from(Command))
    layout = LAYOUTS[command]
    if draw(st.booleans()):
        return Reply(command, draw(st.integers(1, 2**32 - 1)))
    most = 1 if command is Command.GET_TPMESTABLISHED else 2**32 - 1
    fields = {name: draw(st.integers(0, most)) for name in layout.reply_fields}
    data = draw(st.binary(max_size=200)) if layout.max_reply_data else b""
    if layout.max_reply_data:
        fields["total"] = max(fields["total"], len(data))
    return Reply(command, 0, fields, data)


@effort.codec
@given(st.lists(st.tuples(requests, paddings), max_size=8), st.data())
def test_requests_come_back_when_cut_anywhere(sent: list[tuple[Request, bytes]], data: st.DataObject) -> None:
    stream = b"".join(encode_request(request, padding=padding) for request, padding in sent)
    decoder = ControlDecoder()
    found = [one for piece in data.draw(cuts(stream)) for one in decoder.feed(piece)]
    assert found == [request for request, _ in sent]
    # No more is left than padding that might have been the next request.
    assert decoder.buffered_bytes <= 3


@effort.codec
@given(requests, st.binary(max_size=3))
def test_command_is_told_from_its_head_when_padding_stands_before(request: Request, padding: bytes) -> None:
    assert command_of((padding + encode_request(request))[:64]) is request.command


@effort.codec
@given(
    spoiled(st.lists(requests, min_size=1, max_size=4).map(lambda some: b"".join(map(encode_request, some)))), st.data()
)
def test_decoder_finds_the_same_when_a_spoiled_stream_is_cut(stream: bytes, data: st.DataObject) -> None:
    whole, pieces = ControlDecoder(), ControlDecoder()
    assert [one for piece in data.draw(cuts(stream)) for one in pieces.feed(piece)] == whole.feed(stream)
    assert pieces.buffered_bytes == whole.buffered_bytes < MAX_STATE_BYTES + 16


@effort.codec
@given(replies())
def test_reply_comes_back_when_decoded(reply: Reply) -> None:
    data = encode_reply(reply.command, reply.result, data=reply.data, **reply.fields)
    assert decode_reply(reply.command, data) == reply
    assert is_whole_reply(reply.command, data)
    # Four bytes of a failure may be all of it.
    assert not any(is_whole_reply(reply.command, data[:n]) for n in range(len(data)) if n != 4 or not reply.result)


@effort.codec
@given(
    st.sampled_from(Command),
    spoiled(replies().map(lambda one: encode_reply(one.command, one.result, data=one.data, **one.fields))),
)
def test_spoiled_reply_is_refused_or_is_within_its_bounds(command: Command, data: bytes) -> None:
    try:
        reply = decode_reply(command, data)
    except ProtocolError:
        return
    assert len(reply.data) <= reply.fields.get("total", 0)
    assert set(reply.fields) == (set() if reply.result else set(LAYOUTS[command].reply_fields))


class Clients(RuleBasedStateMachine):
    """Clients of every kind on one connection: what each sends is found, whatever the others sent before."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = ControlDecoder()

    def send(self, stream: bytes, data: st.DataObject) -> list[Request | Malformed]:
        return [one for piece in data.draw(cuts(stream)) for one in self.decoder.feed(piece)]

    @rule(request=requests, padding=paddings, data=st.data())
    def request(self, request: Request, padding: bytes, data: st.DataObject) -> None:
        assert self.send(encode_request(request, padding=padding), data) == [request]
        self.decoder.replied()

    @rule(locality=st.integers(5, 255), padding=paddings, command=st.sampled_from([5, 11]), data=st.data())
    def bad_locality(self, locality: int, padding: bytes, command: int, data: st.DataObject) -> None:
        (bad,) = self.send(command.to_bytes(4, "big") + bytes((locality,)) + padding, data)
        assert isinstance(bad, Malformed)
        assert bad.in_step
        self.decoder.replied()

    @rule(more=st.integers(1, 5000), data=st.data())
    def oversized(self, more: int, data: st.DataObject) -> None:
        length = MAX_HASH_BYTES + more
        (bad,) = self.send(b"\0\0\0\7" + length.to_bytes(4, "big") + b"\0\0\0\x0e".ljust(length, b"\0"), data)
        assert isinstance(bad, Malformed)
        assert bad.in_step
        self.decoder.replied()

    @rule(number=st.integers(20, 255), rest=st.binary(max_size=40), data=st.data())
    def unknown(self, number: int, rest: bytes, data: st.DataObject) -> None:
        (bad,) = self.send(number.to_bytes(4, "big") + rest, data)
        assert isinstance(bad, Malformed)
        assert not bad.in_step
        self.decoder.replied()

    @invariant()
    def holds_nothing_between_turns(self) -> None:
        assert self.decoder.buffered_bytes <= 3


TestClients = Clients.TestCase
TestClients.settings = effort.machine


def test_time_is_linear_when_a_blob_comes_in_small_pieces() -> None:
    def seconds(size: int) -> float:
        stream = encode_request(SetStateBlob(0, StateKind.PERMANENT, bytes(size)))
        decoder = ControlDecoder()
        start = time.process_time()
        found = [one for at in range(0, len(stream), 8) for one in decoder.feed(stream[at : at + 8])]
        assert len(found) == 1
        return time.process_time() - start

    seconds(1000)
    # Eight times the bytes; quadratic work would take 64 times as long.
    assert seconds(800_000) < 24 * max(seconds(100_000), 0.005)
