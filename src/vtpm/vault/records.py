"""What the vault keeps, as values: vTPMs, permits, saved state, save marks, audit events.

Pure data and the rule for names. Imported by the vault and, through it, by the manager and migration.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from vtpm.errors import UsageError
from vtpm.tpm.types import InstanceId, Make, StateKind, TpmVersion, VtpmId
from vtpm.wire.names import is_name

MAX_WRAPPED_KEY_BYTES = 16 * 1024
MAX_DETAIL_CHARS = 16 * 1024
MAX_WORD_CHARS = 64
"""Bound on short words the vault keeps for others: life cycle states, kinds of event."""
DIGEST_BYTES = 32
PERMIT_BYTES = 16
MAX_ENGINE_VERSION = (1 << 32) - 1
MAX_ID = (1 << 32) - 2
"""Largest uid or gid; the one above means "none" to the kernel."""
MAX_COUNTER = (1 << 63) - 1
"""Largest epoch, version or sequence number: SQL integers are signed and have 64 bits."""


class DomainKind(enum.StrEnum):
    """Where a vTPM's instances live, and whose program they run; fixed at creation.

    The value is the place and, for another make than libtpms, a hyphen and the make.
    """

    PROCESS = "process"
    QEMU = "qemu"
    XEN = "xen"
    QEMU_SWTPM = "qemu-swtpm"

    @property
    def place(self) -> str:
        """Where instances live."""
        return self.value.partition("-")[0]

    @property
    def make(self) -> Make:
        """Whose program they run, so whose form the saved state has."""
        return Make(self.value.partition("-")[2] or Make.LIBTPMS)

    @property
    def tpm_versions(self) -> tuple[TpmVersion, ...]:
        """What TPMs there are of this kind."""
        return _VERSIONS[self.make]

    @classmethod
    def of(cls, place: str, make: Make) -> DomainKind:
        """Return the kind of a place and a make. Raises UsageError: there is none."""
        for kind in cls:
            if (kind.place, kind.make) == (place, make):
                return kind
        there = [kind.place for kind in cls if kind.make is make]
        raise UsageError(
            f"{place} domains do not run vTPMs of the make {make}", next_step=f"Use --domain {' or '.join(there)}"
        )


_VERSIONS = {Make.LIBTPMS: tuple(TpmVersion), Make.SWTPM: (TpmVersion.V2_0,)}


class PermitState(enum.StrEnum):
    """Life of the permit to manufacture: each vTPM has one, and the states only ever go forward."""

    OPEN = "open"
    ISSUED = "issued"
    CONSUMED = "consumed"


@dataclass(frozen=True)
class Permit:
    """The one-time permit to manufacture a vTPM.

    Args:
        state: how far the permit has gone.
        permit_id: PERMIT_BYTES random bytes from ISSUED on, None while OPEN.
    """

    state: PermitState = PermitState.OPEN
    permit_id: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class VtpmRecord:
    """One vTPM in the registry.

    Args:
        name: unique in the store; see valid_name.
        lifecycle: the manager's word for its state; the store keeps it and gives it no meaning.
        epoch: counts up each time the right to run the vTPM changes hands; from 1.
        created_at: with a time zone.
        wrapped_key: the vTPM's own key as the keeper wrapped it, or None before it was made.
        state_version: the last version given to a change of saved state; 0 before the first.
        instance_id: the one instance whose loads and saves are accepted, or None.
        engine_version: engine of the bound instance, MAJOR<<16 | MINOR<<8 | MICRO; 0 before it has loaded.
    """

    id: VtpmId
    name: str
    owner_uid: int
    owner_gid: int
    vm_uuid: UUID | None
    tpm_version: TpmVersion
    domain: DomainKind
    created_at: datetime
    epoch: int = 1
    lifecycle: str = "stopped"
    permit: Permit = Permit()
    wrapped_key: bytes | None = field(default=None, repr=False)
    state_version: int = 0
    instance_id: InstanceId | None = None
    engine_version: int = 0


@dataclass(frozen=True)
class SavedState:
    """One sealed state blob as stored."""

    vtpm_id: VtpmId
    kind: StateKind
    version: int
    epoch: int
    envelope: bytes = field(repr=False)


@dataclass(frozen=True)
class SaveMark:
    """The last committed save of an instance; makes its replay after a manager's restart harmless."""

    instance_id: InstanceId
    seq: int
    digest: bytes
    version: int


@dataclass(frozen=True)
class SaveRequest:
    """One change of a vTPM's saved state, sealed and ready to commit.

    Args:
        seq: the instance's own count of its saves, over all kinds; only ever grows.
        digest: DIGEST_BYTES that say what is saved; equal for a replay, though its envelope differs.
        version: greater than the record's state_version; gaps are allowed, reuse is not.
        envelope: the sealed blob, or empty to delete this kind.
        permit_id: with the first permanent save, and with no other.
    """

    vtpm_id: VtpmId
    instance_id: InstanceId
    seq: int
    digest: bytes
    kind: StateKind
    epoch: int
    version: int
    envelope: bytes = field(repr=False)
    permit_id: bytes | None = field(default=None, repr=False)


class SaveEffect(enum.StrEnum):
    """What an acknowledged save did."""

    COMMITTED = "committed"
    REPLAYED = "replayed"


@dataclass(frozen=True)
class SaveAck:
    """A save that is durable.

    Args:
        version: the state version under which it was committed, in a replay the earlier one.
    """

    effect: SaveEffect
    version: int


@dataclass(frozen=True)
class Event:
    """One line of the audit log.

    Args:
        time: with a time zone.
        actor_uid: who asked for it; None for the service itself.
        kind: a short word such as "created".
        detail: a JSON object as text.
        event_id: given by the store, counts up and is never reused; 0 before it is stored.
    """

    time: datetime
    actor_uid: int | None
    kind: str
    vtpm_name: str | None = None
    vtpm_id: VtpmId | None = None
    detail: str = "{}"
    event_id: int = 0


def valid_name(name: str) -> str:
    """Return the name if it is one that a vTPM may have; see wire.names. Raises UsageError: it is not."""
    if not is_name(name):
        raise UsageError(
            f"{name[:80]!r} is not a name for a vTPM",
            next_step="Use 1 to 63 letters, digits, '_', '-' and single '.'; the first a letter or digit",
        )
    return name
