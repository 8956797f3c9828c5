"""What one instance asks about a live move, handed to whoever decides, and the answers. For InstanceLink.

Nothing is decided here: until somebody says otherwise, everything is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

from vtpm.errors import ConflictError, ProtocolError, StoreError, UnavailableError, VtpmError
from vtpm.tpm.types import MAX_SEALED_BYTES, InstanceId, StateKind, VtpmId
from vtpm.wire.manager_link import (
    Activated,
    Arrive,
    Depart,
    MoveError,
    MovePart,
    MoveToManager,
    Retry,
    Return,
    Returned,
    ToInstance,
    Wanted,
)
from vtpm.wire.manager_link_moves import BlobReceiver, sealed_messages
from vtpm.wire.manager_link_peers import state_messages


async def _refuse(_: bytes = b"") -> NoReturn:
    raise ConflictError("no migration of this vTPM is under way")


@dataclass(frozen=True)
class MoveCalls:
    """Who decides. Each may raise a VtpmError, which refuses: UnavailableError and StoreError for now, others for good.

    Args:
        depart: takes the volatile state of a TPM that stands still, and returns all state sealed for the destination,
            1 to MAX_SEALED_BYTES bytes. May be asked again when its answer was lost.
        take_back: returns once the vTPM may go on here, also when it never was to leave.
        arrive: takes a sealed state and returns it opened, permanent state at least.
        wanted: the guest has gone on here; called once or more. Sending Activated is up to it.
    """

    depart: Callable[[bytes], Awaitable[bytes]] = _refuse
    take_back: Callable[[], Awaitable[None]] = _refuse
    arrive: Callable[[bytes], Awaitable[Mapping[StateKind, bytes]]] = _refuse
    wanted: Callable[[], None] = lambda: None


NO_MOVE = MoveCalls()
"""Everything is refused."""


class LiveMoves(Protocol):
    """Decides about vTPMs that move with their guests. Errors as of MoveCalls."""

    async def depart(self, vtpm_id: VtpmId, instance_id: InstanceId, volatile: bytes) -> bytes:
        """See MoveCalls."""

    async def take_back(self, vtpm_id: VtpmId) -> None:
        """See MoveCalls."""

    async def arrive(self, vtpm_id: VtpmId, sealed: bytes) -> Mapping[StateKind, bytes]:
        """See MoveCalls."""

    def wanted(self, vtpm_id: VtpmId) -> None:
        """See MoveCalls."""

    def expects(self, vtpm_id: VtpmId) -> bool:
        """Whether an instance waits here for this vTPM, or has it inert."""

    async def ended(self, vtpm_id: VtpmId, instance_id: InstanceId, how: str) -> None:
        """An instance that waited, or had it inert, is no more."""

    async def all_ended(self, how: str) -> None:
        """No instance is any more."""

    async def take_up(self) -> None:
        """Take up what a manager before this one has left: vTPMs that are frozen or inert, or are wanted and held."""


class NotYet:
    """Stands for LiveMoves until it is there: who asks is told to ask again."""

    async def depart(self, vtpm_id: VtpmId, instance_id: InstanceId, volatile: bytes) -> bytes:
        """Raises UnavailableError."""
        raise _not_yet()

    async def take_back(self, vtpm_id: VtpmId) -> None:
        """Raises UnavailableError."""
        raise _not_yet()

    async def arrive(self, vtpm_id: VtpmId, sealed: bytes) -> Mapping[StateKind, bytes]:
        """Raises UnavailableError."""
        raise _not_yet()

    def wanted(self, vtpm_id: VtpmId) -> None:
        """The link remembers it, until somebody is there who looks."""

    def expects(self, vtpm_id: VtpmId) -> bool:
        """Nothing is expected."""
        return False

    async def ended(self, vtpm_id: VtpmId, instance_id: InstanceId, how: str) -> None:
        """Nothing was expected."""

    async def all_ended(self, how: str) -> None:
        """Nothing was expected."""

    async def take_up(self) -> None:
        """Nothing is taken up yet."""


def _not_yet() -> UnavailableError:
    return UnavailableError("the manager has just begun, and does not move vTPMs yet")


class InstanceMoves:
    """See the module.

    Args:
        calls: who decides.
        send: takes a message for the instance.
    """

    def __init__(self, calls: MoveCalls, send: Callable[[ToInstance], None]) -> None:
        self._calls = calls
        self._send = send
        self._blobs = BlobReceiver()
        self._arrival: int | None = None
        self._wanted = False
        self._asked_for: int | None = None
        self._answering: asyncio.Task[None] | None = None

    def receive(self, message: MoveToManager) -> None:
        """Take a message. Raises ProtocolError: it is out of order."""
        match message:
            case Wanted(seq=seq):
                if self._asked_for == seq or self._arrival not in (None, seq):
                    raise ProtocolError("a vTPM is wanted again, or another than has arrived")
                self._arrival = self._asked_for = seq
                self._wanted = True
                self._calls.wanted()
            case Return(seq=seq):
                self._begin(seq, partial(self._take_back, seq))
            case Depart() | Arrive() | MovePart():
                blob = self._blobs.receive(message)
                if blob is not None:
                    seq = blob.head.seq
                    work = self._depart if isinstance(blob.head, Depart) else self._arrive
                    self._begin(seq, partial(work, seq, blob.data))

    @property
    def wanted(self) -> bool:
        """Whether the instance has said that its guest wants a vTPM which is not activated."""
        return self._wanted

    def activate(self) -> None:
        """Let the vTPM run that has arrived.

        Nothing is sent when a manager before this one took it in: the instance asks when its guest wants it (`wanted`).
        """
        self._wanted = False
        if self._arrival is not None:
            self._send(Activated(self._arrival))

    def close(self) -> None:
        """The link has gone: nobody hears an answer."""
        if self._answering is not None:
            self._answering.cancel()

    def _begin(self, seq: int, work: Callable[[], Awaitable[list[ToInstance]]]) -> None:
        if self._answering is not None and not self._answering.done():
            # Its instance has given it up, or has gone on to another question.
            self._answering.cancel()
        self._answering = asyncio.ensure_future(self._answer(seq, work))

    async def _answer(self, seq: int, work: Callable[[], Awaitable[list[ToInstance]]]) -> None:
        try:
            answers = await work()
        except VtpmError as error:
            retry = Retry.LATER if isinstance(error, StoreError | UnavailableError) else Retry.FINAL
            answers = [MoveError(seq, retry, error.code, error.message)]
        for answer in answers:
            self._send(answer)

    async def _depart(self, seq: int, volatile: bytes) -> list[ToInstance]:
        sealed = await self._calls.depart(volatile)
        if not 0 < len(sealed) <= MAX_SEALED_BYTES:
            # Not for good: it may have been frozen, and comes back by Return.
            raise UnavailableError(f"the sealed state has {len(sealed)} bytes; 1 to {MAX_SEALED_BYTES} are allowed")
        return list(sealed_messages(seq, sealed))

    async def _take_back(self, seq: int) -> list[ToInstance]:
        await self._calls.take_back()
        return [Returned(seq)]

    async def _arrive(self, seq: int, sealed: bytes) -> list[ToInstance]:
        state = await self._calls.arrive(sealed)
        self._arrival = seq
        return list(state_messages(seq, state))
