"""State goes over the link whole or not at all."""

from __future__ import annotations

import dataclasses

import pytest

from vtpm.errors import ProtocolError
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind
from vtpm.wire.manager_link import MAX_CHUNK_BYTES, SaveBegin, SaveChunk, StateChunk, StateEnd
from vtpm.wire.manager_link_peers import (
    CompletedSave,
    SaveReceiver,
    StateReceiver,
    save_digest,
    save_messages,
    state_digest,
    state_messages,
)

BLOB = bytes(range(256)) * 400
"""More than two chunks."""
STATE = {StateKind.VOLATILE: b"volatile", StateKind.PERMANENT: BLOB, StateKind.SAVESTATE: b"s"}
PERMIT = b"p" * 16


def save(receiver: SaveReceiver, seq: int, kind: StateKind, data: bytes) -> CompletedSave | None:
    *head, last = save_messages(seq, kind, data, None)
    assert all(receiver.receive(message) is None for message in head)
    return receiver.receive(last)


@pytest.mark.parametrize("size", [0, 1, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, MAX_STATE_BYTES])
def test_save_is_whole_when_its_last_byte_has_come(size: int) -> None:
    data = bytes(size)
    completed = save(SaveReceiver(), 7, StateKind.PERMANENT, data)
    assert completed == CompletedSave(7, StateKind.PERMANENT, data, None, save_digest(StateKind.PERMANENT, data))


def test_permit_arrives_when_a_save_carries_one() -> None:
    receiver = SaveReceiver()
    results = [receiver.receive(message) for message in save_messages(1, StateKind.PERMANENT, b"first", PERMIT)]
    assert results[-1] is not None
    assert results[-1].permit_id == PERMIT
    assert repr(PERMIT) not in repr(results[-1])
    assert repr(b"first") not in repr(results[-1])


def test_save_begins_anew_when_the_instance_repeats_it() -> None:
    receiver = SaveReceiver()
    messages = list(save_messages(1, StateKind.PERMANENT, BLOB, None))
    assert [receiver.receive(message) for message in messages[:2]] == [None, None]
    results = [receiver.receive(message) for message in messages]
    assert results[-1] is not None
    assert results[-1].data == BLOB


BEGIN, FIRST, SECOND, THIRD = save_messages(1, StateKind.PERMANENT, BLOB, None)
assert isinstance(BEGIN, SaveBegin)
assert isinstance(THIRD, SaveChunk)
REFUSED_SAVES: dict[str, list[SaveBegin | SaveChunk]] = {
    "chunk without begin": [FIRST],
    "chunk left out": [BEGIN, SECOND],
    "chunk doubled": [BEGIN, FIRST, FIRST],
    "chunk of another save": [BEGIN, dataclasses.replace(FIRST, seq=2)],
    "more than announced": [BEGIN, FIRST, SECOND, dataclasses.replace(THIRD, data=THIRD.data + b"x")],
    "another digest": [BEGIN, FIRST, SECOND, dataclasses.replace(THIRD, data=b"x" * len(THIRD.data))],
    "another kind": [dataclasses.replace(BEGIN, kind=StateKind.VOLATILE), FIRST, SECOND, THIRD],
    "deletion with another digest": [dataclasses.replace(BEGIN, total=0)],
}


@pytest.mark.parametrize("messages", REFUSED_SAVES.values(), ids=REFUSED_SAVES)
def test_save_is_refused_and_the_next_one_is_not_when_out_of_order(messages: list[SaveBegin | SaveChunk]) -> None:
    receiver = SaveReceiver()
    assert [receiver.receive(message) for message in messages[:-1]] == [None] * (len(messages) - 1)
    with pytest.raises(ProtocolError):
        receiver.receive(messages[-1])
    with pytest.raises(ProtocolError, match="out of order"):
        receiver.receive(SECOND)
    assert save(receiver, 2, StateKind.VOLATILE, BLOB) is not None


def test_save_is_forgotten_when_reset() -> None:
    receiver = SaveReceiver()
    receiver.receive(BEGIN)
    receiver.reset()
    with pytest.raises(ProtocolError):
        receiver.receive(FIRST)


def load(messages: list[StateChunk | StateEnd], seq: int = 5) -> dict[StateKind, bytes] | None:
    receiver = StateReceiver(seq)
    results = [receiver.receive(message) for message in messages]
    assert results[:-1] == [None] * (len(messages) - 1)
    return results[-1]


def test_state_is_whole_when_its_end_has_come() -> None:
    messages = list(state_messages(5, STATE))
    assert load(messages) == STATE
    # A manager that restarted begins again.
    assert load(messages[:3] + messages) == STATE


def chunk(kind: StateKind, total: int, offset: int, data: bytes, seq: int = 5) -> StateChunk:
    return StateChunk(seq, kind, total, offset, data)


def end(state: dict[StateKind, bytes], seq: int = 5) -> StateEnd:
    return StateEnd(seq, state_digest(state))


P = StateKind.PERMANENT
REFUSED_STATE: dict[str, list[StateChunk | StateEnd]] = {
    "chunk of another load": [chunk(P, 1, 0, b"x", seq=4)],
    "end of another load": [chunk(P, 1, 0, b"x"), end({P: b"x"}, seq=6)],
    "nothing": [end({})],
    "no permanent state": [chunk(StateKind.VOLATILE, 1, 0, b"x"), end({StateKind.VOLATILE: b"x"})],
    "does not begin at 0": [chunk(P, 2, 1, b"x")],
    "gap": [chunk(P, 3, 0, b"x"), chunk(P, 3, 2, b"x")],
    "doubled": [chunk(P, 9, 0, b"x"), chunk(P, 9, 1, b"x"), chunk(P, 9, 1, b"x")],
    "another total": [chunk(P, 3, 0, b"x"), chunk(P, 4, 1, b"x")],
    "more than its total": [chunk(P, 1, 0, b"xx")],
    "end too early": [chunk(P, 2, 0, b"x"), end({P: b"x"})],
    "another digest": [chunk(P, 1, 0, b"x"), end({P: b"y"})],
    "a kind missing": [chunk(P, 1, 0, b"x"), end({P: b"x", StateKind.VOLATILE: b"v"})],
}


@pytest.mark.parametrize("messages", REFUSED_STATE.values(), ids=REFUSED_STATE)
def test_state_is_refused_when_not_as_announced(messages: list[StateChunk | StateEnd]) -> None:
    with pytest.raises(ProtocolError):
        load(messages)


def test_digests_differ_when_only_the_bounds_between_kinds_do() -> None:
    volatile = StateKind.VOLATILE
    assert state_digest({P: b"ab", volatile: b"c"}) != state_digest({P: b"a", volatile: b"bc"})
    assert state_digest({P: b"a", volatile: b"b"}) == state_digest({volatile: b"b", P: b"a"})
    assert save_digest(P, b"") != save_digest(volatile, b"")
