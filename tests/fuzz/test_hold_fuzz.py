"""The hold takes its own eight messages and nothing else, with the right number of descriptors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from vtpm.errors import ProtocolError
from vtpm.wire.hold import HoldMessage, HoldType, ParkedKind, decode_hold, encode_hold

messages = st.builds(HoldMessage, st.sampled_from(HoldType), st.sampled_from(ParkedKind))
# Near the valid ones, since four random bytes never are one.
_byte = st.one_of(st.integers(0, 3), st.integers(0, 255))
_end = st.sampled_from([b"\0", b"\1", b""])
near = st.builds(lambda kind, parked, end: bytes((1, kind, parked)) + end, _byte, _byte, _end)


@effort.codec
@given(messages)
def test_message_comes_back_when_decoded(message: HoldMessage) -> None:
    assert decode_hold(encode_hold(message), 1 if message.type is HoldType.PARK else 0) == message


@effort.codec
@given(st.one_of(near, st.binary(max_size=64), spoiled(messages.map(encode_hold))), st.integers(0, 4))
def test_packet_is_refused_or_is_a_message_with_its_descriptors(packet: bytes, descriptors: int) -> None:
    try:
        message = decode_hold(packet, descriptors)
    except ProtocolError:
        return
    assert encode_hold(message) == packet
    assert descriptors == (message.type is HoldType.PARK)
