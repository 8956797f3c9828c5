"""Whatever comes over a framed link, whole frames are found, in order, and nothing else is."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fuzz import effort
from tests.fuzz.mutations import cuts, spoiled
from tests.unit.wire.link_examples import payload
from vtpm.wire.framing import END, BadFrame, Deframer, encode_frame

MAX = 400
HELD = 2 * MAX + 8


@effort.codec
@given(st.lists(st.binary(max_size=MAX), max_size=6), st.data())
def test_bodies_come_back_when_the_stream_is_cut_anywhere(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(body) for body in bodies)
    deframer = Deframer(MAX)
    assert [body for piece in data.draw(cuts(stream)) for body in deframer.feed(piece)] == bodies


@effort.codec
@given(spoiled(payload.map(encode_frame)), st.data())
def test_next_body_comes_when_the_one_before_is_spoiled(spoilt: bytes, data: st.DataObject) -> None:
    deframer = Deframer(MAX)
    stream = spoilt + encode_frame(b"next")
    found = []
    for piece in data.draw(cuts(stream)):
        found += deframer.feed(piece)
        assert deframer.buffered_bytes <= HELD
    assert found[-1] == b"next"
    assert found == Deframer(MAX).feed(stream)


class Stream(RuleBasedStateMachine):
    """Writers come and die in mid-frame on one stream, and one reader reads on."""

    def __init__(self) -> None:
        super().__init__()
        self.deframer = Deframer(MAX)
        self.sent: list[bytes] = []
        self.found: list[bytes | BadFrame] = []

    def write(self, data: bytes) -> None:
        self.found += self.deframer.feed(data)

    @rule(body=st.one_of(payload, st.binary(max_size=MAX)))
    def whole_frame(self, body: bytes) -> None:
        self.sent.append(body)
        self.write(encode_frame(body))

    @rule(body=payload, data=st.data())
    def frame_in_pieces(self, body: bytes, data: st.DataObject) -> None:
        self.sent.append(body)
        for piece in data.draw(cuts(encode_frame(body))):
            self.write(piece)

    @rule(body=payload, share=st.floats(0, 1))
    def writer_dies(self, body: bytes, share: float) -> None:
        # So much is missing that noise after it does not make it whole by chance.
        frame = encode_frame(body)
        self.write(frame[: int(share * max(0, len(frame) - 10))])

    @rule(data=st.binary(max_size=60).map(lambda noise: noise.replace(END, b"")))
    def noise(self, data: bytes) -> None:
        self.write(data)

    @rule(size=st.integers(MAX + 1, 4 * MAX))
    def oversized_frame(self, size: int) -> None:
        self.write(encode_frame(END * size))

    @rule(count=st.integers(1, 5))
    def ends(self, count: int) -> None:
        self.write(END * count)

    @invariant()
    def finds_exactly_what_was_sent(self) -> None:
        assert [body for body in self.found if isinstance(body, bytes)] == self.sent

    @invariant()
    def holds_little(self) -> None:
        assert self.deframer.buffered_bytes <= HELD


TestStream = Stream.TestCase
TestStream.settings = effort.machine


def test_memory_stays_bounded_when_no_frame_ever_ends() -> None:
    deframer = Deframer(64 * 1024)
    tracemalloc.start()
    for _ in range(200_000):
        deframer.feed(b"\xdb\xdc")
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # bytearray asks for an eighth more than it holds, and copies once when it grows.
    assert held_bytes < 200 * 1024
    assert peak_bytes < 400 * 1024
