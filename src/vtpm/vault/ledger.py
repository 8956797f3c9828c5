"""What a store knows of its own root record and tree: as they stand, and as a transaction would make them.

A transaction drafts, writes the drafted record with its rows, and adopts the draft once it is durable; so what failed
leaves nothing behind here. No SQL. Imported by the stores.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID, uuid4

from vtpm.errors import StoreError
from vtpm.secret import Secret
from vtpm.vault.entries import NO_EVENTS, next_events_head
from vtpm.vault.merkle import EMPTY_LEAF, VTPM_SLOTS, MerkleTree
from vtpm.vault.records import Event
from vtpm.vault.root_record import NOTHING_ANCHORED, AnchorValue, RootRecord, edited, key_id_of


@dataclass(frozen=True)
class Draft:
    """What one transaction makes of the record and the tree."""

    record: RootRecord
    leaves: Mapping[int, bytes]
    nodes: Mapping[int, bytes]


class Ledger:
    """See the module.

    Args:
        name: of the store, for messages.
        record: as it was read and verified.
        leaves: of all vTPMs by slot, and of launch policy and holdings in theirs, made from the rows.
        base: what the platform TPM has.
    Raises:
        StateError: the rows are not those that the record stands for.
    """

    def __init__(self, name: str, record: RootRecord, leaves: Mapping[int, bytes], base: AnchorValue) -> None:
        self._name = name
        self.record = record
        self._tree = MerkleTree(leaves)
        if self._tree.root != record.tree:
            raise edited(name, "its rows are not those that its root record stands for")
        taken = {slot for slot in leaves if slot < VTPM_SLOTS}
        self._end = max(taken, default=-1) + 1
        self._holes = sorted(set(range(self._end)) - taken)
        self._base = self._attempted = base

    def leaf(self, slot: int) -> bytes:
        """Return the leaf in a slot."""
        return self._tree.leaf(slot)

    def free_slot(self) -> int:
        """Return the lowest slot that no vTPM has. Raises StoreError: there is none."""
        if self._holes:
            return self._holes[0]
        if self._end == VTPM_SLOTS:
            raise StoreError(f"{self._name} is full: it holds {VTPM_SLOTS} vTPMs")
        return self._end

    def set_ancestors(self, base: AnchorValue, attempted: AnchorValue) -> None:
        """Say what the next records descend from; see RootRecord."""
        self._base, self._attempted = base, attempted

    def draft(self, leaves: Mapping[int, bytes], events: int, events_head: bytes, above: int = 0) -> Draft:
        """Return what becomes of the record when these slots get these leaves.

        Args:
            events, events_head: as in RootRecord.
            above: a version that the new one is greater than, besides the present one.
        """
        nodes = self._tree.changed(leaves)
        record = dataclasses.replace(
            self.record,
            version=max(self.record.version, above) + 1,
            tree=nodes.get(1, self.record.tree),
            events=events,
            events_head=events_head,
            base=self._base,
            attempted=self._attempted,
        )
        return Draft(record, leaves, nodes)

    def adopt(self, draft: Draft) -> None:
        """Take over what is durable now."""
        self.record = draft.record
        self._tree.adopt(draft.nodes)
        for slot, leaf in draft.leaves.items():
            if slot >= VTPM_SLOTS:
                continue
            if leaf == EMPTY_LEAF:
                heapq.heappush(self._holes, slot)
            elif slot == self._end:
                self._end += 1
            elif self._holes and slot == self._holes[0]:
                heapq.heappop(self._holes)


def first_record(mac_key: Secret, store_id: UUID | None = None) -> RootRecord:
    """Return the record of a new, empty store."""
    return RootRecord(
        store_id or uuid4(),
        key_id_of(mac_key),
        1,
        MerkleTree({}).root,
        0,
        NO_EVENTS,
        NOTHING_ANCHORED,
        NOTHING_ANCHORED,
    )


def check_event_follows(name: str, head: bytes, event: Event, following: bytes) -> None:
    """Raise StateError unless `following` is the head of the audit log after this event, with `head` before it."""
    if next_events_head(head, event) != following:
        raise edited(name, f"event {event.event_id} of the audit log is not the one that was written")


def check_events_end(name: str, record: RootRecord, last_id: int, head: bytes) -> None:
    """Raise StateError unless the audit log ends with the event that the record names."""
    if (last_id, head) != (record.events, record.events_head):
        raise edited(name, f"its audit log ends with event {last_id}, its root record names {record.events}")
