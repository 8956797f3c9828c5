"""The data channel's framer finds commands whatever the cuts, and nothing after what cannot be one."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import cuts, spoiled
from vtpm.wire.tpm_stream import BadCommand, CommandFramer, TpmCommand, frame_response

MAX = 4096
# Bodies that look like heads.
_body = st.one_of(
    st.binary(max_size=300), st.lists(st.sampled_from([b"\0\0\0\x08", b"\x80\1\0\0\0\x0a", b"\0"])).map(b"".join)
)
_tags = st.sampled_from([0x8001, 0x8002, 0x00C1, 0x0000, 0x0008, 0xFFFF])


@st.composite
def commands(draw: st.DrawFn) -> TpmCommand:
    body = draw(_body)
    data = struct.pack(">HII", draw(_tags), 10 + len(body), draw(st.integers(0, 2**32 - 1))) + body
    locality = draw(st.one_of(st.none(), st.integers(0, 4)))
    return TpmCommand(data, locality, locality is not None)


def wire(command: TpmCommand) -> bytes:
    head = b"" if command.locality is None else struct.pack(">IBI", 8, command.locality, len(command.data))
    return head + command.data


streams = st.lists(commands(), max_size=6)
# Prefix and command that give different sizes, or a locality or size out of bounds.
_sizes = st.integers(0, 30) | st.sampled_from([MAX, MAX + 1, 2**32 - 1])
contradictions = st.builds(
    lambda locality, size, inner: struct.pack(">IBIHI", 8, locality, size, 0x8001, inner) + bytes(20),
    *(st.integers(0, 6), _sizes, _sizes),
)


@effort.codec
@given(contradictions)
def test_stream_ends_when_prefix_and_command_contradict_each_other(stream: bytes) -> None:
    found = CommandFramer(MAX).feed(stream)
    _, locality, size, _, inner = struct.unpack_from(">IBIHI", stream)
    if locality <= 4 and size == inner and 10 <= size <= MAX:
        assert all(isinstance(one, TpmCommand) and len(one.data) == size for one in found[:1])
    else:
        assert isinstance(found[0], BadCommand)
        assert found[0].prefixed
        assert len(found) == 1


@effort.codec
@given(streams, st.data())
def test_commands_come_back_when_cut_anywhere(sent: list[TpmCommand], data: st.DataObject) -> None:
    framer = CommandFramer(MAX)
    found = []
    for piece in data.draw(cuts(b"".join(map(wire, sent)))):
        found += framer.feed(piece)
        assert framer.buffered_bytes <= MAX + 9
    assert found == sent
    assert framer.buffered_bytes == 0


@effort.codec
@given(spoiled(streams.map(lambda sent: b"".join(map(wire, sent)))), st.data())
def test_framer_finds_the_same_when_a_spoiled_stream_is_cut(stream: bytes, data: st.DataObject) -> None:
    framer = CommandFramer(MAX)
    found = [one for piece in data.draw(cuts(stream)) for one in framer.feed(piece)]
    assert found == CommandFramer(MAX).feed(stream)
    # What is found, and what is kept of a command not yet whole, is the stream itself.
    whole = [one for one in found if isinstance(one, TpmCommand)]
    assert stream.startswith(b"".join(map(wire, whole)))
    if len(whole) == len(found):
        assert framer.buffered_bytes == len(stream) - sum(len(wire(one)) for one in whole)
    else:
        assert isinstance(found[-1], BadCommand)
        assert len(found) == len(whole) + 1
        assert (
            framer.feed(wire(TpmCommand(bytes.fromhex("80010000000a00000181"), 0, True))),
            framer.buffered_bytes,
        ) == (
            [],
            0,
        )


@effort.codec
@given(st.binary(min_size=10, max_size=200))
def test_response_is_framed_so_that_it_can_be_read_back(response: bytes) -> None:
    framed = frame_response(response, prefixed=True)
    (size,) = struct.unpack_from(">I", framed)
    assert framed[4 : 4 + size] == response
    assert framed[4 + size :] == bytes(4)
    assert frame_response(response, prefixed=False) == response
