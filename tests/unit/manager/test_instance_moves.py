"""What an instance asks about a live move reaches whoever decides; by default it is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from vtpm.errors import ConflictError, ProtocolError, StoreError, UnavailableError, VtpmError
from vtpm.manager.instance_moves import NO_MOVE, InstanceMoves, MoveCalls
from vtpm.tpm.types import MAX_SEALED_BYTES, StateKind
from vtpm.wire.manager_link import (
    Activated,
    Arrive,
    Depart,
    MoveError,
    MoveToManager,
    Retry,
    Return,
    Returned,
    ToInstance,
    Wanted,
)
from vtpm.wire.manager_link_moves import move_messages, sealed_messages
from vtpm.wire.manager_link_peers import state_messages

STATE = {StateKind.PERMANENT: b"permanent", StateKind.VOLATILE: b"volatile"}


async def _seal(volatile: bytes) -> bytes:
    return b"sealed " + volatile


async def _take_back() -> None:
    return


async def _open(sealed: bytes) -> dict[StateKind, bytes]:
    assert sealed == b"sealed"
    return STATE


GRANTED = MoveCalls(_seal, _take_back, _open)


def ask(calls: MoveCalls, *messages: MoveToManager, activates: bool = False) -> list[ToInstance]:
    """Return what is answered."""

    async def run() -> list[ToInstance]:
        sent: list[ToInstance] = []
        moves = InstanceMoves(calls, sent.append)
        for message in messages:
            moves.receive(message)
        for _ in range(9):
            await asyncio.sleep(0)
        if activates:
            moves.activate()
        moves.close()
        return sent

    return asyncio.run(run())


def test_sealed_state_is_answered_when_a_departure_is_granted() -> None:
    assert ask(GRANTED, *move_messages(Depart, 3, b"v")) == list(sealed_messages(3, b"sealed v"))


def test_state_is_answered_when_an_arrival_is_granted() -> None:
    assert ask(GRANTED, *move_messages(Arrive, 3, b"sealed")) == list(state_messages(3, STATE))


def test_return_is_answered_when_it_is_granted() -> None:
    assert ask(GRANTED, Return(3)) == [Returned(3)]


@pytest.mark.parametrize(
    "messages", [[*move_messages(Depart, 3, b"v")], [Return(3)], [*move_messages(Arrive, 3, b"s")]]
)
def test_everything_is_refused_when_nobody_decides(messages: list[MoveToManager]) -> None:
    (refused,) = ask(NO_MOVE, *messages)
    assert refused == MoveError(3, Retry.FINAL, "conflict", "no migration of this vTPM is under way")


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (UnavailableError("later"), Retry.LATER),
        (StoreError("full"), Retry.LATER),
        (ConflictError("moved"), Retry.FINAL),
    ],
)
def test_refusal_says_whether_to_ask_again_when_it_is_one(error: VtpmError, retry: Retry) -> None:
    async def refuse() -> None:
        raise error

    assert ask(replace(GRANTED, take_back=refuse), Return(3)) == [MoveError(3, retry, error.code, error.message)]


@pytest.mark.parametrize("size", [0, MAX_SEALED_BYTES + 1])
def test_sealed_state_is_not_sent_when_it_is_of_no_size_that_qemu_may_carry(size: int) -> None:
    async def seal(_: bytes) -> bytes:
        return bytes(size)

    (refused,) = ask(replace(GRANTED, depart=seal), *move_messages(Depart, 3, b"v"))
    assert isinstance(refused, MoveError)
    assert refused.retry is Retry.LATER


def test_last_question_is_answered_alone_when_another_was_given_up() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    calls = replace(GRANTED, take_back=never)
    assert ask(calls, Return(3), *move_messages(Arrive, 4, b"sealed")) == list(state_messages(4, STATE))


@pytest.mark.parametrize(
    ("messages", "activated"),
    [([*move_messages(Arrive, 3, b"sealed")], 3), ([Wanted(9)], 9), ([*move_messages(Depart, 3, b"v")], None)],
)
def test_activation_names_the_arrival_when_one_is_known(messages: list[MoveToManager], activated: int | None) -> None:
    sent = ask(GRANTED, *messages, activates=True)
    assert [one for one in sent if isinstance(one, Activated)] == ([Activated(activated)] if activated else [])


def test_whoever_decides_hears_of_it_when_the_guest_wants_its_vtpm() -> None:
    wanted: list[int] = []
    assert ask(replace(GRANTED, wanted=lambda: wanted.append(1)), Wanted(3)) == []
    assert wanted == [1]


@pytest.mark.parametrize(
    "messages",
    [[Wanted(3), Wanted(3)], [Wanted(3), Wanted(4)], [*move_messages(Arrive, 3, b"sealed"), Wanted(4)]],
    ids=["again", "another", "not what arrived"],
)
def test_vtpm_that_is_wanted_without_end_is_nonsense(messages: list[MoveToManager]) -> None:
    wanted = list[int]()

    async def run() -> None:
        moves = InstanceMoves(replace(GRANTED, wanted=lambda: wanted.append(1)), lambda _: None)
        for message in messages[:-1]:
            moves.receive(message)
        for _ in range(9):
            await asyncio.sleep(0)
        asked = len(wanted)
        with pytest.raises(ProtocolError):
            moves.receive(messages[-1])
        moves.close()
        assert len(wanted) == asked

    asyncio.run(run())
