"""The data channel's framing: whole commands, both forms, and nothing after what cannot be true."""

from __future__ import annotations

import struct

import pytest

from vtpm.wire.tpm_stream import BadCommand, BadReason, CommandFramer, TpmCommand, frame_response

MAX = 4096
PREFIX = b"\0\0\0\x08"


def command(size: int, tag: int = 0x8001) -> bytes:
    return struct.pack(">HII", tag, size, 0x17B).ljust(size, b"\xee")


def prefixed(inner: bytes, locality: int = 0) -> bytes:
    return PREFIX + struct.pack(">BI", locality, len(inner)) + inner


def plain(data: bytes) -> TpmCommand:
    return TpmCommand(data, None, False)


def feed_in_pieces(
    stream: bytes, piece_bytes: int, framer: CommandFramer | None = None
) -> list[TpmCommand | BadCommand]:
    framer = framer or CommandFramer(MAX)
    found = []
    for at in range(0, len(stream), piece_bytes):
        found += framer.feed(stream[at : at + piece_bytes])
        assert framer.buffered_bytes < MAX + 9
    return found


BAD_STREAMS = {
    # name: (stream up to the byte that shows it, reason, prefixed)
    "too large": (b"\x80\x01\0\0\x10\x01", BadReason.TOO_LARGE, False),
    "far too large": (b"\x80\x01\xff\xff\xff\xff", BadReason.TOO_LARGE, False),
    "too small": (b"\x80\x01\0\0\0\x09", BadReason.TOO_SMALL, False),
    "empty": (b"\x80\x01\0\0\0\0", BadReason.TOO_SMALL, False),
    "another command of the simulator": (b"\0\0\0\x14\0\0", BadReason.TOO_LARGE, False),
    "zeros": (bytes(6), BadReason.TOO_SMALL, False),
    "locality 5": (PREFIX + b"\5", BadReason.LOCALITY, True),
    "locality 255": (PREFIX + b"\xff", BadReason.LOCALITY, True),
    "prefix too large": (PREFIX + b"\0\0\0\x10\x01", BadReason.TOO_LARGE, True),
    "prefix too small": (PREFIX + b"\4\0\0\0\x09", BadReason.TOO_SMALL, True),
    "prefix is larger": (PREFIX + b"\0\0\0\0\x0d" + command(12)[:6], BadReason.MISMATCH, True),
    "prefix is smaller": (PREFIX + b"\0\0\0\0\x0b" + command(12)[:6], BadReason.MISMATCH, True),
}


@pytest.mark.parametrize("size", [10, 11, 12, MAX - 1, MAX])
@pytest.mark.parametrize("tag", [0x8001, 0x8002, 0x00C1, 0x0000, 0xFFFF])
def test_plain_command_comes_whole_when_fed_at_once_and_byte_by_byte(size: int, tag: int) -> None:
    data = command(size, tag)
    assert CommandFramer(MAX).feed(data) == [plain(data)]
    assert feed_in_pieces(data, 1) == [plain(data)]


def test_piece_belongs_to_its_command_when_it_looks_like_a_whole_one() -> None:
    data = command(10) + command(12)
    outer = struct.pack(">HII", 0x8001, 10 + len(data), 0x17B) + data
    framer = CommandFramer(MAX)
    assert framer.feed(outer[:10]) == []
    assert framer.feed(outer[10:20]) == []
    assert framer.feed(outer[20:]) == [plain(outer)]


def test_plain_command_is_not_copied_when_it_comes_alone() -> None:
    data = command(200)
    (found,) = CommandFramer(MAX).feed(data)
    assert isinstance(found, TpmCommand)
    assert found.data is data


@pytest.mark.parametrize("size", [10, 20, MAX])
@pytest.mark.parametrize("locality", range(5))
def test_prefixed_command_comes_with_its_locality_when_fed_at_once_and_byte_by_byte(size: int, locality: int) -> None:
    data = command(size)
    for piece_bytes in (1, 1 << 20):
        assert feed_in_pieces(prefixed(data, locality), piece_bytes) == [TpmCommand(data, locality, True)]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 9, 10, 4096, 1 << 20])
def test_forms_may_be_mixed_when_many_commands_come(piece_bytes: int) -> None:
    stream = (
        command(12) + prefixed(command(20), 3) + command(MAX) + prefixed(command(MAX)) + command(10, 0) + command(10)
    )
    assert feed_in_pieces(stream, piece_bytes) == [
        plain(command(12)),
        TpmCommand(command(20), 3, True),
        plain(command(MAX)),
        TpmCommand(command(MAX), 0, True),
        plain(command(10, 0)),
        plain(command(10)),
    ]


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_stream_ends_at_the_byte_that_shows_it_when_header_cannot_be_true(name: str) -> None:
    stream, reason, is_prefixed = BAD_STREAMS[name]
    framer = CommandFramer(MAX)
    assert feed_in_pieces(stream[:-1], 1, framer) == []
    (bad,) = framer.feed(stream[-1:])
    assert isinstance(bad, BadCommand)
    assert (bad.reason, bad.prefixed) == (reason, is_prefixed)
    assert framer.buffered_bytes == 0
    assert framer.feed(command(12)) == [], "nothing comes after it"
    assert framer.feed(b"") == []


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_commands_before_are_kept_and_after_dropped_when_one_is_bad(name: str) -> None:
    stream, _, _ = BAD_STREAMS[name]
    good, bad = CommandFramer(MAX).feed(command(12) + stream + command(12))
    assert good == plain(command(12))
    assert isinstance(bad, BadCommand)


@pytest.mark.parametrize("bound", [9, 0, -1, 0x80000])
def test_bound_is_refused_when_forms_could_not_be_told_apart(bound: int) -> None:
    with pytest.raises(ValueError, match="max_command_bytes"):
        CommandFramer(bound)


def test_largest_bound_still_tells_the_forms_apart_when_used() -> None:
    framer = CommandFramer(0x7FFFF)
    assert framer.feed(command(0x7FFFF)) == [plain(command(0x7FFFF))]
    assert framer.feed(prefixed(command(10))) == [TpmCommand(command(10), 0, True)]


def test_nothing_comes_when_nothing_is_fed() -> None:
    assert CommandFramer(MAX).feed(b"") == []


def test_data_stays_out_of_repr_when_command_is_printed() -> None:
    assert "secret" not in repr(plain(command(10) + b"secret"))


def test_response_is_sent_as_it_is_when_plain() -> None:
    assert frame_response(command(10), prefixed=False) == command(10)


def test_response_is_framed_when_prefixed() -> None:
    assert frame_response(command(10), prefixed=True) == b"\0\0\0\x0a" + command(10) + bytes(4)
