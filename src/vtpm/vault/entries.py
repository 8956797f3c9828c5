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
        octets_field(_ENTRY_LABEL),
        octets_field(record.id.bytes),
        octets_field(record.name.encode()),
        number_field(record.owner_uid),
        number_field(record.owner_gid),
        octets_field(None if record.vm_uuid is None else record.vm_uuid.bytes),
        octets_field(record.tpm_version.encode()),
        octets_field(record.domain.encode()),
        number_field(microseconds(record.created_at)),
        number_field(record.epoch),
        octets_field(record.lifecycle.encode()),
        octets_field(record.permit.state.encode()),
        octets_field(record.permit.permit_id),
        octets_field(record.wrapped_key),
        number_field(record.state_version),
        octets_field(None if record.instance_id is None else record.instance_id.bytes),
        number_field(record.engine_version),
        number_field(len(states)),
    ]
    for state in states:
        fields += [
            number_field(state.kind),
            number_field(state.epoch),
            number_field(state.version),
            octets_field(state.digest),
        ]
    if mark is not None:
        fields += [
            octets_field(mark.instance_id.bytes),
            number_field(mark.seq),
            octets_field(mark.digest),
            number_field(mark.version),
        ]
    return b"".join(fields)


def next_events_head(head: bytes, event: Event) -> bytes:
    """Return the head of the audit log after this event, which has its id: a hash over all events up to it."""
    fields = [
        octets_field(_EVENT_LABEL),
        octets_field(head),
        number_field(event.event_id),
        number_field(microseconds(event.time)),
        octets_field(None) if event.actor_uid is None else number_field(event.actor_uid),
        octets_field(event.kind.encode()),
        octets_field(None if event.vtpm_name is None else event.vtpm_name.encode()),
        octets_field(None if event.vtpm_id is None else event.vtpm_id.bytes),
        octets_field(event.detail.encode()),
    ]
    return hashlib.sha256(b"".join(fields)).digest()


def octets_field(content: bytes | None) -> bytes:
    """Return a field of bytes, or the one that says "none"."""
    # No field is as long as the length that says "none".
    return b"\xff\xff\xff\xff" if content is None else len(content).to_bytes(4, "big") + content


def number_field(value: int) -> bytes:
    """Return a field that is a number."""
    return _NUMBER.pack(8, value)
