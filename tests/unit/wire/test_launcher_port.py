"""The codec of the launcher's port takes exactly its own messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.unit.wire.launcher_port_examples import EXAMPLES, SESSION
from vtpm.errors import ProtocolError
from vtpm.wire import launcher_port as lp
from vtpm.wire.launcher_port import Direction, decode_message, encode_message
from vtpm.wire.packet_stream import MAX_FDS
from vtpm.wire.service import MAX_PACKET_BYTES

CASES = [(direction, message) for direction, found in EXAMPLES.items() for message in found.values()]
FRAMED = (lp.Packet, lp.Data)
"""Classes whose data goes on to the end."""


@pytest.mark.parametrize(("direction", "message"), CASES)
class TestEveryMessage:
    def test_comes_back_when_decoded(self, direction: Direction, message: Any) -> None:
        body = encode_message(message, direction)
        assert len(body) <= lp.MAX_BODY_BYTES
        assert decode_message(body, direction) == message

    def test_is_refused_when_it_comes_from_the_side_that_does_not_send_it(
        self, direction: Direction, message: Any
    ) -> None:
        (other,) = set(Direction) - {direction}
        body = encode_message(message, direction)
        if isinstance(message, lp.Hello | lp.Ready | lp.Ended):
            with pytest.raises(ProtocolError, match="unknown from"):
                decode_message(body, other)
        else:
            assert decode_message(body, other) == message

    def test_is_refused_when_the_header_differs(self, direction: Direction, message: Any) -> None:
        body = encode_message(message, direction)
        for at, value, why in ((0, 2, "version 2"), (1, 0x7F, "0x7f"), (2, 1, "reserved"), (3, 1, "reserved")):
            bad = bytearray(body)
            bad[at] = value
            with pytest.raises(ProtocolError, match=why):
                decode_message(bytes(bad), direction)
        with pytest.raises(ProtocolError, match="a link where it must not"):
            decode_message(body[:4] + (bytes(4) if hasattr(message, "link") else b"\0\0\0\1") + body[8:], direction)

    def test_is_refused_when_cut_off_or_longer(self, direction: Direction, message: Any) -> None:
        body = encode_message(message, direction)
        least = len(body) - len(message.data) + 1 if isinstance(message, FRAMED) else len(body)
        for length in range(least):
            with pytest.raises(ProtocolError):
                decode_message(body[:length], direction)
        if not isinstance(message, FRAMED):
            with pytest.raises(ProtocolError, match="bytes too many"):
                decode_message(body + b"\0", direction)

    def test_no_state_shows_when_printed(self, direction: Direction, message: Any) -> None:
        if isinstance(message, FRAMED):
            assert repr(message.data) not in repr(message)


@pytest.mark.parametrize(
    "message",
    [
        lp.Hello(SESSION[:-1]),
        lp.Packet(0, 0, b""),
        lp.Packet(0, 0, bytes(MAX_PACKET_BYTES + 1)),
        lp.Packet(1, MAX_FDS + 1, b"{}"),
        lp.Data(1, b""),
        lp.Data(1, bytes(lp.CHUNK_BYTES + 1)),
        lp.Data(0, b"x"),
        lp.Taken(1, 0),
        lp.Taken(1, lp.WINDOW_BYTES + 1),
        lp.Close(lp.MAX_LINK + 1),
    ],
)
def test_message_is_not_sent_when_a_field_is_out_of_its_bounds(message: Any) -> None:
    with pytest.raises(ProtocolError):
        encode_message(message, Direction.TO_LAUNCHER)


def test_largest_packet_fits_when_it_brings_links() -> None:
    packet = lp.Packet(1, MAX_FDS, bytes(MAX_PACKET_BYTES))
    body = encode_message(packet, Direction.TO_MANAGER)
    assert len(body) == lp.MAX_BODY_BYTES
    assert decode_message(body, Direction.TO_MANAGER) == packet
    with pytest.raises(ProtocolError, match="bytes"):
        decode_message(body + b"\0", Direction.TO_MANAGER)


def test_all_classes_have_an_example_when_counted() -> None:
    examples = {type(message) for _, message in CASES}
    assert examples == set(lp.Message.__args__)
    assert all(dataclasses.is_dataclass(cls) for cls in examples)
