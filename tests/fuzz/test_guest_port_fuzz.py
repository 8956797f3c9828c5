"""The guest port takes messages and only messages, from the side that may send them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import cuts, spoiled
from tests.unit.wire.port_examples import requests, to_relay, to_vm, tpm_command, tpm_response
from vtpm.errors import ProtocolError
from vtpm.wire.emulator import Command, Plain, encode_request
from vtpm.wire.framing import BadFrame, Deframer, encode_frame
from vtpm.wire.guest_port import (
    HEADER,
    MAX_BODY_BYTES,
    MAX_PIECE_BYTES,
    PORT_VERSION,
    Direction,
    Reply,
    ReplyPart,
    decode_message,
    encode_message,
    reply_messages,
)

BOTH = st.one_of(st.tuples(st.just(Direction.TO_VM), to_vm), st.tuples(st.just(Direction.TO_RELAY), to_relay))


@effort.codec
@given(BOTH)
def test_message_comes_back_when_decoded(case: tuple[Direction, Any]) -> None:
    direction, message = case
    body = encode_message(message)
    assert len(body) <= MAX_BODY_BYTES
    assert decode_message(body, direction) == message


@effort.codec
@given(spoiled(BOTH.map(lambda case: encode_message(case[1]))), st.sampled_from(Direction))
def test_spoiled_message_is_refused_or_is_another_valid_one(body: bytes, direction: Direction) -> None:
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    # What is taken has one form only, so nothing hides in it.
    assert encode_message(message) == body


@effort.codec
@given(st.binary(max_size=200), st.sampled_from(Direction))
def test_noise_is_refused_or_is_a_message(noise: bytes, direction: Direction) -> None:
    body = b"\1" + noise
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    assert encode_message(message) == body


_request = st.one_of(requests, st.just(Plain(Command.SET_DATAFD))).map(encode_request)
_requests = st.lists(st.one_of(_request, spoiled(_request)), max_size=2).map(b"".join)
_command = st.sampled_from([tpm_command(b"x"), tpm_response(b"x" * 9)])
_whole_or_not = st.one_of(_command, spoiled(_command))
_with_fields = st.one_of(
    _requests.map(lambda fields: (Direction.TO_VM, 0x04, fields)),
    _whole_or_not.map(lambda fields: (Direction.TO_VM, 0x06, b"\xff" + fields)),
    _whole_or_not.map(lambda fields: (Direction.TO_RELAY, 0x83, fields)),
)


@effort.codec
@given(_with_fields)
def test_requests_and_answers_are_refused_or_are_whole(case: tuple[Direction, int, bytes]) -> None:
    direction, code, fields = case
    body = HEADER.pack(PORT_VERSION, code, 0, 1) + fields
    try:
        message = decode_message(body, direction)
    except ProtocolError:
        return
    assert encode_message(message) == body


@effort.codec
@given(st.data(), st.lists(to_relay, max_size=4), to_relay, st.lists(to_relay, min_size=1, max_size=4))
def test_messages_are_found_again_when_a_writer_died_in_the_middle_of_one(
    data: st.DataObject, before: list[Any], cut: Any, after: list[Any]
) -> None:
    frames = [encode_frame(encode_message(message)) for message in (*before, *after)]
    half = encode_frame(encode_message(cut))
    half = half[: data.draw(st.integers(0, len(half) - 2))]
    stream = b"".join(frames[: len(before)]) + half + b"".join(frames[len(before) :])
    deframer, got = Deframer(MAX_BODY_BYTES), []
    for piece in data.draw(cuts(stream)):
        got += deframer.feed(piece)
    bodies = [body for body in got if not isinstance(body, BadFrame)]
    assert [decode_message(body, Direction.TO_RELAY) for body in bodies] == [*before, *after]


@effort.codec
@given(st.integers(4, 3 * MAX_PIECE_BYTES))
def test_long_reply_comes_back_when_its_messages_are_put_together(size: int) -> None:
    reply = b"\xc0" * size
    messages = [decode_message(encode_message(one), Direction.TO_RELAY) for one in reply_messages(1, reply)]
    assert all(isinstance(one, ReplyPart) for one in messages[:-1])
    assert isinstance(messages[-1], Reply)
    assert b"".join(one.data for one in messages if isinstance(one, ReplyPart | Reply)) == reply
