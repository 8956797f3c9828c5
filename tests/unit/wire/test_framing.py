"""Frames are found again whatever came before them, and hold whatever bytes."""

from __future__ import annotations

import time

import pytest

from vtpm.errors import ProtocolError
from vtpm.wire.framing import END, BadFrame, Damage, Deframer, check_body, encode_frame

MAX = 64


def feed_all(data: bytes, max_body_bytes: int = MAX) -> list[bytes | BadFrame]:
    return Deframer(max_body_bytes).feed(data)


@pytest.mark.parametrize(
    "body", [b"", b"a", b"\xc0", b"\xdb", b"\xdb\xdc", b"\xc0\xdb\xdc\xdd" * 16, bytes(range(64)), b"\xc0" * MAX]
)
def test_body_comes_back_when_framed_and_cut_anywhere(body: bytes) -> None:
    frame = encode_frame(body)
    assert END not in frame[1:-1]
    assert len(frame) <= 2 * len(body) + 10
    for cut in range(len(frame) + 1):
        deframer = Deframer(MAX)
        assert deframer.feed(frame[:cut]) + deframer.feed(frame[cut:]) == [body]
        assert deframer.buffered_bytes == 0


def test_next_frame_is_whole_when_the_one_before_was_cut_anywhere() -> None:
    first, second = encode_frame(b"\xc0first\xdb"), encode_frame(b"second")
    for cut in range(len(first)):
        found = feed_all(first[:cut] + second)
        assert found[-1] == b"second"
        # Cut within END, nothing of it was lost or begun; a cut before the last END lost nothing either.
        assert found[:-1] in ([], [BadFrame(Damage.CRC)], [BadFrame(Damage.ESCAPE)], [BadFrame(Damage.TOO_SMALL)], [
            b"\xc0first\xdb"
        ])  # fmt: skip


def test_no_boundary_is_forged_when_a_body_holds_a_frame() -> None:
    inner = encode_frame(b"forged")
    frame = encode_frame(inner)
    for start in range(len(frame)):
        assert b"forged" not in Deframer(MAX).feed(frame[start:] + encode_frame(b"x"))


def test_damage_is_told_when_a_frame_is_bad() -> None:
    good = encode_frame(b"body")
    assert feed_all(END + b"abc" + END) == [BadFrame(Damage.TOO_SMALL)]
    assert feed_all(good[:-2] + bytes((good[-2] ^ 1,)) + END) == [BadFrame(Damage.CRC)]
    for escape in (b"\xdb", b"\xdba", b"\xdb\xdb\xdc"):
        assert feed_all(END + b"abcdef" + escape + END + good) == [BadFrame(Damage.ESCAPE), b"body"]


def test_oversize_is_skipped_once_when_a_frame_is_too_long() -> None:
    good = encode_frame(b"body")
    assert feed_all(encode_frame(b"a" * (MAX + 1)) + good) == [BadFrame(Damage.TOO_LARGE), b"body"]
    assert feed_all(encode_frame(b"a" * MAX)) == [b"a" * MAX]
    deframer = Deframer(MAX)
    for _ in range(1000):
        assert deframer.feed(b"x" * 50) == []
        assert deframer.buffered_bytes <= 2 * MAX + 8
    assert deframer.feed(END + good) == [BadFrame(Damage.TOO_LARGE), b"body"]


def test_nothing_is_found_when_there_are_only_ends() -> None:
    assert feed_all(END * 1000) == []


def test_time_is_linear_when_bytes_come_one_by_one_or_escaped() -> None:
    def seconds(size: int) -> float:
        stream = encode_frame(b"\xdb" * size)
        deframer = Deframer(size)
        start = time.process_time()
        found = [body for at in range(len(stream)) for body in deframer.feed(stream[at : at + 1])]
        assert found == [b"\xdb" * size]
        return time.process_time() - start

    seconds(1000)
    # Four times the bytes; quadratic work would take sixteen times as long.
    assert seconds(80_000) < 10 * max(seconds(20_000), 0.005)


def test_body_is_refused_when_too_large_to_send() -> None:
    assert check_body(b"abc", 3) == b"abc"
    with pytest.raises(ProtocolError, match="4 bytes is too large"):
        check_body(b"abcd", 3)
