"""The store on SQLite: embedded, no set-up, one process and one thread at a time.

Implements vtpm.vault.store.Store; see there for what each operation promises. Imported by the manager.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from vtpm.errors import ConflictError, NotFoundError, StoreError, UsageError, VtpmError
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault.records import (
    MAX_COUNTER,
    PERMIT_BYTES,
    Event,
    PermitState,
    SaveAck,
    SavedState,
    SaveEffect,
    SaveMark,
    SaveRequest,
    VtpmRecord,
)
from vtpm.vault.rules import (
    check_bound,
    check_engine_version,
    check_event,
    check_never_saved,
    check_new_record,
    check_save,
    check_save_bounds,
    check_word,
    check_wrapped_key,
    is_replay,
)
from vtpm.vault.sqlite_file import (
    DATABASE_NAME,
    Check,
    damaged,
    lock_directory,
    open_database,
    translated_errors,
)
from vtpm.vault.sqlite_rows import (
    INSERT_EVENT,
    INSERT_RECORD,
    REPLACE_MARK,
    REPLACE_STATE,
    SELECT_EVENTS,
    SELECT_MARKS,
    SELECT_RECORDS,
    SELECT_STATES,
    event_of,
    mark_of,
    microseconds,
    record_of,
    state_of,
    values_of,
)
from vtpm.vault.store import MAX_EVENTS_SEARCHED, SaveOutcome

MAX_EVENTS_LISTED = 1000


class SqliteStore:
    """A Store in one SQLite database.

    Args:
        directory: made with mode 0700 if it does not exist; its parent must.
    Raises:
        StateError: the database or directory is damaged, foreign, newer or open to others.
        StoreError: another process uses it, or it cannot be reached at the moment.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / DATABASE_NAME
        self._lock_fd = lock_directory(directory)
        try:
            self._db: sqlite3.Connection | None = open_database(directory, Check.ALL_PAGES)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def reopen(self) -> None:
        # Closing is safe after a failed flush: SQLite counts the frames of a failed commit as never written.
        self._drop_connection()
        self._db = open_database(self._directory, Check.SCHEMA)

    def close(self) -> None:
        self._drop_connection()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def create_vtpm(self, record: VtpmRecord, *, event: Event | None = None) -> None:
        check_new_record(record)
        with self._transaction(event) as db:
            taken = db.execute("SELECT 1 FROM vtpm WHERE name = ? OR id = ?", (record.name, record.id.bytes)).fetchone()
            if taken:
                raise ConflictError(f"a vTPM {record.name} exists already", next_step="Choose another name.")
            db.execute(INSERT_RECORD, values_of(record))

    def get_vtpm(self, vtpm_id: VtpmId) -> VtpmRecord:
        with self._reading() as db:
            return self._get(db, vtpm_id)

    def find_vtpm(self, name: str) -> VtpmRecord:
        with self._reading() as db:
            row = db.execute(SELECT_RECORDS + " WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise NotFoundError(f"there is no vTPM {name[:80]!r}")
            return record_of(row)

    def list_vtpms(self) -> Sequence[VtpmRecord]:
        with self._reading() as db:
            return [record_of(row) for row in db.execute(SELECT_RECORDS + " ORDER BY name")]

    def set_lifecycle(
        self, vtpm_id: VtpmId, lifecycle: str, *, expected: str | None = None, event: Event | None = None
    ) -> None:
        check_word(lifecycle)
        with self._transaction(event) as db:
            record = self._get(db, vtpm_id)
            if expected is not None and record.lifecycle != expected:
                raise ConflictError(f"vTPM {record.name} is {record.lifecycle}, not {expected}")
            db.execute("UPDATE vtpm SET lifecycle = ? WHERE id = ?", (lifecycle, vtpm_id.bytes))

    def set_wrapped_key(
        self, vtpm_id: VtpmId, wrapped_key: bytes, *, expected: bytes | None, event: Event | None = None
    ) -> None:
        check_wrapped_key(wrapped_key)
        with self._transaction(event) as db:
            record = self._get(db, vtpm_id)
            if record.wrapped_key != expected:
                raise ConflictError(f"vTPM {record.name} has another wrapped key than the one to replace")
            db.execute("UPDATE vtpm SET wrapped_key = ? WHERE id = ?", (wrapped_key, vtpm_id.bytes))

    def delete_vtpm(self, vtpm_id: VtpmId, *, event: Event | None = None) -> None:
        with self._transaction(event) as db:
            record = self._get(db, vtpm_id)
            if record.instance_id is not None:
                raise ConflictError(f"vTPM {record.name} has an instance", next_step="Stop it first.")
            db.execute("DELETE FROM vtpm WHERE id = ?", (vtpm_id.bytes,))
        with self._reading() as db:
            # The log still holds the wrapped key's page; overwritten pages reach the file by this checkpoint.
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def bind_instance(
        self,
        vtpm_id: VtpmId,
        instance_id: InstanceId,
        *,
        replaces: InstanceId | None = None,
        event: Event | None = None,
    ) -> None:
        with self._transaction(event) as db:
            record = self._get(db, vtpm_id)
            if record.instance_id not in (None, instance_id, replaces):
                raise ConflictError(f"vTPM {record.name} already has an instance, {record.instance_id}")
            if record.instance_id == instance_id:
                return
            # Earlier instances' saves are refused from here on, and this one has to load first.
            db.execute("DELETE FROM save_mark WHERE vtpm_id = ?", (vtpm_id.bytes,))
            try:
                db.execute(
                    "UPDATE vtpm SET instance_id = ?, engine_version = 0 WHERE id = ?",
                    (instance_id.bytes, vtpm_id.bytes),
                )
            except sqlite3.IntegrityError as error:
                raise ConflictError(f"instance {instance_id} is another vTPM's") from error

    def unbind_instance(self, vtpm_id: VtpmId, instance_id: InstanceId, *, event: Event | None = None) -> None:
        with self._transaction(event) as db:
            record = self._get(db, vtpm_id)
            if record.instance_id is not None:
                check_bound(record, instance_id)
                db.execute("UPDATE vtpm SET instance_id = NULL WHERE id = ?", (vtpm_id.bytes,))

    def issue_permit(self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int) -> bytes:
        check_engine_version(engine_version)
        with self._transaction() as db:
            record = self._get(db, vtpm_id)
            check_bound(record, instance_id)
            check_never_saved(record, self._states(db, vtpm_id))
            permit_id = record.permit.permit_id or secrets.token_bytes(PERMIT_BYTES)
            db.execute(
                "UPDATE vtpm SET permit_state = ?, permit_id = ?, engine_version = ? WHERE id = ?",
                (str(PermitState.ISSUED), permit_id, engine_version, vtpm_id.bytes),
            )
        return permit_id

    def read_state(self, vtpm_id: VtpmId) -> Sequence[SavedState]:
        with self._reading() as db:
            self._get(db, vtpm_id)
            return self._states(db, vtpm_id)

    def load_state(self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int) -> Sequence[SavedState]:
        check_engine_version(engine_version)
        with self._transaction() as db:
            record = self._get(db, vtpm_id)
            check_bound(record, instance_id)
            states = self._states(db, vtpm_id)
            kinds = {state.kind for state in states}
            if StateKind.PERMANENT not in kinds:
                check_never_saved(record, self._states(db, vtpm_id))
            version = record.state_version
            if StateKind.VOLATILE in kinds:
                version += 1
                self._delete_kind(db, vtpm_id, StateKind.VOLATILE)
            db.execute(
                "UPDATE vtpm SET state_version = ?, engine_version = ? WHERE id = ?",
                (version, engine_version, vtpm_id.bytes),
            )
        return states

    def commit_saves(self, batch: Sequence[SaveRequest]) -> Sequence[SaveOutcome]:
        outcomes: list[SaveOutcome] = []
        with self._transaction() as db:
            for save in batch:
                db.execute("SAVEPOINT one_save")
                try:
                    outcomes.append(self._apply(db, save))
                except VtpmError as refusal:
                    db.execute("ROLLBACK TO one_save")
                    outcomes.append(refusal)
                db.execute("RELEASE one_save")
        return outcomes

    def last_save(self, vtpm_id: VtpmId) -> SaveMark | None:
        with self._reading() as db:
            return self._mark(db, vtpm_id)

    def append_event(self, event: Event) -> int:
        with self._transaction() as db:
            return self._insert_event(db, event)

    def list_events(self, after_id: int = 0, limit: int = 100) -> Sequence[Event]:
        if not (0 <= after_id <= MAX_COUNTER and 1 <= limit <= MAX_EVENTS_LISTED):
            raise UsageError(f"events after {after_id}, {limit} at most: 1 to {MAX_EVENTS_LISTED} can be listed")
        with self._reading() as db:
            rows = db.execute(
                SELECT_EVENTS + " WHERE event_id > ? ORDER BY event_id LIMIT ?",
                (after_id, limit),
            )
            return [event_of(row) for row in rows]

    def last_event(self, vtpm_id: VtpmId, kind: str) -> Event | None:
        with self._reading() as db:
            newest = db.execute("SELECT coalesce(max(event_id), 0) FROM event").fetchone()[0]
            row = db.execute(
                SELECT_EVENTS + " WHERE event_id > ? AND vtpm_id = ? AND kind = ? ORDER BY event_id DESC LIMIT 1",
                (newest - MAX_EVENTS_SEARCHED, vtpm_id.bytes, kind),
            ).fetchone()
            return event_of(row) if row else None

    def _apply(self, db: sqlite3.Connection, save: SaveRequest) -> SaveAck:
        """Check one save against the record as it stands in this transaction, then write it."""
        check_save_bounds(save)
        record = self._get(db, save.vtpm_id)
        check_bound(record, save.instance_id)
        mark = self._mark(db, save.vtpm_id)
        if mark is not None and is_replay(record, mark, save):
            return SaveAck(SaveEffect.REPLAYED, mark.version)
        check_save(record, save)
        # Volatile state older than the permanent one would give a guest back PCR values of an earlier moment.
        if save.kind is StateKind.PERMANENT:
            self._delete_kind(db, save.vtpm_id, StateKind.VOLATILE)
        if save.envelope:
            db.execute(
                REPLACE_STATE,
                (save.vtpm_id.bytes, save.kind, save.version, save.epoch, save.envelope),
            )
        else:
            self._delete_kind(db, save.vtpm_id, save.kind)
        db.execute(
            "UPDATE vtpm SET state_version = ?, permit_state = ? WHERE id = ?",
            (save.version, str(PermitState.CONSUMED), save.vtpm_id.bytes),
        )
        db.execute(
            REPLACE_MARK,
            (save.vtpm_id.bytes, save.instance_id.bytes, save.seq, save.digest, save.version),
        )
        return SaveAck(SaveEffect.COMMITTED, save.version)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with translated_errors(self._path):
            if self._db is None:
                raise StoreError(f"{self._path} is not open; nothing was acknowledged")
            try:
                yield self._db
            except ValueError as error:
                # Values that no row of ours has.
                raise damaged(self._path, str(error)) from error

    @contextlib.contextmanager
    def _transaction(self, event: Event | None = None) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                if event is not None:
                    self._insert_event(db, event)
                db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors; if it cannot, reopening does.
                if db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                raise

    def _drop_connection(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            # A close that fails leaves the log behind, which the next opening reads.
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _get(self, db: sqlite3.Connection, vtpm_id: VtpmId) -> VtpmRecord:
        row = db.execute(SELECT_RECORDS + " WHERE id = ?", (vtpm_id.bytes,)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no vTPM {vtpm_id}")
        return record_of(row)

    def _states(self, db: sqlite3.Connection, vtpm_id: VtpmId) -> list[SavedState]:
        rows = db.execute(
            SELECT_STATES + " WHERE vtpm_id = ? ORDER BY kind",
            (vtpm_id.bytes,),
        )
        return [state_of(row) for row in rows]

    def _mark(self, db: sqlite3.Connection, vtpm_id: VtpmId) -> SaveMark | None:
        row = db.execute(SELECT_MARKS + " WHERE vtpm_id = ?", (vtpm_id.bytes,)).fetchone()
        return None if row is None else mark_of(row)

    def _delete_kind(self, db: sqlite3.Connection, vtpm_id: VtpmId, kind: StateKind) -> None:
        db.execute("DELETE FROM state WHERE vtpm_id = ? AND kind = ?", (vtpm_id.bytes, kind))

    def _insert_event(self, db: sqlite3.Connection, event: Event) -> int:
        check_event(event)
        cursor = db.execute(
            INSERT_EVENT,
            (
                microseconds(event.time),
                event.actor_uid,
                event.kind,
                event.vtpm_name,
                event.vtpm_id.bytes if event.vtpm_id else None,
                event.detail,
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid
