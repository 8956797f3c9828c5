"""Rows of the SQLite store as records, and back.

Pure. A row that no program of ours wrote raises ValueError. Imported by sqlite_store and sqlite_anchored.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from vtpm.tpm.types import InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.entries import StateEntry, microseconds
from vtpm.vault.holding import Holding, KnownVtpm, Right
from vtpm.vault.launch_policy import ImageState, LaunchImage
from vtpm.vault.records import (
    DomainKind,
    Event,
    Permit,
    PermitState,
    SavedState,
    SaveMark,
    VtpmRecord,
)
from vtpm.wire.migration import Mode

SELECT_RECORDS = (
    "SELECT id, name, owner_uid, owner_gid, vm_uuid, tpm_version, domain, created_at_us, epoch, lifecycle,"
    " permit_state, permit_id, wrapped_key, state_version, instance_id, engine_version, slot FROM vtpm"
)
INSERT_RECORD = (
    "INSERT INTO vtpm (id, name, owner_uid, owner_gid, vm_uuid, tpm_version, domain, created_at_us, epoch,"
    " lifecycle, permit_state, permit_id, wrapped_key, state_version, instance_id, engine_version, slot)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
SELECT_STATES = "SELECT vtpm_id, kind, version, epoch, envelope, digest FROM state"
SELECT_STATE_ENTRIES = "SELECT vtpm_id, kind, epoch, version, digest FROM state"
# Not INSERT OR REPLACE: that makes another row, and with it writes two pages of indexes in which nothing changes.
REPLACE_STATE = (
    "INSERT INTO state (vtpm_id, kind, version, epoch, digest, envelope) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (vtpm_id, kind) DO UPDATE SET version = excluded.version, epoch = excluded.epoch,"
    " digest = excluded.digest, envelope = excluded.envelope"
)
SELECT_MARKS = "SELECT instance_id, seq, digest, version, vtpm_id FROM save_mark"
REPLACE_MARK = (
    "INSERT INTO save_mark (vtpm_id, instance_id, seq, digest, version) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT (vtpm_id) DO UPDATE SET instance_id = excluded.instance_id, seq = excluded.seq,"
    " digest = excluded.digest, version = excluded.version"
)
SELECT_EVENTS = "SELECT event_id, time_us, actor_uid, kind, vtpm_name, vtpm_id, detail, head FROM event"
SELECT_EVENTS_HEAD = "SELECT event_id, head FROM event"
INSERT_EVENT = (
    "INSERT INTO event (event_id, time_us, actor_uid, kind, vtpm_name, vtpm_id, detail, head)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
SELECT_IMAGES = "SELECT kind, measurement, label, engine_version, state, changed_at_us FROM launch_image"
REPLACE_IMAGE = (
    "INSERT INTO launch_image (kind, measurement, label, engine_version, state, changed_at_us)"
    " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (kind, measurement) DO UPDATE SET label = excluded.label,"
    " engine_version = excluded.engine_version, state = excluded.state, changed_at_us = excluded.changed_at_us"
)
SELECT_HOLDINGS = "SELECT vtpm_id, name, standing, epoch, migration_id, peer, digest, mode, adopted FROM holding"
REPLACE_HOLDING = (
    "INSERT OR REPLACE INTO holding (vtpm_id, name, standing, epoch, migration_id, peer, digest, mode, adopted)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# STRICT tables fix the type of each column, so that a row's types are as the schema says.
Row = tuple[Any, ...]


def values_of(record: VtpmRecord, slot: int) -> Row:
    """Return the values for INSERT_RECORD."""
    return (
        record.id.bytes,
        record.name,
        record.owner_uid,
        record.owner_gid,
        record.vm_uuid.bytes if record.vm_uuid else None,
        str(record.tpm_version),
        str(record.domain),
        microseconds(record.created_at),
        record.epoch,
        record.lifecycle,
        str(record.permit.state),
        record.permit.permit_id,
        record.wrapped_key,
        record.state_version,
        record.instance_id.bytes if record.instance_id else None,
        record.engine_version,
        slot,
    )


def record_of(row: Row) -> VtpmRecord:
    """Return the record in a row of SELECT_RECORDS."""
    return VtpmRecord(
        id=VtpmId(UUID(bytes=row[0])),
        name=row[1],
        owner_uid=row[2],
        owner_gid=row[3],
        vm_uuid=None if row[4] is None else UUID(bytes=row[4]),
        tpm_version=TpmVersion(row[5]),
        domain=DomainKind(row[6]),
        created_at=_time(row[7]),
        epoch=row[8],
        lifecycle=row[9],
        permit=Permit(PermitState(row[10]), row[11]),
        wrapped_key=row[12],
        state_version=row[13],
        instance_id=None if row[14] is None else InstanceId(UUID(bytes=row[14])),
        engine_version=row[15],
    )


def state_of(row: Row) -> SavedState:
    """Return the saved state in a row of SELECT_STATES."""
    return SavedState(VtpmId(UUID(bytes=row[0])), StateKind(row[1]), *row[2:5])


def state_entry_of(row: Row) -> StateEntry:
    """Return the state's part of an entry in a row of SELECT_STATE_ENTRIES."""
    return StateEntry(StateKind(row[1]), *row[2:])


def mark_of(row: Row) -> SaveMark:
    """Return the mark in a row of SELECT_MARKS."""
    return SaveMark(InstanceId(UUID(bytes=row[0])), *row[1:4])


def event_of(row: Row) -> Event:
    """Return the event in a row of SELECT_EVENTS."""
    event_id, time_us, actor_uid, kind, vtpm_name, vtpm_id, detail = row[:7]
    owner = None if vtpm_id is None else VtpmId(UUID(bytes=vtpm_id))
    return Event(_time(time_us), actor_uid, kind, vtpm_name, owner, detail, event_id)


def event_values_of(event: Event, head: bytes) -> Row:
    """Return the values for INSERT_EVENT."""
    return (
        event.event_id,
        microseconds(event.time),
        event.actor_uid,
        event.kind,
        event.vtpm_name,
        event.vtpm_id.bytes if event.vtpm_id else None,
        event.detail,
        head,
    )


def image_of(row: Row) -> LaunchImage:
    """Return the image in a row of SELECT_IMAGES."""
    return LaunchImage(row[0], row[1], row[2], row[3], ImageState(row[4]), _time(row[5]))


def image_values_of(image: LaunchImage) -> Row:
    """Return the values for REPLACE_IMAGE."""
    when_us = microseconds(image.changed_at)
    return (image.kind, image.measurement, image.label, image.engine_version, str(image.state), when_us)


def known_of(row: Row) -> KnownVtpm:
    """Return what is held in a row of SELECT_HOLDINGS."""
    vtpm_id, name, right, epoch, migration_id, peer, digest, mode, adopted = row
    holding = Holding(Right(right), epoch, migration_id, peer, digest, Mode(mode), adopted)
    return KnownVtpm(VtpmId(UUID(bytes=vtpm_id)), name, holding)


def known_values_of(known: KnownVtpm) -> Row:
    """Return the values for REPLACE_HOLDING."""
    holding = known.holding
    return (
        known.vtpm_id.bytes,
        known.name,
        holding.right.value,
        holding.epoch,
        holding.migration_id,
        holding.peer,
        holding.digest,
        holding.mode.value,
        holding.adopted,
    )


def _time(time_us: int) -> datetime:
    try:
        return _EPOCH + timedelta(microseconds=time_us)
    except OverflowError as error:
        raise ValueError(f"{time_us} is no time") from error
