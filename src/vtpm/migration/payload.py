"""All of a vTPM as it goes to another host, in the clear: what is sealed into State. Pure.

Bytes: u8 version (1), u8 kind of domain (1 process, 2 qemu, 3 xen, 4 qemu-swtpm), then a vTPM as the body of a backup
has it (docs/state-format.md), with volatile state if there is any: what leaves is destroyed where it was, so nothing is
had twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vtpm.errors import StateError
from vtpm.secret import Secret
from vtpm.tpm.types import StateKind
from vtpm.vault import backup
from vtpm.vault.backup import Backup
from vtpm.vault.contents import open_all
from vtpm.vault.records import DomainKind, PermitState, SavedState, VtpmRecord

PAYLOAD_VERSION = 1
_KINDS: Mapping[DomainKind, int] = {
    DomainKind.PROCESS: 1,
    DomainKind.QEMU: 2,
    DomainKind.XEN: 3,
    DomainKind.QEMU_SWTPM: 4,
}


@dataclass(frozen=True)
class Payload:
    """See the module.

    Args:
        kind: where it lived, and whose form the state has.
        vtpm: with the epoch that it has at the source; exported_at: when it left.
    """

    kind: DomainKind
    vtpm: Backup


def pack(
    key: Secret, record: VtpmRecord, saved: Sequence[SavedState], now: datetime, passing: bytes | None = None
) -> bytes:
    """Return the payload of a vTPM that stands still.

    Args:
        key: the vTPM's own.
        saved: all of its sealed states.
        now: with a time zone.
        passing: volatile state of one that runs, whose guest is paused; None: it does not run.
    Raises:
        StateError: it was never manufactured, or a state is damaged or foreign.
    """
    if record.permit.state is not PermitState.CONSUMED:
        raise StateError(
            f"vTPM {record.name} was never started, so it has no state", next_step="Create it anew where it is needed"
        )
    contents = open_all(key, record, saved, tuple(StateKind))
    if passing is not None:
        contents = replace(contents, states={**contents.states, StateKind.VOLATILE: passing})
    whole = backup.backup_of(record, contents, now)
    return bytes([PAYLOAD_VERSION, _KINDS[record.domain]]) + backup.encode(whole)


def unpack(payload: bytes) -> Payload:
    """Read a payload that was decrypted. Raises StateError: it is not exactly one, of this version."""
    version, code = (*payload[:2], 0, 0)[:2]
    if version != PAYLOAD_VERSION:
        raise StateError(f"the vTPM that came is written in version {version}; this program reads {PAYLOAD_VERSION}")
    kinds = {code: kind for kind, code in _KINDS.items()}
    if code not in kinds:
        raise StateError(f"the vTPM that came is of a kind that this program does not know: {code}")
    return Payload(kinds[code], backup.decode(payload[2:]))
