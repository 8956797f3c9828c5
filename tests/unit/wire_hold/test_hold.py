"""The hold's codec accepts exactly its own messages."""

from __future__ import annotations

import itertools

import pytest

from vtpm.errors import ProtocolError
from vtpm.wire.hold import HoldMessage, HoldType, ParkedKind, decode_hold, encode_hold

VALID = [HoldMessage(t, k) for t in HoldType for k in ParkedKind]


@pytest.mark.parametrize("message", VALID)
def test_round_trip_when_valid(message: HoldMessage) -> None:
    descriptors = 1 if message.type is HoldType.PARK else 0
    assert decode_hold(encode_hold(message), descriptors) == message
    with pytest.raises(ProtocolError, match="descriptors"):
        decode_hold(encode_hold(message), descriptors + 1)


def test_everything_else_is_refused_when_any_byte_differs() -> None:
    valid = {encode_hold(message) for message in VALID}
    accepted = set()
    for packet in itertools.product(range(4), range(6), range(4), range(2)):
        for descriptors in (0, 1):
            try:
                decode_hold(bytes(packet), descriptors)
            except ProtocolError:
                continue
            accepted.add(bytes(packet))
    assert accepted == valid
    for length in (0, 1, 3, 5, 4096):
        with pytest.raises(ProtocolError):
            decode_hold(bytes([1]) * length, 0)
