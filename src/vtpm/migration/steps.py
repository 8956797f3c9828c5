"""What a machine answers to an event, and the one order in which it is carried out. Pure but for what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from vtpm.errors import ConflictError
from vtpm.vault.holding import Holding
from vtpm.wire.migration import MigrationMessage

S = TypeVar("S")


class MigrationError(ConflictError):
    """A step of a migration was refused: the message or order does not fit what this host holds. Nothing changed."""

    code = "migration"


@dataclass(frozen=True)
class Send:
    """A message for one peer."""

    peer: str
    message: MigrationMessage


@dataclass(frozen=True)
class Step(Generic[S]):
    """What follows from one event.

    Args:
        holding: as it is to be; where it differs from what it was, it is made durable before anything is sent.
        session: what is remembered until the next crash; None: nothing.
        sends: messages, in order.
        state: the vTPM's plain state that is stored with an INERT holding, which no repr shows; None: nothing is.
    """

    holding: Holding
    session: S | None
    sends: tuple[Send, ...] = ()
    state: bytes | None = field(default=None, repr=False)


class Journal(Protocol):
    """Makes holdings durable."""

    def record(self, before: Holding, after: Holding, state: bytes | None) -> None:
        """Make a holding durable and anchored, with what belongs to the change, in one transaction.

        INERT stores the state, sealed under a new key of this host; MOVED and ABSENT destroy the key. Raises
        StoreError or PlatformTpmError: it may have become durable or not; the holding has to be read again.
        """


def carry_out(before: Holding, step: Step[S], journal: Journal, send: Callable[[Send], None]) -> None:
    """Make a step durable, then send. The one way in which a step takes effect.

    Raises:
        StoreError, PlatformTpmError: of the journal; nothing was sent.
    """
    if step.holding != before:
        journal.record(before, step.holding, step.state)
    for message in step.sends:
        send(message)
