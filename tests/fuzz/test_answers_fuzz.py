"""Answers of peers: what is taken is messages in their one form, or an error that can be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.peers.answer_examples import ANSWER_EXAMPLES, LARGEST_MESSAGE
from vtpm.errors import ProtocolError, VtpmError
from vtpm.peers.answers import MAX_MESSAGE_BYTES, decode_answer, encode_error, encode_messages

_TEXTS = st.text(max_size=1200)


def _decoded(answer: bytes) -> None:
    """Decode what may be anything."""
    try:
        messages = decode_answer(answer)
    except VtpmError as error:
        assert error.message.isprintable()
        assert error.next_step.isprintable()
        return
    assert encode_messages(messages) == answer


@effort.codec
@given(spoiled(st.sampled_from(list(ANSWER_EXAMPLES.values()))))
def test_spoiled_answer_is_refused_or_is_another_valid_one(answer: bytes) -> None:
    _decoded(answer)


@effort.codec
@given(st.integers(0, 2), st.binary(max_size=200))
def test_noise_is_refused_or_is_an_answer(kind: int, noise: bytes) -> None:
    _decoded(bytes([kind]) + noise)


@effort.codec
@given(st.lists(st.binary(max_size=40), max_size=9))
def test_messages_come_back_or_are_refused_before_they_go(messages: list[bytes]) -> None:
    try:
        answer = encode_messages(messages)
    except ProtocolError:
        assert len(messages) > 8 or b"" in messages
        return
    assert decode_answer(answer) == messages


@effort.codec
@given(_TEXTS, _TEXTS)
def test_error_comes_back_whatever_it_says(message: str, next_step: str) -> None:
    with pytest.raises(VtpmError) as reported:
        decode_answer(encode_error(VtpmError(message, next_step=next_step)))
    assert type(reported.value) is VtpmError
    assert len(reported.value.message) == len(message) or len(message.encode(errors="replace")) > 2000


@effort.codec
@given(st.integers(-1, 2), st.integers(0, 2))
def test_large_messages_are_held_to_their_bounds(beyond: int, more: int) -> None:
    message = LARGEST_MESSAGE[: MAX_MESSAGE_BYTES + min(beyond, 0)] + bytes(max(beyond, 0))
    answer = b"\x00" + (len(message).to_bytes(4, "big") + message) * (1 + more)
    try:
        assert decode_answer(answer) == [message] * (1 + more)
    except ProtocolError:
        assert beyond > 0 or more
