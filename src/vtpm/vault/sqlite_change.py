"""One transaction on the SQLite file of a vault: what it touches is held against the ledger first, and drafts its next.

Every vTPM that a transaction touches is held against the tree before it is changed, so that an edit of the file under a
running manager is found and not signed. Imported by sqlite_anchored, sqlite_moves and sqlite_store.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtpm.errors import ConflictError, NotFoundError
from vtpm.tpm.types import VtpmId
from vtpm.vault.entries import StateEntry, entry_of, envelope_digest, next_events_head
from vtpm.vault.holding import MAX_ARRIVED, MAX_HOLDINGS, MAX_INERT_OF_ONE, KnownVtpm, Right, holdings_leaf
from vtpm.vault.launch_policy import LaunchImage, policy_leaf, with_image
from vtpm.vault.ledger import Draft, Ledger
from vtpm.vault.merkle import EMPTY_LEAF, HOLDINGS_SLOT, POLICY_SLOT, leaf_hash
from vtpm.vault.records import Event, SavedState, SaveMark, VtpmRecord
from vtpm.vault.root_record import edited
from vtpm.vault.rules import check_event
from vtpm.vault.sqlite_file import DOMAINS_OF_3, HOLDINGS_SCHEMA, POLICY_SCHEMA, SCHEMA_VERSION
from vtpm.vault.sqlite_rows import (
    INSERT_EVENT,
    REPLACE_HOLDING,
    REPLACE_IMAGE,
    REPLACE_STATE,
    SELECT_HOLDINGS,
    SELECT_IMAGES,
    SELECT_MARKS,
    SELECT_RECORDS,
    SELECT_STATE_ENTRIES,
    Row,
    event_values_of,
    image_of,
    image_values_of,
    known_of,
    known_values_of,
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


class HoldingsCache:
    """All holdings as they were verified last: a peer's every message asks for one, and all would be hashed for it."""

    def __init__(self) -> None:
        self._leaf: bytes | None = None
        self._known: Mapping[VtpmId, KnownVtpm] = {}

    def verified(self, db: sqlite3.Connection, ledger: Ledger, name: str) -> Mapping[VtpmId, KnownVtpm]:
        """Return them as the ledger stands for them. Raises StateError: their rows are not those that were written."""
        leaf = ledger.leaf(HOLDINGS_SLOT)
        if self._leaf != leaf:
            known = {one.vtpm_id: one for one in all_holdings(db)}
            if _leaf_of(known) != leaf:
                raise edited(name, "its holdings are not those that were written")
            self._leaf, self._known = leaf, known
        return self._known

    def adopt(self, known: Mapping[VtpmId, KnownVtpm], ledger: Ledger) -> None:
        """Take over what is durable now, and in the ledger."""
        self._leaf, self._known = ledger.leaf(HOLDINGS_SLOT), known


def _leaf_of(known: Mapping[VtpmId, KnownVtpm]) -> bytes:
    return holdings_leaf([known[vtpm_id] for vtpm_id in sorted(known, key=lambda one: one.bytes)])


class Change:
    """One transaction under way: what it has touched, and what it has to say to the audit log.

    Args:
        db: inside a transaction.
        ledger: as it stands before this transaction.
        holdings: as they were verified last.
        prompt: see AnchoredDatabase.changing; may be set while the transaction lasts.
    """

    def __init__(
        self, db: sqlite3.Connection, ledger: Ledger, holdings: HoldingsCache, name: str, prompt: bool
    ) -> None:
        self.db = db
        self.prompt = prompt
        self._ledger = ledger
        self._name = name
        self._slots: dict[VtpmId, int] = {}
        self._written: dict[VtpmId, Stored] = {}
        self._images: Sequence[LaunchImage] | None = None
        self.holdings_after: Mapping[VtpmId, KnownVtpm] | None = None
        """All holdings as this transaction makes them; None: it changes none."""
        self._holdings = holdings
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
        stored = verified(self.db, row, self._ledger, self._name)
        self._slots[vtpm_id] = row[_SLOT]
        return stored

    def check_vacant(self, record: VtpmRecord) -> None:
        """Raise ConflictError when there is a vTPM of this name or uuid."""
        same = self.db.execute("SELECT name FROM vtpm WHERE id = ?", (record.id.bytes,)).fetchone()
        if same:
            raise ConflictError(
                f"vTPM {same[0]} has the uuid {record.id} already", next_step="It is here: keep it, or delete it first."
            )
        if self.db.execute("SELECT 1 FROM vtpm WHERE name = ?", (record.name,)).fetchone():
            raise ConflictError(f"a vTPM {record.name} exists already", next_step="Choose another name.")

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
        if not has_table(self.db, "launch_image"):
            self._upgrade()
        self.db.execute(REPLACE_IMAGE, image_values_of(image))

    def holding(self, vtpm_id: VtpmId) -> KnownVtpm | None:
        """Return what is held of a vTPM that has ever moved. Raises StateError: its rows are not those written."""
        return self._known().get(vtpm_id)

    def _known(self) -> Mapping[VtpmId, KnownVtpm]:
        if self.holdings_after is not None:
            return self.holdings_after
        return self._holdings.verified(self.db, self._ledger, self._name)

    def put_holding(self, known: KnownVtpm) -> None:
        """Record what is held of a vTPM.

        Raises:
            ConflictError: there are MAX_HOLDINGS.
            StateError: see `holding`.
        """
        after = dict(self._known())
        if known.vtpm_id not in after:
            if not has_table(self.db, "holding"):
                self._upgrade()
            if len(after) >= MAX_HOLDINGS:
                raise ConflictError(f"this host knows {len(after)} vTPMs that have moved, and keeps no more")
        after[known.vtpm_id] = known
        self.holdings_after = after
        self.db.execute(REPLACE_HOLDING, known_values_of(known))

    def check_room(self, peer: str) -> None:
        """Raise ConflictError when nothing more may arrive from a peer: what waits here, or is known, is enough."""
        known = self._known()
        waiting = sum(one.holding.right is Right.INERT and one.holding.peer == peer for one in known.values())
        if waiting >= MAX_INERT_OF_ONE:
            raise ConflictError(f"{waiting} vTPMs of {peer} wait here for its word, and no more may")
        if len(known) >= MAX_ARRIVED:
            raise ConflictError(f"this host knows {len(known)} vTPMs that have moved, and takes none in any more")

    def check_domain(self, domain: str) -> None:
        """See that the schema has this domain, which is about to be written."""
        if domain not in DOMAINS_OF_3:
            self._upgrade()

    def _upgrade(self) -> None:
        """Make a store of an older schema one of this: programs that know less refuse it from here on."""
        for table, schema in (("launch_image", POLICY_SCHEMA), ("holding", HOLDINGS_SCHEMA)):
            if not has_table(self.db, table):
                self.db.execute(schema)
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
        if self.holdings_after is not None:
            # Not from the rows: what somebody has put among them is not to be signed with them.
            leaves[HOLDINGS_SLOT] = _leaf_of(self.holdings_after)
        if not leaves and self._events == self._ledger.record.events and above is None:
            return None
        return self._ledger.draft(leaves, self._events, self._events_head, above or 0)

    def _leaf(self, vtpm_id: VtpmId) -> bytes:
        written = self._written.get(vtpm_id)
        if written is not None:
            return written.leaf
        row = _row(self.db, vtpm_id)
        return EMPTY_LEAF if row is None else _stored(self.db, row).leaf


def find_images(db: sqlite3.Connection, ledger: Ledger, name: str) -> Sequence[LaunchImage]:
    """Return the launch policy, verified. Raises StateError: its rows are not those that were written."""
    images = all_images(db)
    if policy_leaf(images) != ledger.leaf(POLICY_SLOT):
        raise edited(name, "its launch policy is not the one that was written")
    return images


def has_table(db: sqlite3.Connection, table: str) -> bool:
    """Whether the database has a table, which those of older schemas may not have."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone() is not None


def all_holdings(db: sqlite3.Connection) -> list[KnownVtpm]:
    """Return all holdings as they are read, not verified."""
    if not has_table(db, "holding"):
        return []
    return [known_of(row) for row in db.execute(SELECT_HOLDINGS + " ORDER BY vtpm_id")]


def all_images(db: sqlite3.Connection) -> list[LaunchImage]:
    """Return the launch policy as it is read, not verified."""
    if not has_table(db, "launch_image"):
        return []
    return [image_of(row) for row in db.execute(SELECT_IMAGES + " ORDER BY kind, measurement")]


def _row(db: sqlite3.Connection, vtpm_id: VtpmId) -> Row | None:
    row: Row | None = db.execute(SELECT_RECORDS + " WHERE id = ?", (vtpm_id.bytes,)).fetchone()
    return row


def find_mark(db: sqlite3.Connection, id_bytes: bytes) -> SaveMark | None:
    """Return the mark of a vTPM's last save, or None."""
    row = db.execute(SELECT_MARKS + " WHERE vtpm_id = ?", (id_bytes,)).fetchone()
    return None if row is None else mark_of(row)


def put_state(db: sqlite3.Connection, state: SavedState) -> StateEntry:
    """Write one saved state in the place of what there is of its kind, and return what its vTPM's entry says of it."""
    digest = envelope_digest(state.envelope)
    db.execute(REPLACE_STATE, (state.vtpm_id.bytes, state.kind, state.version, state.epoch, digest, state.envelope))
    return StateEntry(state.kind, state.epoch, state.version, digest)


def verified(db: sqlite3.Connection, row: Row, ledger: Ledger, name: str) -> Stored:
    """Return what is stored of the vTPM in a row of SELECT_RECORDS. Raises StateError: it is not what was written."""
    stored = _stored(db, row)
    if stored.leaf != ledger.leaf(row[_SLOT]):
        raise edited(name, f"the rows of vTPM {stored.record.name} are not those that were written")
    return stored


def _stored(db: sqlite3.Connection, row: Row) -> Stored:
    """Return what is stored of the vTPM in this row, now."""
    states = db.execute(SELECT_STATE_ENTRIES + " WHERE vtpm_id = ? ORDER BY kind", (row[0],))
    return Stored(record_of(row), [state_entry_of(state) for state in states], find_mark(db, row[0]))
