"""The SQLite file of a vault with its ledger: opened verified, read, and changed together with the root record.

Every vTPM that a transaction touches is held against the tree before it is changed, so that an edit of the file under a
running manager is found and not signed. Imported by sqlite_store alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import NotFoundError, StateError, StoreError
from vtpm.secret import Secret
from vtpm.tpm.types import VtpmId
from vtpm.vault.entries import NO_EVENTS, StateEntry, entry_of, next_events_head
from vtpm.vault.launch_policy import LaunchImage, policy_leaf, with_image
from vtpm.vault.ledger import Draft, Ledger, check_events_end, first_record
from vtpm.vault.merkle import EMPTY_LEAF, POLICY_SLOT, leaf_hash
from vtpm.vault.records import Event, SaveMark, VtpmRecord
from vtpm.vault.root_record import (
    NOTHING_ANCHORED,
    AnchorValue,
    RootRecord,
    check_descends,
    decode,
    edited,
    missing,
)
from vtpm.vault.rules import check_event
from vtpm.vault.sqlite_file import (
    DATABASE_NAME,
    DOMAINS_OF_3,
    POLICY_SCHEMA,
    SCHEMA_VERSION,
    damaged,
    lock_directory,
    open_database,
    translated_errors,
)
from vtpm.vault.sqlite_rows import (
    INSERT_EVENT,
    REPLACE_IMAGE,
    SELECT_EVENTS_HEAD,
    SELECT_IMAGES,
    SELECT_MARKS,
    SELECT_RECORDS,
    SELECT_STATE_ENTRIES,
    Row,
    event_values_of,
    image_of,
    image_values_of,
    mark_of,
    record_of,
    state_entry_of,
)

_SLOT = -1
"""Place of the slot in a row of SELECT_RECORDS."""


@dataclass(frozen=True)
class Stored:
    """All that is stored of one vTPM but its envelopes.

    Args:
        states: by kind, ascending.
    """

    record: VtpmRecord
    states: Sequence[StateEntry]
    mark: SaveMark | None

    @property
    def leaf(self) -> bytes:
        """What stands for it in the tree."""
        return leaf_hash(entry_of(self.record, self.states, self.mark))


class Change:
    """One transaction under way: what it has touched, and what it has to say to the audit log.

    Args:
        db: inside a transaction.
        ledger: as it stands before this transaction.
        prompt: see AnchoredDatabase.changing; may be set while the transaction lasts.
    """

    def __init__(self, db: sqlite3.Connection, ledger: Ledger, name: str, prompt: bool) -> None:
        self.db = db
        self.prompt = prompt
        self._ledger = ledger
        self._name = name
        self._slots: dict[VtpmId, int] = {}
        self._written: dict[VtpmId, Stored] = {}
        self._images: Sequence[LaunchImage] | None = None
        self._events, self._events_head = ledger.record.events, ledger.record.events_head

    def vtpm(self, vtpm_id: VtpmId) -> VtpmRecord:
        """Return the record of a vTPM that may be changed now; see `all_of`."""
        return self.all_of(vtpm_id).record

    def all_of(self, vtpm_id: VtpmId) -> Stored:
        """Return what is stored of a vTPM that may be changed now, as it stands in this transaction.

        Raises:
            NotFoundError: there is none.
            StateError: its rows are not those that were written.
        """
        row = _row(self.db, vtpm_id)
        if row is None:
            raise NotFoundError(f"there is no vTPM {vtpm_id}")
        if vtpm_id in self._slots:
            self._written.pop(vtpm_id, None)
            return _stored(self.db, row)
        stored = _verified(self.db, row, self._ledger, self._name)
        self._slots[vtpm_id] = row[_SLOT]
        return stored

    def new_slot(self, vtpm_id: VtpmId) -> int:
        """Return the slot for a vTPM that is made in this transaction."""
        slot = self._ledger.free_slot()
        self._slots[vtpm_id] = slot
        return slot

    def wrote(self, stored: Stored) -> None:
        """Say what is stored of a vTPM by now, so that it need not be read again; forgotten at its next `all_of`."""
        self._written[stored.record.id] = stored

    def images(self) -> Sequence[LaunchImage]:
        """Return the launch policy. Raises StateError: its rows are not those that were written."""
        return find_images(self.db, self._ledger, self._name)

    def put_image(self, image: LaunchImage) -> None:
        """Add an image to the launch policy, or replace it. Raises as `images` and `with_image`."""
        self._images = with_image(self.images(), image)
        if not _has_images(self.db):
            self._upgrade()
        self.db.execute(REPLACE_IMAGE, image_values_of(image))

    def check_domain(self, domain: str) -> None:
        """See that the schema has this domain, which is about to be written."""
        if domain not in DOMAINS_OF_3:
            self._upgrade()

    def _upgrade(self) -> None:
        """Make a store of an older schema one of this: programs that know less refuse it from here on."""
        if not _has_images(self.db):
            self.db.execute(POLICY_SCHEMA)
        self.db.execute("UPDATE vault_schema SET version = ?", (SCHEMA_VERSION,))

    def append_event(self, event: Event) -> int:
        """Append to the audit log and return the event's id."""
        check_event(event)
        self._events += 1
        numbered = dataclasses.replace(event, event_id=self._events)
        self._events_head = next_events_head(self._events_head, numbered)
        self.db.execute(INSERT_EVENT, event_values_of(numbered, self._events_head))
        return self._events

    def draft(self, above: int | None = None) -> Draft | None:
        """Return what the ledger becomes, or None when nothing was changed. See Ledger.draft."""
        leaves = {}
        for vtpm_id, slot in self._slots.items():
            leaf = self._leaf(vtpm_id)
            if leaf != self._ledger.leaf(slot):
                leaves[slot] = leaf
        if self._images is not None and policy_leaf(self._images) != self._ledger.leaf(POLICY_SLOT):
            leaves[POLICY_SLOT] = policy_leaf(self._images)
        if not leaves and self._events == self._ledger.record.events and above is None:
            return None
        return self._ledger.draft(leaves, self._events, self._events_head, above or 0)

    def _leaf(self, vtpm_id: VtpmId) -> bytes:
        written = self._written.get(vtpm_id)
        if written is not None:
            return written.leaf
        row = _row(self.db, vtpm_id)
        return EMPTY_LEAF if row is None else _stored(self.db, row).leaf


class AnchoredDatabase:
    """See the module; locks the directory at once and holds the lock until `close`. Arguments as in SqliteStore."""

    ledger: Ledger

    def __init__(self, directory: Path, mac_key: Secret) -> None:
        self.path = directory / DATABASE_NAME
        self.transactions = 0
        self.prompt_version = 0
        self._directory = directory
        self._mac_key = mac_key
        self._db: sqlite3.Connection | None = None
        self._draft: Draft | None = None
        self._draft_is_prompt = False
        self._lock_fd = lock_directory(directory)

    def open(self, anchor: AnchorValue, accepting: Event | None) -> None:
        """Open and verify everything; see SqliteStore."""

        def first() -> bytes:
            # An operator accepts a store that is there; one that is gone is no store to accept.
            if anchor != NOTHING_ANCHORED or accepting is not None:
                raise missing(str(self.path), anchor)
            return first_record(self._mac_key).encode(self._mac_key)

        def verify(view: sqlite3.Connection) -> None:
            nonlocal accepting
            with self._ours():
                record = self._stored_record(view)
                leaves = _all_leaves(view, str(self.path))
                check_events_end(str(self.path), record, *_events_end(view))
                self.ledger = Ledger(str(self.path), record, leaves, anchor)
            try:
                check_descends(str(self.path), record, anchor)
            except StateError:
                if accepting is None:
                    raise
            else:
                if anchor != NOTHING_ANCHORED:
                    accepting = None

        self._db = open_database(self._directory, first, verify)
        with self.reading() as db:
            self._check_left(self._stored_record(db))
        if accepting is not None:
            with self.changing(accepting, above=anchor.version):
                pass

    def reopen(self) -> None:
        """Make a fresh connection, and find out whether the transaction that failed became durable."""

        def first() -> bytes:
            raise missing(str(self.path), self.ledger.record.base)

        # Closing is safe after a failed flush: SQLite counts the frames of a failed commit as never written.
        self._drop_connection()
        self._db = open_database(self._directory, first)
        try:
            with self.reading() as db:
                stored = self._stored_record(db)
            if self._draft is not None and stored == self._draft.record:
                self._adopt(self._draft)
            else:
                self._check_left(stored)
        except BaseException:
            self._drop_connection()
            raise
        self._draft = None

    def close(self) -> None:
        """Let go of file and lock; again does nothing."""
        self._drop_connection()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection, outside any transaction."""
        with self._ours():
            if self._db is None:
                raise StoreError(f"{self.path} is not open; nothing was acknowledged")
            yield self._db

    def vtpm(self, row: Row | None, name: object) -> VtpmRecord:
        """Return the record in a row of SELECT_RECORDS, verified.

        Args:
            name: of whom was asked for, for messages.
        Raises:
            NotFoundError: there is no row.
            StateError: its rows are not those that were written.
        """
        if row is None:
            raise NotFoundError(f"there is no vTPM {name}")
        with self.reading() as db:
            return _verified(db, row, self.ledger, str(self.path)).record

    @contextlib.contextmanager
    def changing(
        self, event: Event | None = None, *, prompt: bool = False, above: int | None = None
    ) -> Iterator[Change]:
        """Run one transaction: what is done within is durable on leaving, with its event and the root record.

        Args:
            prompt: whether the change, if it is one, must be anchored before it counts, however seldom others are.
            above: write a new record in any case, with a version above this one.
        """
        with self.reading() as db:
            self.transactions += 1
            db.execute("BEGIN IMMEDIATE")
            try:
                change = Change(db, self.ledger, str(self.path), prompt)
                yield change
                if event is not None:
                    change.append_event(event)
                draft = change.draft(above)
                if draft is not None:
                    db.execute("UPDATE root SET record = ?", (draft.record.encode(self._mac_key),))
                self._draft, self._draft_is_prompt = draft, change.prompt or above is not None
                db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors; if it cannot, reopening does.
                if db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                raise
            if draft is not None:
                self._adopt(draft)
            self._draft = None

    def _adopt(self, draft: Draft) -> None:
        self.ledger.adopt(draft)
        if self._draft_is_prompt:
            self.prompt_version = draft.record.version

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Turn what reading rows raises into a store's errors."""
        with translated_errors(self.path):
            try:
                yield
            except ValueError as error:
                # Values that no row of ours has.
                raise damaged(self.path, str(error)) from error

    def _check_left(self, stored: RootRecord) -> None:
        """Raise StateError unless this record is the one that was left, or verified, here."""
        if stored != self.ledger.record:
            left = self.ledger.record.value
            raise edited(str(self.path), f"it is at {stored.value}, and this manager left it at {left}")

    def _stored_record(self, db: sqlite3.Connection) -> RootRecord:
        row = db.execute("SELECT record FROM root").fetchone()
        return decode(str(self.path), row[0] if row else b"", self._mac_key)

    def _drop_connection(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            # A close that fails leaves the log behind, which the next opening reads.
            with contextlib.suppress(sqlite3.Error):
                db.close()


def find_images(db: sqlite3.Connection, ledger: Ledger, name: str) -> Sequence[LaunchImage]:
    """Return the launch policy, verified. Raises StateError: its rows are not those that were written."""
    images = _images(db)
    if policy_leaf(images) != ledger.leaf(POLICY_SLOT):
        raise edited(name, "its launch policy is not the one that was written")
    return images


def _has_images(db: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'launch_image'"
    return db.execute(query).fetchone() is not None


def _images(db: sqlite3.Connection) -> list[LaunchImage]:
    if not _has_images(db):
        return []
    return [image_of(row) for row in db.execute(SELECT_IMAGES + " ORDER BY kind, measurement")]


def _row(db: sqlite3.Connection, vtpm_id: VtpmId) -> Row | None:
    row: Row | None = db.execute(SELECT_RECORDS + " WHERE id = ?", (vtpm_id.bytes,)).fetchone()
    return row


def find_mark(db: sqlite3.Connection, id_bytes: bytes) -> SaveMark | None:
    """Return the mark of a vTPM's last save, or None."""
    row = db.execute(SELECT_MARKS + " WHERE vtpm_id = ?", (id_bytes,)).fetchone()
    return None if row is None else mark_of(row)


def _verified(db: sqlite3.Connection, row: Row, ledger: Ledger, name: str) -> Stored:
    stored = _stored(db, row)
    if stored.leaf != ledger.leaf(row[_SLOT]):
        raise edited(name, f"the rows of vTPM {stored.record.name} are not those that were written")
    return stored


def _stored(db: sqlite3.Connection, row: Row) -> Stored:
    """Return what is stored of the vTPM in this row, now."""
    states = db.execute(SELECT_STATE_ENTRIES + " WHERE vtpm_id = ? ORDER BY kind", (row[0],))
    return Stored(record_of(row), [state_entry_of(state) for state in states], find_mark(db, row[0]))


def _all_leaves(db: sqlite3.Connection, name: str) -> dict[int, bytes]:
    rows = db.execute(SELECT_STATE_ENTRIES + " ORDER BY vtpm_id, kind")
    states = {owner: [state_entry_of(row) for row in own] for owner, own in itertools.groupby(rows, lambda row: row[0])}
    marks = {row[4]: mark_of(row) for row in db.execute(SELECT_MARKS)}
    leaves = {
        row[_SLOT]: leaf_hash(entry_of(record_of(row), states.pop(row[0], ()), marks.pop(row[0], None)))
        for row in db.execute(SELECT_RECORDS)
    }
    if states or marks:
        raise edited(name, "it holds state of vTPMs that are not in its registry")
    if POLICY_SLOT in leaves:
        raise edited(name, "a vTPM has the slot of the launch policy")
    images = _images(db)
    return leaves | {POLICY_SLOT: policy_leaf(images)} if images else leaves


def _events_end(db: sqlite3.Connection) -> tuple[int, bytes]:
    row = db.execute(SELECT_EVENTS_HEAD + " ORDER BY event_id DESC LIMIT 1").fetchone()
    return row or (0, NO_EVENTS)
