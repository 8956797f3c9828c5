"""Where a control request ends: the stream never falls out of step for clients that exist."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from tests.unit.wire.emulator_examples import ONE_BYTE_BODIES, REQUESTS
from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind
from vtpm.wire.emulator import (
    MAX_HASH_BYTES,
    Command,
    ControlDecoder,
    HashData,
    Malformed,
    Plain,
    Request,
    ResetEstablished,
    SetLocality,
    SetStateBlob,
    encode_request,
    error_reply,
)

PADDINGS = [b"", b"\0\0\0", b"\1\2\3", b"\xff\xff\xff", b"\0\0\5"]
STOP = b"\0\0\0\x0e"
ALL = [request for request, _ in REQUESTS.values()]


def _word(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _feed_pieces(decoder: ControlDecoder, *pieces: bytes) -> list[Request | Malformed]:
    return [item for piece in pieces for item in decoder.feed(piece)]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", REQUESTS)
def test_request_and_the_next_come_when_cut_at_every_two_bytes(name: str, padding: bytes) -> None:
    request, _ = REQUESTS[name]
    stream = encode_request(request, padding=padding) + STOP + encode_request(request, padding=padding)
    for first, second in itertools.combinations_with_replacement(range(len(stream) + 1), 2):
        found = _feed_pieces(ControlDecoder(), stream[:first], stream[first:second], stream[second:])
        assert found == [request, Plain(Command.STOP), request]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 4, 5, 1 << 20])
def test_all_requests_come_when_client_waits_for_no_reply(padding: bytes, piece_bytes: int) -> None:
    stream = b"".join(encode_request(request, padding=padding) for request in [*ALL, *reversed(ALL)])
    pieces = [stream[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]
    assert _feed_pieces(ControlDecoder(), *pieces) == [*ALL, *reversed(ALL)]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("command", ONE_BYTE_BODIES)
def test_request_comes_at_its_one_byte_when_padding_is_late(command: Command, padding: bytes) -> None:
    request = SetLocality(2) if command is Command.SET_LOCALITY else ResetEstablished(2)
    decoder = ControlDecoder()
    assert decoder.feed(_word(command) + b"\2") == [request]
    # The rest comes after the reply, byte by byte, and the client then sends its next request.
    decoder.replied()
    assert _feed_pieces(decoder, *(bytes((byte,)) for byte in padding)) == []
    assert decoder.feed(STOP) == [Plain(Command.STOP)]
    decoder.replied()
    assert decoder.feed(STOP) == [Plain(Command.STOP)]
    assert decoder.buffered_bytes == 0


@pytest.mark.parametrize("taken", range(4))
@pytest.mark.parametrize("command", ONE_BYTE_BODIES)
def test_successor_is_in_step_when_predecessor_took_some_padding(command: Command, taken: int) -> None:
    assert ControlDecoder(after=command).feed(b"\7\0\1"[taken:] + STOP) == [Plain(Command.STOP)]


def test_nothing_is_taken_for_padding_when_predecessors_command_has_none() -> None:
    (item,) = ControlDecoder(after=Command.STOP).feed(bytes(4) + STOP)
    assert isinstance(item, Malformed)
    assert item.command_code == 0


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("command", ONE_BYTE_BODIES)
def test_stream_stays_in_step_when_locality_does_not_exist(command: Command, padding: bytes) -> None:
    bad, good = ControlDecoder().feed(_word(command) + b"\5" + padding + STOP)
    assert isinstance(bad, Malformed)
    assert (bad.command, bad.result, bad.in_step) == (command, Rc12.TPM_BAD_LOCALITY, True)
    assert bad.reply == b"\0\0\0\x3d"
    assert good == Plain(Command.STOP)


@pytest.mark.parametrize("kind", [0, 4, 0xFFFFFFFF])
@pytest.mark.parametrize("command", [Command.GET_STATEBLOB, Command.SET_STATEBLOB])
def test_stream_stays_in_step_when_kind_of_state_does_not_exist(command: Command, kind: int) -> None:
    data = b"abc" if command is Command.SET_STATEBLOB else b""
    bad, good = ControlDecoder().feed(_word(command) + bytes(4) + _word(kind) + _word(len(data)) + data + STOP)
    assert isinstance(bad, Malformed)
    assert (bad.command, bad.result, bad.in_step) == (command, Rc12.TPM_BAD_PARAMETER, True)
    assert bad.reply == error_reply(command, Rc12.TPM_BAD_PARAMETER)
    assert good == Plain(Command.STOP)


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096, 1 << 20])
def test_data_is_dropped_as_it_comes_when_there_is_too_much(piece_bytes: int) -> None:
    stream = _word(Command.HASH_DATA) + _word(MAX_HASH_BYTES + 1) + bytes(MAX_HASH_BYTES + 1) + STOP
    decoder = ControlDecoder()
    found: list[Request | Malformed] = []
    for at in range(0, len(stream), piece_bytes):
        found += decoder.feed(stream[at : at + piece_bytes])
        assert decoder.buffered_bytes < 8
        assert found or at + piece_bytes < 8, "it is answered at its header"
    bad, good = found
    assert isinstance(bad, Malformed)
    assert (bad.command, bad.result, bad.in_step) == (Command.HASH_DATA, Rc12.TPM_SIZE, True)
    assert good == Plain(Command.STOP)


def test_state_is_refused_at_its_header_when_it_is_too_large() -> None:
    decoder = ControlDecoder()
    (bad,) = decoder.feed(_word(Command.SET_STATEBLOB) + bytes(4) + _word(1) + b"\xff" * 4)
    assert isinstance(bad, Malformed)
    assert (bad.command, bad.result, bad.in_step) == (Command.SET_STATEBLOB, Rc12.TPM_SIZE, True)
    tracemalloc.start()
    try:
        for _ in range(100):
            assert decoder.feed(bytes(1 << 20)) == []
        assert tracemalloc.get_traced_memory()[1] < 4 << 20, "what is refused is not kept"
    finally:
        tracemalloc.stop()
    assert decoder.buffered_bytes == 0


@pytest.mark.parametrize("size", [MAX_STATE_BYTES - 1, MAX_STATE_BYTES])
def test_state_comes_whole_when_header_and_data_are_separate_writes(size: int) -> None:
    request = SetStateBlob(0, StateKind.PERMANENT, b"\xa5" * size)
    encoded = encode_request(request)
    decoder = ControlDecoder()
    assert decoder.feed(encoded[:16]) == []
    assert decoder.feed(encoded[16:-1]) == []
    assert decoder.buffered_bytes == len(encoded) - 1 < MAX_STATE_BYTES + 16
    assert decoder.feed(encoded[-1:]) == [request]
    assert decoder.buffered_bytes == 0


def test_data_comes_whole_when_it_is_as_large_as_may_be() -> None:
    request = HashData(b"\x5a" * MAX_HASH_BYTES)
    assert ControlDecoder().feed(encode_request(request) + STOP) == [request, Plain(Command.STOP)]


@pytest.mark.parametrize("code", [0, 20, 0x100, 0x0E000000, 0xFFFFFFFF])
def test_stream_is_out_of_step_when_command_is_unknown(code: int) -> None:
    decoder = ControlDecoder()
    (bad,) = decoder.feed(_word(code) + STOP)
    assert isinstance(bad, Malformed)
    assert (bad.command_code, bad.command, bad.result, bad.in_step) == (code, None, Rc12.TPM_BAD_ORDINAL, False)
    assert bad.reply == b"\0\0\0\x0a"
    assert str(code) in bad.message
    assert decoder.feed(STOP * 1000) == []
    assert decoder.buffered_bytes == 0


def test_stream_begins_anew_when_unknown_command_was_answered() -> None:
    decoder = ControlDecoder()
    decoder.feed(_word(99) + b"body of it")
    decoder.replied()
    assert decoder.feed(STOP) == [Plain(Command.STOP)]


def test_nothing_comes_when_nothing_is_fed() -> None:
    assert ControlDecoder().feed(b"") == []


@pytest.mark.parametrize("name", REQUESTS)
def test_completes_tells_what_feeding_would_give_and_changes_nothing_when_cut_anywhere(name: str) -> None:
    request, _ = REQUESTS[name]
    stream = encode_request(request)
    for cut in range(len(stream)):
        decoder = ControlDecoder()
        assert decoder.feed(stream[:cut]) == []
        assert not decoder.completes(b"")
        assert decoder.completes(stream[cut:])
        assert decoder.buffered_bytes == cut
        assert decoder.feed(stream[cut:]) == [request]
    decoder = ControlDecoder()
    assert decoder.completes(_word(99))
    assert decoder.feed(stream) == [request]
