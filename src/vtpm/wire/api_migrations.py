"""Migrations in the manager's API, as data. For manager and client."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from uuid import UUID

from vtpm.tpm.types import TpmVersion
from vtpm.wire.api import DomainName


class Guest(enum.StrEnum):
    """What a vTPM moves with."""

    NONE = "none"
    """It is stopped."""
    FOREIGN = "foreign"
    """Its guest, which somebody else migrates; it runs there from its first command on."""
    DRIVEN = "driven"
    """Its guest, whose arrival this host is told of."""


class Phase(enum.StrEnum):
    """How far a move is."""

    EXPECTED = "expected"
    """An instance waits here for it and its guest."""
    READY = "ready"
    """The destination has proven itself; the guest may go."""
    PROVING = "proving"
    """Both hosts show each other what they are; nothing has left."""
    SENDING = "sending"
    """The vTPM is frozen, and its state is on its way."""
    UNDECIDED = "undecided"
    """One host waits for the other, and asks again by itself."""
    OVER = "over"


@dataclass(frozen=True)
class MigrateVtpm:
    """Where a vTPM is to move.

    Args:
        to: a peer's name or URL.
        domain: what it is to live in there; None: what it lives in here. Without a guest alone.
        guest: what it moves with.
    """

    to: str
    domain: DomainName | None = None
    guest: Guest = Guest.NONE


@dataclass(frozen=True)
class ReceiveVtpm:
    """Which vTPM is to arrive with its guest, and what it is to live in.

    Args:
        uuid: as `vtpm show` says it at the source.
        vm_uuid: of the VM that it is bound to; None: any.
        owner: uid and gid; None: the caller's.
    """

    uuid: UUID
    tpm_version: TpmVersion = TpmVersion.V2_0
    domain: DomainName = DomainName.PROCESS
    vm_uuid: UUID | None = None
    owner: tuple[int, int] | None = None


@dataclass(frozen=True)
class AdoptVtpm:
    """An operator's word that the host that an inert vTPM comes from is lost for good."""

    source_is_lost: bool


@dataclass(frozen=True)
class Migration:
    """What this host holds of a vTPM that has moved, or is moving.

    Args:
        right: "absent", "held", "frozen", "moved" or "inert"; see docs/migration.md.
        epoch: of that right.
        peer: the other host.
        phase: see Phase.
        trouble: why the other host could not be asked; empty: it could, or need not.
    """

    uuid: UUID
    name: str
    right: str
    epoch: int
    peer: str
    phase: Phase
    trouble: str
