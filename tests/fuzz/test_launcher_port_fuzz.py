"""The launcher's port takes messages and only messages, from the side that may send them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import cuts, spoiled
from tests.unit.wire.launcher_port_examples import messages
from vtpm.errors import ProtocolError
from vtpm.wire.framing import BadFrame, Deframer, encode_frame
from vtpm.wire.launcher_port import MAX_BODY_BYTES, PORT_VERSION, Direction, decode_message, encode_message

_cases = st.one_of(*(st.tuples(st.just(direction), found) for direction, found in messages.items()))


@effort.codec
@given(_cases)
def test_message_comes_back_when_decoded(case: tuple[Direction, Any]) -> None:
    direction, message = case
    body = encode_message(message, direction)
    assert len(body) <= MAX_BODY_BYTES
    assert decode_message(body, direction) == message


@effort.codec
@given(spoiled(_cases.map(lambda case: encode_message(case[1], case[0]))), st.sampled_from(Direction))
def test_spoiled_message_is_refused_or_is_another_valid_one(body: bytes, direction: Direction) -> None:
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    # What is taken has one form only, so nothing hides in it.
    assert encode_message(message, direction) == body


@effort.codec
@given(st.binary(max_size=200), st.sampled_from(Direction))
def test_noise_is_refused_or_is_a_message(noise: bytes, direction: Direction) -> None:
    body = bytes((PORT_VERSION,)) + noise
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    assert encode_message(message, direction) == body


@effort.codec
@given(st.data(), st.sampled_from(Direction))
def test_messages_are_found_again_when_a_writer_died_in_the_middle_of_one(
    data: st.DataObject, direction: Direction
) -> None:
    before, after = (data.draw(st.lists(messages[direction], max_size=3)) for _ in range(2))
    half = encode_frame(encode_message(data.draw(messages[direction]), direction))
    half = half[: data.draw(st.integers(0, len(half) - 2))]
    frames = [encode_frame(encode_message(message, direction)) for message in (*before, *after)]
    stream = b"".join(frames[: len(before)]) + half + b"".join(frames[len(before) :])
    deframer, got = Deframer(MAX_BODY_BYTES), []
    for piece in data.draw(cuts(stream)):
        got += deframer.feed(piece)
    bodies = [body for body in got if not isinstance(body, BadFrame)]
    assert [decode_message(body, direction) for body in bodies] == [*before, *after]
