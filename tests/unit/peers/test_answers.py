"""What a host answers to a peer's message, as bytes: every form that is one, and every way to be none."""

from __future__ import annotations

import pytest

from tests.unit.peers.answer_examples import ANSWER_EXAMPLES, LARGEST_MESSAGE
from vtpm.errors import ConflictError, ProtocolError, StoreError, VtpmError
from vtpm.peers.answers import MAX_ANSWER_BYTES, MAX_MESSAGES, decode_answer, encode_error, encode_messages


@pytest.mark.parametrize("messages", [[], [b"a"], [LARGEST_MESSAGE], [b"x"] * MAX_MESSAGES, [b"one", b"two"]], ids=len)
def test_messages_come_back_as_they_were(messages: list[bytes]) -> None:
    assert decode_answer(encode_messages(messages)) == messages


def test_bytes_are_as_documented_when_encoded() -> None:
    assert encode_messages([b"ab", b"c"]).hex() == "000000000261620000000163"
    assert encode_error(ConflictError("m", next_step="n")) == b"\x01\x00\x08conflict\x00\x01m\x00\x01n"


@pytest.mark.parametrize(
    "messages",
    [[b"x"] * (MAX_MESSAGES + 1), [b""], [LARGEST_MESSAGE + b"x"], [LARGEST_MESSAGE] * 2],
    ids=["too many", "an empty one", "a long one", "too long together"],
)
def test_messages_are_not_encoded_when_they_are_out_of_bounds(messages: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="an answer has"):
        encode_messages(messages)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x02",
        b"\x00\x00",
        b"\x00\x00\x00\x00\x00",
        b"\x00\x00\x00\x00\x02a",
        b"\x00" + b"\x00\x00\x00\x01a" * (MAX_MESSAGES + 1),
        b"\x00\xff\xff\xff\xff",
        b"\x00" + (len(LARGEST_MESSAGE) + 1).to_bytes(4, "big") + LARGEST_MESSAGE + b"x",
        bytes(MAX_ANSWER_BYTES + 1),
    ],
    ids=["none", "kind", "size cut", "empty", "cut", "many", "huge", "too long", "too long in all"],
)
def test_answer_is_refused_when_it_is_not_messages_exactly(answer: bytes) -> None:
    with pytest.raises(ProtocolError, match="answer"):
        decode_answer(answer)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"\x01", "cut off"),
        (b"\x01\x00\x05store\x00\x01m", "cut off"),
        (b"\x01\x00\x05store\x00\x01m\x00\x02n", "cut off"),
        (b"\x01\x00\x05store\x07\xd1" + b"m" * 2001 + b"\x00\x00", "too long"),
        (b"\x01\x00\x05store\x00\x01\xff\x00\x00", "not UTF-8"),
        (b"\x01\x00\x05store\x00\x01m\x00\x00\x00", "followed by"),
    ],
)
def test_answer_is_refused_when_it_is_not_an_error_exactly(answer: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        decode_answer(answer)


def test_error_is_raised_as_its_class_when_reported() -> None:
    with pytest.raises(StoreError) as reported:
        decode_answer(encode_error(StoreError("the disk is full", next_step="Make room")))
    assert (reported.value.message, reported.value.next_step) == ("the disk is full", "Make room")


def test_error_is_raised_as_the_root_when_its_code_is_not_known() -> None:
    with pytest.raises(VtpmError) as reported:
        decode_answer(b"\x01\x00\x03new\x00\x01m\x00\x01n")
    assert type(reported.value) is VtpmError


def test_long_words_are_cut_between_characters_when_encoded() -> None:
    with pytest.raises(ConflictError) as reported:
        decode_answer(encode_error(ConflictError("x" + "ü" * 1500)))
    assert reported.value.message == "x" + "ü" * 999


def test_words_move_no_terminal_when_decoded() -> None:
    with pytest.raises(ConflictError) as reported:
        decode_answer(encode_error(ConflictError("a\x1b[31m\r\n\u2028\u202eb", next_step="\ud800c\x07")))
    assert (reported.value.message, reported.value.next_step) == ("a?[31m????b", "?c?")


def test_examples_are_all_answers() -> None:
    for name, answer in ANSWER_EXAMPLES.items():
        if "error" not in name:
            assert encode_messages(decode_answer(answer)) == answer
