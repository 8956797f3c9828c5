"""What of a vTPM and of the audit log the root record stands for, byte for byte; docs/state-format.md, "Root record".

Pure. Imported by the stores.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from vtpm.tpm.types import StateKind
from vtpm.vault.records import Event, SaveMark, VtpmRecord

_ENTRY_LABEL = b"vtpm entry v1"
_EVENT_LABEL = b"vtpm event v1"
_NUMBER = struct.Struct(">Iq")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

NO_EVENTS = bytes(32)
"""Head of an audit log without events."""


@dataclass(frozen=True)
class StateEntry:
    """What the entry of a vTPM says of one saved state: all but the envelope itself."""

    kind: StateKind
    epoch: int
    version: int
    digest: bytes


def microseconds(time: datetime) -> int:
    """Return the microseconds from 1970-01-01 UTC to this time, which has a time zone."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def envelope_digest(envelope: bytes) -> bytes:
    """Return the digest by which an entry names an envelope."""
    return hashlib.sha256(envelope).digest()


def entry_of(record: VtpmRecord, states: Sequence[StateEntry], mark: SaveMark | None) -> bytes:
    """Return the entry of one vTPM: all of its row, what it has saved, and its last save.

    Args:
        states: by kind, ascending.
    """
    fields = [
        _field(_ENTRY_LABEL),
        _field(record.id.bytes),
        _field(record.name.encode()),
        _number(record.owner_uid),
        _number(record.owner_gid),
        _field(None if record.vm_uuid is None else record.vm_uuid.bytes),
        _field(record.tpm_version.encode()),
        _field(record.domain.encode()),
        _number(microseconds(record.created_at)),
        _number(record.epoch),
        _field(record.lifecycle.encode()),
        _field(record.permit.state.encode()),
        _field(record.permit.permit_id),
        _field(record.wrapped_key),
        _number(record.state_version),
        _field(None if record.instance_id is None else record.instance_id.bytes),
        _number(record.engine_version),
        _number(len(states)),
    ]
    for state in states:
        fields += [_number(state.kind), _number(state.epoch), _number(state.version), _field(state.digest)]
    if mark is not None:
        fields += [_field(mark.instance_id.bytes), _number(mark.seq), _field(mark.digest), _number(mark.version)]
    return b"".join(fields)


def next_events_head(head: bytes, event: Event) -> bytes:
    """Return the head of the audit log after this event, which has its id: a hash over all events up to it."""
    fields = [
        _field(_EVENT_LABEL),
        _field(head),
        _number(event.event_id),
        _number(microseconds(event.time)),
        _field(None) if event.actor_uid is None else _number(event.actor_uid),
        _field(event.kind.encode()),
        _field(None if event.vtpm_name is None else event.vtpm_name.encode()),
        _field(None if event.vtpm_id is None else event.vtpm_id.bytes),
        _field(event.detail.encode()),
    ]
    return hashlib.sha256(b"".join(fields)).digest()


def _field(content: bytes | None) -> bytes:
    # No field is as long as the length that says "none".
    return b"\xff\xff\xff\xff" if content is None else len(content).to_bytes(4, "big") + content


def _number(value: int) -> bytes:
    return _NUMBER.pack(8, value)
