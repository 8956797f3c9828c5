"""The manager link takes messages and only messages, and state whole or not at all, whatever order they come in."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.wire.link_examples import to_instance, to_manager
from vtpm.errors import ProtocolError
from vtpm.tpm.types import StateKind
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    MAX_CHUNK_BYTES,
    Arrive,
    Depart,
    Direction,
    MovePart,
    SaveBegin,
    SaveChunk,
    StateChunk,
    StateEnd,
    decode_message,
    encode_message,
)
from vtpm.wire.manager_link_moves import BlobReceiver, move_messages, sealed_messages
from vtpm.wire.manager_link_peers import (
    CompletedSave,
    SaveReceiver,
    StateReceiver,
    save_messages,
    state_messages,
)

BOTH = st.one_of(
    st.tuples(st.just(Direction.TO_INSTANCE), to_instance), st.tuples(st.just(Direction.TO_MANAGER), to_manager)
)


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


_blob = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, 3 * MAX_CHUNK_BYTES]).map(lambda size: bytes(size)),
)
_kind = st.sampled_from(StateKind)


class Saves(RuleBasedStateMachine):
    """A vtpmd, well-behaved or taken over, against the manager's half. `ahead` is what it has yet to send."""

    def __init__(self) -> None:
        super().__init__()
        self.receiver = SaveReceiver()
        self.ahead: list[SaveBegin | SaveChunk] = []
        self.whole: CompletedSave | None = None
        self.seq = 0
        self.in_step = False

    def send(self, message: SaveBegin | SaveChunk) -> CompletedSave | None:
        body = encode_message(message)
        received = decode_message(body, Direction.TO_MANAGER)
        assert isinstance(received, SaveBegin | SaveChunk)
        return self.receiver.receive(received)

    @rule(kind=_kind, blob=_blob, permit=st.sampled_from([None, b"p" * 16]))
    def begin(self, kind: StateKind, blob: bytes, permit: bytes | None) -> None:
        self.seq += 1
        first, *self.ahead = save_messages(self.seq, kind, blob, permit)
        assert isinstance(first, SaveBegin)
        self.whole = CompletedSave(self.seq, kind, blob, permit, first.digest)
        result = self.send(first)
        self.in_step = bool(self.ahead)
        assert result == (None if self.ahead else self.whole)

    @precondition(lambda self: self.in_step)
    @rule()
    def next_chunk(self) -> None:
        result = self.send(self.ahead.pop(0))
        self.in_step = bool(self.ahead)
        assert result == (None if self.ahead else self.whole)

    @precondition(lambda self: self.in_step)
    @rule()
    def manager_restarts(self) -> None:
        self.receiver = SaveReceiver()
        self.in_step = False

    @precondition(lambda self: self.in_step)
    @rule()
    def reset(self) -> None:
        self.receiver.reset()
        self.in_step = False

    @rule(seq=st.integers(-1, 1), offset=st.integers(1, 4 * MAX_CHUNK_BYTES), data=st.binary(min_size=1, max_size=40))
    def wrong_chunk(self, seq: int, offset: int, data: bytes) -> None:
        expected = self.ahead[0] if self.in_step else None
        chunk = SaveChunk(max(1, self.seq + seq), offset, data)
        if isinstance(expected, SaveChunk) and (expected.seq, expected.offset) == (chunk.seq, chunk.offset):
            chunk = dataclasses.replace(chunk, offset=chunk.offset + 1)
        self.refuses(chunk)

    @precondition(lambda self: self.in_step and len(self.ahead) == 1)
    @rule(change=st.sampled_from(["flip", "longer"]))
    def wrong_last_chunk(self, change: str) -> None:
        last = self.ahead[0]
        assert isinstance(last, SaveChunk)
        flipped = bytes((last.data[0] ^ 1,)) + last.data[1:]
        longer = last.data[: MAX_CHUNK_BYTES - 1] + b"xx"[: MAX_CHUNK_BYTES - len(last.data[: MAX_CHUNK_BYTES - 1])]
        self.refuses(dataclasses.replace(last, data=flipped if change == "flip" or longer == last.data else longer))

    def refuses(self, chunk: SaveChunk) -> None:
        try:
            result = self.send(chunk)
        except ProtocolError:
            self.in_step = False
        else:
            raise AssertionError(f"{chunk} was taken and gave {result}")

    @invariant()
    def holds_no_more_than_announced(self) -> None:
        assert len(self.receiver._data) <= (len(self.whole.data) if self.whole else 0)


TestSaves = Saves.TestCase
TestSaves.settings = effort.machine


@effort.codec
@given(
    st.dictionaries(_kind, _blob.filter(len), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(["drop", "double", "swap", "kind", "seq"]), st.integers(0, 20)), max_size=3),
)
def test_state_is_as_sent_or_refused_when_messages_are_lost_doubled_or_moved(
    state: dict[StateKind, bytes], accidents: list[tuple[str, int]]
) -> None:
    messages: list[StateChunk | StateEnd] = list(state_messages(5, state))
    for accident, number in accidents:
        at = number % len(messages)
        message = messages[at]
        match accident:
            case "drop" if len(messages) > 1:
                del messages[at]
            case "double":
                messages.insert(at, message)
            case "swap":
                messages[at], messages[at - 1] = messages[at - 1], message
            case "kind" if isinstance(message, StateChunk):
                messages[at] = dataclasses.replace(message, kind=StateKind(number % 3 + 1))
            case "seq":
                messages[at] = dataclasses.replace(message, seq=6)
    receiver = StateReceiver(5)
    for message in messages:
        try:
            result = receiver.receive(message)
        except ProtocolError:
            continue
        assert result in (None, state)
    if not accidents:
        assert (result == state) is (StateKind.PERMANENT in state)


_to_move = to_manager.filter(lambda message: isinstance(message, Depart | Arrive | MovePart))


@effort.codec
@given(_blob.filter(bool), st.integers(1, 9), st.lists(_to_move, max_size=4), st.data())
def test_blob_of_a_move_arrives_whole_or_is_refused_whatever_comes_between(
    blob: bytes, seq: int, others: list[Any], data: st.DataObject
) -> None:
    messages: list[Any] = list(move_messages(Depart, seq, blob))
    for other in others:
        messages.insert(data.draw(st.integers(0, len(messages))), other)
    if data.draw(st.booleans()):
        del messages[data.draw(st.integers(0, len(messages) - 1))]
    receiver = BlobReceiver()
    for message in messages:
        try:
            completed = receiver.receive(message)
        except ProtocolError:
            continue
        if completed is not None:
            assert hashlib.sha256(completed.data).digest() == completed.head.digest
            assert len(completed.data) == completed.head.total
    whole = [receiver.receive(message) for message in sealed_messages(seq, blob)][-1]
    assert whole is not None
    assert whole.data == blob
