"""The SQLite file of a vault with its ledger: opened verified, read, and changed together with the root record.

Imported by sqlite_store alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from vtpm.errors import NotFoundError, StateError, StoreError
from vtpm.secret import Secret
from vtpm.vault.entries import NO_EVENTS
from vtpm.vault.holding import holdings_leaf
from vtpm.vault.launch_policy import policy_leaf
from vtpm.vault.ledger import Draft, Ledger, check_events_end, first_record
from vtpm.vault.merkle import EMPTY_LEAF, HOLDINGS_SLOT, POLICY_SLOT, VTPM_SLOTS
from vtpm.vault.records import Event, VtpmRecord
from vtpm.vault.root_record import (
    NOTHING_ANCHORED,
    AnchorValue,
    RootRecord,
    check_descends,
    decode,
    edited,
    missing,
)
from vtpm.vault.sqlite_change import Change, HoldingsCache, Stored, all_holdings, all_images, verified
from vtpm.vault.sqlite_file import DATABASE_NAME, damaged, lock_directory, open_database, translated_errors
from vtpm.vault.sqlite_rows import (
    SELECT_EVENTS_HEAD,
    SELECT_MARKS,
    SELECT_RECORDS,
    SELECT_STATE_ENTRIES,
    Row,
    mark_of,
    record_of,
    state_entry_of,
)


class AnchoredDatabase:
    """See the module; locks the directory at once and holds the lock until `close`. Arguments as in SqliteStore."""

    ledger: Ledger

    def __init__(self, directory: Path, mac_key: Secret) -> None:
        self.path = directory / DATABASE_NAME
        self.holdings = HoldingsCache()
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
            return verified(db, row, self.ledger, str(self.path)).record

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
                change = Change(db, self.ledger, self.holdings, str(self.path), prompt)
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
                if change.holdings_after is not None:
                    self.holdings.adopt(change.holdings_after, self.ledger)
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


def _all_leaves(db: sqlite3.Connection, name: str) -> dict[int, bytes]:
    rows = db.execute(SELECT_STATE_ENTRIES + " ORDER BY vtpm_id, kind")
    states = {owner: [state_entry_of(row) for row in own] for owner, own in itertools.groupby(rows, lambda row: row[0])}
    marks = {row[4]: mark_of(row) for row in db.execute(SELECT_MARKS)}
    leaves = {
        row[-1]: Stored(record_of(row), states.pop(row[0], ()), marks.pop(row[0], None)).leaf
        for row in db.execute(SELECT_RECORDS)
    }
    if states or marks:
        raise edited(name, "it holds state of vTPMs that are not in its registry")
    if any(slot >= VTPM_SLOTS for slot in leaves):
        raise edited(name, "a vTPM has the slot of the launch policy or of the holdings")
    others = {POLICY_SLOT: policy_leaf(all_images(db)), HOLDINGS_SLOT: holdings_leaf(all_holdings(db))}
    return leaves | {slot: leaf for slot, leaf in others.items() if leaf != EMPTY_LEAF}


def _events_end(db: sqlite3.Connection) -> tuple[int, bytes]:
    row = db.execute(SELECT_EVENTS_HEAD + " ORDER BY event_id DESC LIMIT 1").fetchone()
    return row or (0, NO_EVENTS)
