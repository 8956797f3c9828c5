"""The tree and the record that a store keeps in memory equal those made anew from its rows, whatever was done."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.unit.vault.world import CREATED, ENGINE, MAC_KEY, Bound, MemoryKeeper, new_record, open_store
from vtpm.errors import StoreError, VtpmError
from vtpm.tpm.types import InstanceId, StateKind
from vtpm.vault.ledger import first_record
from vtpm.vault.merkle import DEPTH, EMPTY_LEAF, MAX_SLOTS, MerkleTree, leaf_hash
from vtpm.vault.records import Event, SaveAck
from vtpm.vault.sqlite_anchored import _all_leaves
from vtpm.vault.sqlite_store import SqliteStore


def root_by_recursion(leaves: dict[int, bytes], height: int = DEPTH, first: int = 0) -> bytes:
    """The tree's root, straight from its definition."""
    inside = {slot: leaf for slot, leaf in leaves.items() if first <= slot < first + (1 << height)}
    if height == 0:
        return inside.get(first, bytes(32))
    if not inside:
        empty = bytes(32)
        for _ in range(height):
            empty = hashlib.sha256(b"\x01" + empty + empty).digest()
        return empty
    middle = first + (1 << (height - 1))
    left, right = (root_by_recursion(inside, height - 1, begin) for begin in (first, middle))
    return hashlib.sha256(b"\x01" + left + right).digest()


@pytest.mark.parametrize("slots", [[], [0], [MAX_SLOTS - 1], [0, 1, 2], [5, 999_999, MAX_SLOTS - 1], list(range(33))])
def test_tree_is_that_of_its_definition_when_made_and_when_changed(slots: list[int]) -> None:
    leaves = {slot: leaf_hash(b"entry %d" % slot) for slot in slots}
    tree = MerkleTree({})
    assert tree.root == root_by_recursion({})
    for slot, leaf in leaves.items():
        tree.adopt(tree.changed({slot: leaf}))
    assert tree.root == MerkleTree(leaves).root == root_by_recursion(leaves)
    assert [tree.leaf(slot) for slot in slots] == list(leaves.values())
    tree.adopt(tree.changed(dict.fromkeys(slots, EMPTY_LEAF)))
    assert tree.root == root_by_recursion({})
    assert tree._nodes == {}


def test_change_costs_the_same_however_many_leaves_there_are() -> None:
    small, large = (MerkleTree({slot: leaf_hash(b"%d" % slot) for slot in range(count)}) for count in (10, 5000))
    assert len(small.changed({3: leaf_hash(b"new")})) == len(large.changed({3: leaf_hash(b"new")})) == DEPTH + 1


class FailingConnection:
    """SQLite's connection, whose COMMIT fails on demand, before or after it is carried out."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.fail: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self.fail is not None:
            if self.fail == "after":
                self._db.execute(statement)
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            error.sqlite_errorname = "SQLITE_IOERR"
            raise error
        return self._db.execute(statement, *values)


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of operations on a store: done, refused, failed before or after the commit, across reopenings."""

    vtpms = Bundle("vtpms")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="vtpm-ledger-"))
        self.keeper = MemoryKeeper()
        self.store = open_store(self.folder / "vault", self.keeper)
        self.names = iter(range(1 << 30))

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def attempt(self, operation: Callable[[SqliteStore], object], fault: str | None) -> object:
        """Do it, with the commit failing if asked; returns the result, or None when there was none."""
        file = self.store._file
        assert file._db is not None
        if fault is None:
            with contextlib.suppress(VtpmError):
                return operation(self.store)
            return None
        failing = FailingConnection(file._db)
        failing.fail = fault
        file._db = failing  # type: ignore[assignment]
        before = self.store.value
        try:
            result = operation(self.store)
        except StoreError:
            assert self.store.value == before
            self.store.reopen()
            return None
        except VtpmError:
            result = None
        file._db = failing._db
        return result

    faults = st.sampled_from([None, None, None, "before", "after"])

    @initialize(target=vtpms)
    def begin(self) -> object:
        return self.create(None)

    @rule(target=vtpms, fault=faults)
    def create(self, fault: str | None) -> object:
        record = new_record(f"web{next(self.names)}")
        bound = Bound(record, InstanceId(uuid4()), None)
        event = Event(CREATED, 0, "created", record.name, record.id)
        self.attempt(lambda store: store.create_vtpm(record, event=event), fault)
        return bound

    @rule(bound=vtpms, fault=faults, again=st.booleans())
    def bind(self, bound: Bound, fault: str | None, again: bool) -> None:
        old = bound.instance
        if again:
            bound.instance = InstanceId(uuid4())
        self.attempt(lambda store: store.bind_instance(bound.id, bound.instance, replaces=old), fault)

    @rule(bound=vtpms, fault=faults)
    def permit(self, bound: Bound, fault: str | None) -> None:
        permit = self.attempt(lambda store: store.issue_permit(bound.id, bound.instance, ENGINE), fault)
        bound.permit = permit if isinstance(permit, bytes) else None

    @rule(bound=vtpms, fault=faults)
    def load(self, bound: Bound, fault: str | None) -> None:
        self.attempt(lambda store: store.load_state(bound.id, bound.instance, ENGINE), fault)

    @rule(
        bounds=st.lists(vtpms, min_size=1, max_size=4),
        fault=faults,
        kind=st.sampled_from(StateKind),
        epoch=st.integers(1, 2),
    )
    def save(self, bounds: list[Bound], fault: str | None, kind: StateKind, epoch: int) -> None:
        saves = []
        for bound in bounds:
            permit, bound.permit = bound.permit, None
            saves.append(bound.save(random.randbytes(40), kind=kind, epoch=epoch, permit=permit))
        outcomes = self.attempt(lambda store: store.commit_saves(saves), fault)
        assert outcomes is None or len(outcomes) == len(saves)  # type: ignore[arg-type]

    @rule(bound=vtpms, fault=faults)
    def save_again(self, bound: Bound, fault: str | None) -> None:
        save = bound.save(b"twice")
        for _ in range(2):
            self.attempt(lambda store: store.commit_saves([save]), fault)

    @rule(bound=vtpms, word=st.sampled_from(["running", "moved", "stopped"]), fault=faults)
    def word(self, bound: Bound, word: str, fault: str | None) -> None:
        self.attempt(lambda store: store.set_lifecycle(bound.id, word), fault)

    @rule(bound=vtpms, fault=faults)
    def unbind(self, bound: Bound, fault: str | None) -> None:
        self.attempt(lambda store: store.unbind_instance(bound.id, bound.instance), fault)

    @rule(target=vtpms, bound=consumes(vtpms), fault=faults)
    def delete(self, bound: Bound, fault: str | None) -> object:
        self.attempt(lambda store: store.unbind_instance(bound.id, bound.instance), None)
        self.attempt(lambda store: store.delete_vtpm(bound.id), fault)
        with contextlib.suppress(VtpmError):
            self.store.get_vtpm(bound.id)
            return bound
        return multiple()

    @rule(fault=faults)
    def log(self, fault: str | None) -> None:
        self.attempt(lambda store: store.append_event(Event(CREATED, None, "note")), fault)

    @rule()
    def anchor(self) -> None:
        self.keeper.write(self.store.value)
        self.store.set_ancestors(self.store.value, self.store.value)

    @rule()
    def restart(self) -> None:
        """Opening verifies everything: the rows, the record, its MAC, its descent from the anchor."""
        before = self.store.value
        self.store.close()
        self.store = open_store(self.folder / "vault", self.keeper)
        assert self.store.value == before

    @invariant()
    def memory_equals_what_is_made_from_the_rows(self) -> None:
        file = self.store._file
        with file.reading() as db:
            assert file._stored_record(db) == file.ledger.record
            leaves = _all_leaves(db, "it")
        rebuilt = MerkleTree(leaves)
        assert file.ledger._tree.root == rebuilt.root == file.ledger.record.tree
        assert file.ledger._tree._nodes == rebuilt._nodes
        free = file.ledger.free_slot()
        assert free not in leaves
        assert set(range(free)) <= set(leaves)
        self.store.list_events(0, 1000)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_version_counts_transactions_that_change_anything_and_no_others(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    record = new_record()
    versions = [store.value.version]

    def note() -> int:
        versions.append(store.value.version)
        return versions[-1] - versions[-2]

    store.create_vtpm(record)
    assert note() == 1
    instance = InstanceId(uuid4())
    store.bind_instance(record.id, instance)
    assert note() == 1
    store.bind_instance(record.id, instance)
    store.set_lifecycle(record.id, "stopped")
    store.unbind_instance(record.id, instance)
    assert note() == 1
    store.unbind_instance(record.id, instance)
    (outcome,) = store.commit_saves([Bound(record, instance, None).save()])
    assert not isinstance(outcome, SaveAck)
    with pytest.raises(VtpmError):
        store.set_lifecycle(record.id, "running", expected="moved")
    assert note() == 0
    store.append_event(Event(CREATED, 0, "note"))
    assert note() == 1
    store.close()


def test_lowest_free_slot_is_given_when_a_vtpm_is_created(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    records = [new_record(f"web{number}") for number in range(5)]
    for record in records:
        store.create_vtpm(record)
    for number in (3, 1):
        store.delete_vtpm(records[number].id)
    for number in range(5, 8):
        store.create_vtpm(new_record(f"web{number}"))
    with store._file.reading() as db:
        slots = dict(db.execute("SELECT name, slot FROM vtpm").fetchall())
    assert slots == {"web0": 0, "web2": 2, "web4": 4, "web5": 1, "web6": 3, "web7": 5}
    store.close()


def test_creation_is_refused_when_every_slot_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtpm.vault.ledger.VTPM_SLOTS", 1)
    store = open_store(tmp_path / "vault")
    store.create_vtpm(new_record("web1"))
    with pytest.raises(StoreError, match="is full"):
        store.create_vtpm(new_record("web2"))
    assert [record.name for record in store.list_vtpms()] == ["web1"]
    store.close()


def test_store_that_was_changed_beneath_the_manager_is_refused_when_reopened(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    store.create_vtpm(new_record("web1"))
    with store._file.reading() as db:
        other = first_record(MAC_KEY)
        db.execute("UPDATE root SET record = ?", (other.encode(MAC_KEY),))
    with pytest.raises(VtpmError, match="and this manager left it at"):
        store.reopen()
    with pytest.raises(StoreError, match="not open"):
        store.list_vtpms()
    store.close()
