"""The store on SQLite: embedded, no set-up, one process and one thread at a time.

Implements vtpm.vault.store.Store; see there for what each operation promises. Imported by the manager.
"""

from __future__ import annotations

import dataclasses
import secrets
import sqlite3
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path

from vtpm.errors import ConflictError, UsageError, VtpmError
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault.anchor import AnchorKeeper
from vtpm.vault.entries import NO_EVENTS, envelope_digest
from vtpm.vault.holding import Holding, KnownVtpm, Right
from vtpm.vault.launch_policy import LaunchImage, check_image
from vtpm.vault.ledger import check_event_follows
from vtpm.vault.records import (
    MAX_COUNTER,
    PERMIT_BYTES,
    Event,
    Permit,
    PermitState,
    SaveAck,
    SavedState,
    SaveEffect,
    SaveMark,
    SaveRequest,
    VtpmRecord,
)
from vtpm.vault.root_record import AnchorValue, edited
from vtpm.vault.rules import (
    check_bound,
    check_engine_version,
    check_may_run,
    check_never_saved,
    check_new_record,
    check_no_move,
    check_save,
    check_save_bounds,
    check_word,
    check_wrapped_key,
    is_replay,
)
from vtpm.vault.sqlite_anchored import AnchoredDatabase
from vtpm.vault.sqlite_change import Change, Stored, find_images, find_mark, put_state
from vtpm.vault.sqlite_file import damaged
from vtpm.vault.sqlite_moves import begin_anew, forget_deleted, held_now, move
from vtpm.vault.sqlite_rows import (
    INSERT_RECORD,
    REPLACE_MARK,
    SELECT_EVENTS,
    SELECT_EVENTS_HEAD,
    SELECT_RECORDS,
    SELECT_STATES,
    event_of,
    record_of,
    state_of,
    values_of,
)
from vtpm.vault.store import MAX_EVENTS_LISTED, MAX_EVENTS_SEARCHED, SaveOutcome


class SqliteStore:
    """A Store in one SQLite database.

    Opening verifies everything but the envelopes: pages, rows against the root record, the record against its MAC and
    the platform TPM's anchor. An envelope is held against its row whenever it is read.

    Args:
        directory: made with mode 0700 if it does not exist; its parent must.
        mac_key: of the root record, derived from the root key.
        keeper: asked what the anchor is, while the directory is locked.
        accepting: an operator's word, as an event for the audit log, that this store is to be accepted although it
            does not descend from the anchor. Rows and root record must fit one another all the same. It goes on
            with a version above the anchor's.
    Raises:
        StateError: the database or directory is damaged, of another schema or open to others; or older than the
            anchor, forked from it, edited, foreign or missing. What is there is left as it is.
        StoreError: another process uses it, or it cannot be reached at the moment.
        UnavailableError, PlatformTpmError: the anchor cannot be read.
    """

    def __init__(
        self, directory: Path, mac_key: Secret, keeper: AnchorKeeper, *, accepting: Event | None = None
    ) -> None:
        self._file = AnchoredDatabase(directory, mac_key)
        try:
            self.found_anchor = keeper.read()
            self._file.open(self.found_anchor, accepting)
        except BaseException:
            self._file.close()
            raise

    @property
    def value(self) -> AnchorValue:
        return self._file.ledger.record.value

    @property
    def prompt_version(self) -> int:
        return self._file.prompt_version

    @property
    def transactions(self) -> int:
        return self._file.transactions

    def set_ancestors(self, base: AnchorValue, attempted: AnchorValue) -> None:
        self._file.ledger.set_ancestors(base, attempted)

    def reopen(self) -> None:
        self._file.reopen()

    def close(self) -> None:
        self._file.close()

    def create_vtpm(
        self,
        record: VtpmRecord,
        states: Sequence[SavedState] = (),
        *,
        event: Event | None = None,
        max_owned: int | None = None,
    ) -> None:
        check_new_record(record, states)
        check_no_move(record.lifecycle)
        with self._file.changing(event, prompt=True) as change:
            db = change.db
            change.check_vacant(record)
            begin_anew(change, record)
            if max_owned is not None:
                (owned,) = db.execute("SELECT COUNT(*) FROM vtpm WHERE owner_uid = ?", (record.owner_uid,)).fetchone()
                if owned >= max_owned:
                    raise ConflictError(
                        f"uid {record.owner_uid} has {owned} vTPMs, and may have {max_owned}",
                        next_step="Delete one, or ask root for a greater max_vtpms_per_user in the configuration",
                    )
            change.check_domain(record.domain)
            db.execute(INSERT_RECORD, values_of(record, change.new_slot(record.id)))
            for state in states:
                put_state(db, state)

    def get_vtpm(self, vtpm_id: VtpmId) -> VtpmRecord:
        with self._file.reading() as db:
            return self._get(db, vtpm_id)

    def find_vtpm(self, name: str) -> VtpmRecord:
        with self._file.reading() as db:
            row = db.execute(SELECT_RECORDS + " WHERE name = ?", (name,)).fetchone()
            return self._file.vtpm(row, repr(name[:80]))

    def list_vtpms(
        self, *, owner_uid: int | None = None, after: str = "", limit: int | None = None
    ) -> Sequence[VtpmRecord]:
        owned, values = ("", ()) if owner_uid is None else ("owner_uid = ? AND ", (owner_uid,))
        query = SELECT_RECORDS + f" WHERE {owned}name > ? ORDER BY name LIMIT ?"
        with self._file.reading() as db:
            # SQLite takes a negative limit for none.
            return [record_of(row) for row in db.execute(query, (*values, after, -1 if limit is None else limit))]

    def count_vtpms(self) -> Mapping[int, int]:
        with self._file.reading() as db:
            return dict(db.execute("SELECT owner_uid, COUNT(*) FROM vtpm GROUP BY owner_uid"))

    def owned_by(self, owner_uid: int, vtpm_ids: Collection[VtpmId]) -> Set[VtpmId]:
        query = "SELECT 1 FROM vtpm WHERE id = ? AND owner_uid = ?"
        with self._file.reading() as db:
            return {vtpm_id for vtpm_id in vtpm_ids if db.execute(query, (vtpm_id.bytes, owner_uid)).fetchone()}

    def set_lifecycle(
        self, vtpm_id: VtpmId, lifecycle: str, *, expected: str | None = None, event: Event | None = None
    ) -> None:
        check_word(lifecycle)
        check_no_move(lifecycle)
        with self._file.changing(event) as change:
            record = change.vtpm(vtpm_id)
            check_may_run(record)
            if expected is not None and record.lifecycle != expected:
                raise ConflictError(f"vTPM {record.name} is {record.lifecycle}, not {expected}")
            change.db.execute("UPDATE vtpm SET lifecycle = ? WHERE id = ?", (lifecycle, vtpm_id.bytes))

    def set_wrapped_key(
        self, vtpm_id: VtpmId, wrapped_key: bytes, *, expected: bytes | None, event: Event | None = None
    ) -> None:
        check_wrapped_key(wrapped_key)
        with self._file.changing(event, prompt=True) as change:
            record = change.vtpm(vtpm_id)
            if record.wrapped_key != expected:
                raise ConflictError(f"vTPM {record.name} has another wrapped key than the one to replace")
            change.db.execute("UPDATE vtpm SET wrapped_key = ? WHERE id = ?", (wrapped_key, vtpm_id.bytes))

    def delete_vtpm(self, vtpm_id: VtpmId, *, event: Event | None = None) -> None:
        with self._file.changing(event, prompt=True) as change:
            record = change.vtpm(vtpm_id)
            if record.instance_id is not None:
                raise ConflictError(f"vTPM {record.name} has an instance", next_step="Stop it first.")
            check_may_run(record)
            forget_deleted(change, record)
            change.db.execute("DELETE FROM vtpm WHERE id = ?", (vtpm_id.bytes,))
        self._overwrite()

    def holding(self, vtpm_id: VtpmId) -> KnownVtpm:
        with self._file.changing() as change:
            return held_now(change, vtpm_id)

    def list_holdings(self) -> Sequence[KnownVtpm]:
        with self._file.reading() as db:
            known = self._file.holdings.verified(db, self._file.ledger, self._name)
            return sorted(known.values(), key=lambda one: one.vtpm_id.bytes)

    def record_move(
        self,
        vtpm_id: VtpmId,
        before: Holding,
        after: Holding,
        *,
        arriving: tuple[VtpmRecord, Sequence[SavedState]] | None = None,
        event: Event | None = None,
    ) -> None:
        with self._file.changing(event, prompt=True) as change:
            move(change, vtpm_id, before, after, arriving)
        if after.right in (Right.MOVED, Right.ABSENT):
            self._overwrite()

    def bind_instance(
        self,
        vtpm_id: VtpmId,
        instance_id: InstanceId,
        *,
        replaces: InstanceId | None = None,
        event: Event | None = None,
    ) -> None:
        with self._file.changing(event, prompt=True) as change:
            record = change.vtpm(vtpm_id)
            check_may_run(record)
            if record.instance_id not in (None, instance_id, replaces):
                raise ConflictError(f"vTPM {record.name} already has an instance, {record.instance_id}")
            if record.instance_id == instance_id:
                return
            # Earlier instances' saves are refused from here on, and this one has to load first.
            change.db.execute("DELETE FROM save_mark WHERE vtpm_id = ?", (vtpm_id.bytes,))
            try:
                change.db.execute(
                    "UPDATE vtpm SET instance_id = ?, engine_version = 0 WHERE id = ?",
                    (instance_id.bytes, vtpm_id.bytes),
                )
            except sqlite3.IntegrityError as error:
                raise ConflictError(f"instance {instance_id} is another vTPM's") from error

    def unbind_instance(self, vtpm_id: VtpmId, instance_id: InstanceId, *, event: Event | None = None) -> None:
        with self._file.changing(event, prompt=True) as change:
            record = change.vtpm(vtpm_id)
            if record.instance_id is not None:
                check_bound(record, instance_id)
                change.db.execute("UPDATE vtpm SET instance_id = NULL WHERE id = ?", (vtpm_id.bytes,))

    def issue_permit(self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int) -> bytes:
        check_engine_version(engine_version)
        with self._file.changing(prompt=True) as change:
            db, record = change.db, change.vtpm(vtpm_id)
            check_bound(record, instance_id)
            check_may_run(record)
            check_never_saved(record, self._states(db, vtpm_id))
            permit_id = record.permit.permit_id or secrets.token_bytes(PERMIT_BYTES)
            db.execute(
                "UPDATE vtpm SET permit_state = ?, permit_id = ?, engine_version = ? WHERE id = ?",
                (str(PermitState.ISSUED), permit_id, engine_version, vtpm_id.bytes),
            )
        return permit_id

    def read_state(self, vtpm_id: VtpmId) -> Sequence[SavedState]:
        with self._file.reading() as db:
            self._get(db, vtpm_id)
            return self._states(db, vtpm_id)

    def load_state(self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int) -> Sequence[SavedState]:
        check_engine_version(engine_version)
        with self._file.changing(prompt=True) as change:
            db, record = change.db, change.vtpm(vtpm_id)
            check_bound(record, instance_id)
            check_may_run(record)
            states = self._states(db, vtpm_id)
            kinds = {state.kind for state in states}
            if StateKind.PERMANENT not in kinds:
                check_never_saved(record, states)
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
        # The first state uses the permit up, and a permit must not come back.
        prompt = any(save.permit_id is not None for save in batch)
        with self._file.changing(prompt=prompt) as change:
            for save in batch:
                try:
                    stored = change.all_of(save.vtpm_id)
                    replayed = self._check(stored, save)
                except VtpmError as refusal:
                    # Nothing of it was written.
                    outcomes.append(refusal)
                    continue
                except ValueError as error:
                    # Its rows hold what no row of ours does; its siblings' saves stand all the same.
                    outcomes.append(damaged(self._file.path, f"rows of vTPM {save.vtpm_id}: {error}"))
                    continue
                if replayed is None:
                    self._write(change, stored, save)
                outcomes.append(replayed or SaveAck(SaveEffect.COMMITTED, save.version))
        return outcomes

    def last_save(self, vtpm_id: VtpmId) -> SaveMark | None:
        with self._file.reading() as db:
            return find_mark(db, vtpm_id.bytes)

    def list_images(self) -> Sequence[LaunchImage]:
        with self._file.reading() as db:
            return find_images(db, self._file.ledger, self._name)

    def put_image(self, image: LaunchImage, *, event: Event | None = None) -> None:
        check_image(image)
        with self._file.changing(event, prompt=True) as change:
            change.put_image(image)

    def append_event(self, event: Event) -> int:
        with self._file.changing() as change:
            return change.append_event(event)

    def list_events(self, after_id: int = 0, limit: int = 100) -> Sequence[Event]:
        if not (0 <= after_id <= MAX_COUNTER and 1 <= limit <= MAX_EVENTS_LISTED):
            raise UsageError(f"events after {after_id}, {limit} at most: 1 to {MAX_EVENTS_LISTED} can be listed")
        with self._file.reading() as db:
            head, events = _events_head(db, after_id), []
            rows = db.execute(SELECT_EVENTS + " WHERE event_id > ? ORDER BY event_id LIMIT ?", (after_id, limit))
            for row in rows:
                event, following = event_of(row), row[-1]
                check_event_follows(self._name, head, event, following)
                events.append(event)
                head = following
            return events

    def last_event(self, vtpm_id: VtpmId, kind: str) -> Event | None:
        with self._file.reading() as db:
            row = db.execute(
                SELECT_EVENTS + " WHERE event_id > ? AND vtpm_id = ? AND kind = ? ORDER BY event_id DESC LIMIT 1",
                (self._file.ledger.record.events - MAX_EVENTS_SEARCHED, vtpm_id.bytes, kind),
            ).fetchone()
            if row is None:
                return None
            event = event_of(row)
            check_event_follows(self._name, _events_head(db, event.event_id - 1), event, row[-1])
            return event

    def _check(self, stored: Stored, save: SaveRequest) -> SaveAck | None:
        """Return what answers a save that was committed already, None for one to be committed; raise the refusal."""
        check_save_bounds(save)
        check_bound(stored.record, save.instance_id)
        if stored.mark is not None and is_replay(stored.record, stored.mark, save):
            return SaveAck(SaveEffect.REPLAYED, stored.mark.version)
        check_may_run(stored.record)
        check_save(stored.record, save)
        return None

    def _write(self, change: Change, stored: Stored, save: SaveRequest) -> None:
        db, states = change.db, {state.kind: state for state in stored.states}
        # Volatile state older than the permanent one would give a guest back PCR values of an earlier moment.
        if save.kind is StateKind.PERMANENT and states.pop(StateKind.VOLATILE, None) is not None:
            self._delete_kind(db, save.vtpm_id, StateKind.VOLATILE)
        if save.envelope:
            state = SavedState(save.vtpm_id, save.kind, save.version, save.epoch, save.envelope)
            states[save.kind] = put_state(db, state)
        else:
            states.pop(save.kind, None)
            self._delete_kind(db, save.vtpm_id, save.kind)
        permit = Permit(PermitState.CONSUMED, stored.record.permit.permit_id)
        db.execute(
            "UPDATE vtpm SET state_version = ?, permit_state = ? WHERE id = ?",
            (save.version, str(permit.state), save.vtpm_id.bytes),
        )
        db.execute(
            REPLACE_MARK,
            (save.vtpm_id.bytes, save.instance_id.bytes, save.seq, save.digest, save.version),
        )
        record = dataclasses.replace(stored.record, state_version=save.version, permit=permit)
        mark = SaveMark(save.instance_id, save.seq, save.digest, save.version)
        change.wrote(Stored(record, [states[kind] for kind in sorted(states)], mark))

    @property
    def _name(self) -> str:
        return str(self._file.path)

    def _get(self, db: sqlite3.Connection, vtpm_id: VtpmId) -> VtpmRecord:
        row = db.execute(SELECT_RECORDS + " WHERE id = ?", (vtpm_id.bytes,)).fetchone()
        return self._file.vtpm(row, vtpm_id)

    def _states(self, db: sqlite3.Connection, vtpm_id: VtpmId) -> list[SavedState]:
        states = []
        for row in db.execute(SELECT_STATES + " WHERE vtpm_id = ? ORDER BY kind", (vtpm_id.bytes,)):
            state, digest = state_of(row), row[-1]
            if envelope_digest(state.envelope) != digest:
                raise edited(self._name, f"{state.kind.name.lower()} state of vTPM {vtpm_id} is not what was saved")
            states.append(state)
        return states

    def _overwrite(self) -> None:
        with self._file.reading() as db:
            # The log still holds the wrapped key's page; overwritten pages reach the file by this checkpoint.
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def _delete_kind(self, db: sqlite3.Connection, vtpm_id: VtpmId, kind: StateKind) -> None:
        db.execute("DELETE FROM state WHERE vtpm_id = ? AND kind = ?", (vtpm_id.bytes, kind))


def _events_head(db: sqlite3.Connection, event_id: int) -> bytes:
    """Return the head of the audit log as it was after this event."""
    row = db.execute(SELECT_EVENTS_HEAD + " WHERE event_id <= ? ORDER BY event_id DESC LIMIT 1", (event_id,)).fetchone()
    return row[1] if row else NO_EVENTS
