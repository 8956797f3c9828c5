"""What a change of a vTPM's holding does to its rows, within one transaction. Imported by sqlite_store alone."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Sequence

from vtpm.errors import ConflictError, NotFoundError, UsageError
from vtpm.tpm.types import StateKind, VtpmId
from vtpm.vault.holding import NOWHERE, Holding, KnownVtpm, Right, check_change, check_holding
from vtpm.vault.records import SavedState, VtpmRecord
from vtpm.vault.rules import FROZEN, INERT, RUNNING, STOPPED, check_new_record
from vtpm.vault.sqlite_change import Change, put_state
from vtpm.vault.sqlite_rows import INSERT_RECORD, values_of
from vtpm.wire.migration import Mode


def held_now(change: Change, vtpm_id: VtpmId) -> KnownVtpm:
    """Return what this host holds of a vTPM, verified; one that never moved is held under its own epoch.

    Raises:
        StateError: rows are not those that were written.
    """
    known = change.holding(vtpm_id)
    if known is not None:
        return known
    try:
        record = change.vtpm(vtpm_id)
    except NotFoundError:
        return KnownVtpm(vtpm_id, "", NOWHERE)
    return KnownVtpm(vtpm_id, record.name, Holding(Right.HELD, record.epoch))


def move(
    change: Change,
    vtpm_id: VtpmId,
    before: Holding,
    after: Holding,
    arriving: tuple[VtpmRecord, Sequence[SavedState]] | None,
) -> None:
    """Change a holding and all that depends on it. See Store.record_move."""
    known = held_now(change, vtpm_id)
    if known.holding != before:
        raise ConflictError(f"vTPM {known.name or vtpm_id} is {known.holding.right.value} here by now: try again")
    check_change(before, after)
    if (arriving is not None) != (after.right is Right.INERT):
        raise UsageError("a vTPM arrives with its state when it becomes inert, and only then")
    name = known.name
    check_holding(name or vtpm_id, after)
    if arriving is not None:
        name = _arrive(change, vtpm_id, after, *arriving)
    elif (before.right, after.right) != (Right.MOVED, Right.MOVED):
        _settle(change, change.vtpm(vtpm_id), before, after)
    change.put_holding(KnownVtpm(vtpm_id, name, after))


def _arrive(change: Change, vtpm_id: VtpmId, after: Holding, record: VtpmRecord, states: Sequence[SavedState]) -> str:
    check_new_record(record, states, moving=True)
    change.check_room(after.peer)
    if (record.id, record.epoch, record.lifecycle) != (vtpm_id, after.epoch, INERT) or not states:
        raise UsageError(f"vTPM {record.name} does not arrive as what it was sent as")
    change.check_vacant(record)
    change.check_domain(record.domain)
    try:
        change.db.execute(INSERT_RECORD, values_of(record, change.new_slot(record.id)))
    except sqlite3.IntegrityError as error:
        raise ConflictError(f"vTPM {record.name} arrives for an instance that is another vTPM's") from error
    for state in states:
        put_state(change.db, state)
    return record.name


def _settle(change: Change, record: VtpmRecord, before: Holding, after: Holding) -> None:
    match after.right:
        case Right.FROZEN:
            # Its instance, if it has one, stays bound: it may go on should the move be aborted. Nothing is taken of it.
            running = after.mode is not Mode.STOPPED and record.instance_id is not None
            lifecycle, from_ = FROZEN, record.lifecycle if running else STOPPED
            if record.instance_id is not None and not running:
                raise ConflictError(f"vTPM {record.name} has an instance", next_step="Stop it first")
        case Right.HELD:
            # An instance that is bound has stood still with the guest's whole TPM in it, and goes on.
            lifecycle = STOPPED if record.instance_id is None else RUNNING
            from_ = FROZEN if before.right is Right.FROZEN else INERT
            if from_ == INERT and before.mode is not Mode.STOPPED:
                _drop_volatile(change, record)
        case _:
            # Moved, or discarded: key and state go with the row.
            change.db.execute("DELETE FROM vtpm WHERE id = ?", (record.id.bytes,))
            return
    if record.lifecycle != from_:
        raise ConflictError(f"vTPM {record.name} is {record.lifecycle}, not {from_}", next_step="Stop it first")
    change.db.execute(
        "UPDATE vtpm SET lifecycle = ?, epoch = ? WHERE id = ?", (lifecycle, after.epoch, record.id.bytes)
    )


def _drop_volatile(change: Change, record: VtpmRecord) -> None:
    """Forget PCRs and sessions that came with a guest: its instance has them, or is no more with them."""
    gone = change.db.execute("DELETE FROM state WHERE vtpm_id = ? AND kind = ?", (record.id.bytes, StateKind.VOLATILE))
    if gone.rowcount:
        change.db.execute("UPDATE vtpm SET state_version = state_version + 1 WHERE id = ?", (record.id.bytes,))


def forget_deleted(change: Change, record: VtpmRecord) -> None:
    """Keep the epoch of a vTPM that is deleted, if it ever moved: no host gives it back under one that has passed."""
    known = change.holding(record.id)
    if known is not None:
        gone = Holding(Right.ABSENT, record.epoch, adopted=known.holding.adopted)
        change.put_holding(dataclasses.replace(known, holding=gone))


def begin_anew(change: Change, record: VtpmRecord) -> None:
    """See that a vTPM that is registered begins in an epoch that has not passed here. Raises ConflictError: it has."""
    known = change.holding(record.id)
    if known is None:
        return
    holding = known.holding
    if holding.epoch >= record.epoch:
        raise ConflictError(
            f"vTPM {record.name} would begin with epoch {record.epoch}, and {holding.epoch} has passed here"
        )
    if holding.right is Right.MOVED and holding.migration_id:
        # It may wait there for a word that it would never get, or get the wrong one.
        raise ConflictError(
            f"vTPM {record.name} has moved to {holding.peer}, which has not said yet that it is active there",
            next_step="Wait until vtpm migrate --status says that it is over",
        )
    begun = Holding(Right.HELD, record.epoch, adopted=holding.adopted)
    change.put_holding(KnownVtpm(record.id, record.name, begun))
