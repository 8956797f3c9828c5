"""Changes of a vTPM's holding in a store: what belongs to each, what is refused, and what is left of it."""

from __future__ import annotations

import dataclasses
import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from tests.unit.vault.test_store import begun
from tests.unit.vault.world import (
    CREATED,
    DIGEST,
    ENGINE,
    FROZEN,
    HELD,
    ID,
    LEAVING,
    MOVED,
    Bound,
    MemoryKeeper,
    manufacture,
    new_record,
    open_store,
)
from vtpm.errors import ConflictError, NotFoundError, StateError, UsageError, VtpmError
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault import sqlite_change
from vtpm.vault.holding import NOWHERE, Holding, KnownVtpm, Right, check_change
from vtpm.vault.records import Event, SavedState, VtpmRecord
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.wire.migration import Mode

EVENT = Event(CREATED, 0, "frozen", "web1")


def stopped(store: SqliteStore, name: str = "web1") -> Bound:
    bound = manufacture(store, name)
    store.unbind_instance(bound.id, bound.instance)
    return bound


def arriving(epoch: int, vtpm_id: VtpmId | None = None) -> tuple[VtpmRecord, list[SavedState]]:
    record, states = begun(lifecycle="inert")
    record = dataclasses.replace(record, id=vtpm_id or record.id, epoch=epoch)
    return record, [dataclasses.replace(state, vtpm_id=record.id, epoch=epoch) for state in states]


def inert(epoch: int) -> Holding:
    return Holding(Right.INERT, epoch, ID, "a", DIGEST, Mode.STOPPED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


@pytest.fixture
def store(folder: Path) -> SqliteStore:
    return open_store(folder)


def test_vtpm_that_never_moved_is_held_under_its_own_epoch_and_others_are_nowhere(store: SqliteStore) -> None:
    bound = stopped(store)
    assert store.holding(bound.id) == KnownVtpm(bound.id, "web1", HELD)
    assert store.holding(VtpmId(uuid4())).holding == NOWHERE
    assert store.list_holdings() == []
    store.close()


def test_key_and_state_are_gone_when_a_vtpm_has_moved_and_its_holding_stays(store: SqliteStore, folder: Path) -> None:
    bound = stopped(store)
    version = store.value.version
    store.record_move(bound.id, HELD, FROZEN, event=EVENT)
    assert store.prompt_version == store.value.version == version + 1
    assert store.get_vtpm(bound.id).lifecycle == "frozen"
    store.record_move(bound.id, FROZEN, MOVED)
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"first" not in kept
    assert b"wrapped key of web1" not in kept
    with pytest.raises(NotFoundError):
        store.get_vtpm(bound.id)
    over = dataclasses.replace(MOVED, migration_id=b"")
    store.record_move(bound.id, MOVED, over)
    keeper = MemoryKeeper(store.value)
    store.close()
    again = open_store(folder, keeper)
    assert again.list_holdings() == [KnownVtpm(bound.id, "web1", over)]
    assert again.list_events()[-1].kind == "frozen"
    again.close()


def test_vtpm_may_run_again_under_an_epoch_of_its_own_when_its_move_is_aborted(store: SqliteStore) -> None:
    bound = stopped(store)
    store.record_move(bound.id, HELD, FROZEN)
    store.record_move(bound.id, FROZEN, Holding(Right.HELD, 3))
    record = store.get_vtpm(bound.id)
    assert (record.lifecycle, record.epoch) == ("stopped", 3)
    instance = InstanceId(uuid4())
    store.bind_instance(bound.id, instance)
    (state,) = store.load_state(bound.id, instance, ENGINE)
    assert state.envelope == b"first"
    store.close()


def test_vtpm_arrives_inert_with_volatile_state_and_becomes_active(store: SqliteStore) -> None:
    record, states = arriving(4)
    passing = dataclasses.replace(states[-1], kind=StateKind.VOLATILE)
    store.record_move(record.id, NOWHERE, inert(4), arriving=(record, [states[0], passing]))
    instance = InstanceId(uuid4())
    with pytest.raises(ConflictError, match="is inert"):
        store.bind_instance(record.id, instance)
    active = dataclasses.replace(inert(4), right=Right.HELD, digest=b"")
    store.record_move(record.id, inert(4), active)
    assert store.get_vtpm(record.id).lifecycle == "stopped"
    store.bind_instance(record.id, instance)
    assert {state.kind for state in store.load_state(record.id, instance, ENGINE)} == {
        StateKind.PERMANENT,
        StateKind.VOLATILE,
    }
    store.close()


def test_only_the_epoch_stays_when_an_inert_vtpm_is_discarded_and_it_may_arrive_again(store: SqliteStore) -> None:
    record, states = arriving(4)
    store.record_move(record.id, NOWHERE, inert(4), arriving=(record, states))
    gone = Holding(Right.ABSENT, 4)
    store.record_move(record.id, inert(4), gone)
    assert store.list_vtpms() == []
    with pytest.raises(ConflictError, match="does not become inert"):
        store.record_move(record.id, gone, inert(4), arriving=(record, states))
    store.record_move(record.id, gone, inert(5), arriving=arriving(5, record.id))
    store.close()


def test_vtpm_comes_back_to_the_host_that_it_moved_from(store: SqliteStore) -> None:
    bound = stopped(store)
    store.record_move(bound.id, HELD, FROZEN)
    store.record_move(bound.id, FROZEN, MOVED)
    store.record_move(bound.id, MOVED, inert(3), arriving=arriving(3, bound.id))
    assert store.holding(bound.id).holding == inert(3)
    store.close()


def test_nothing_of_a_frozen_vtpm_is_taken_though_its_instance_stays_bound(store: SqliteStore) -> None:
    bound = manufacture(store)
    store.set_lifecycle(bound.id, "running")
    with pytest.raises(ConflictError, match="has an instance"):
        store.record_move(bound.id, HELD, FROZEN)
    store.record_move(bound.id, HELD, LEAVING)
    before = store.value
    (refused,) = store.commit_saves([bound.save(b"late")])
    assert isinstance(refused, ConflictError)
    for attempt in (
        lambda: store.load_state(bound.id, bound.instance, ENGINE),
        lambda: store.issue_permit(bound.id, bound.instance, ENGINE),
        lambda: store.bind_instance(bound.id, InstanceId(uuid4()), replaces=bound.instance),
        lambda: store.set_lifecycle(bound.id, "running"),
    ):
        with pytest.raises(ConflictError, match="is frozen"):
            attempt()
    assert store.value == before
    store.unbind_instance(bound.id, bound.instance)
    with pytest.raises(ConflictError, match="is frozen"):
        store.delete_vtpm(bound.id)
    store.close()


@pytest.mark.parametrize("word", ["frozen", "inert"])
def test_no_word_of_the_life_cycle_makes_a_holding(store: SqliteStore, word: str) -> None:
    bound = stopped(store)
    with pytest.raises(ConflictError, match="by a migration alone"):
        store.set_lifecycle(bound.id, word)
    with pytest.raises(ConflictError, match="by a migration alone"):
        store.create_vtpm(dataclasses.replace(new_record("web2"), lifecycle=word))
    store.close()


def test_nothing_changes_when_a_move_does_not_fit_what_is_held(store: SqliteStore) -> None:
    bound, other = stopped(store), manufacture(store, "web2")
    store.set_lifecycle(other.id, "starting")
    record, states = arriving(4)
    cases: list[tuple[VtpmId, Holding, Holding, tuple[VtpmRecord, list[SavedState]] | None, type[VtpmError]]] = [
        (bound.id, FROZEN, MOVED, None, ConflictError),
        (bound.id, HELD, MOVED, None, ConflictError),
        (bound.id, HELD, dataclasses.replace(FROZEN, epoch=2), None, ConflictError),
        (bound.id, HELD, dataclasses.replace(FROZEN, digest=b"d"), None, UsageError),
        (bound.id, HELD, dataclasses.replace(FROZEN, migration_id=b"d"), None, UsageError),
        (bound.id, HELD, dataclasses.replace(FROZEN, peer="../b"), None, UsageError),
        (bound.id, HELD, FROZEN, (record, states), UsageError),
        (record.id, NOWHERE, inert(4), None, UsageError),
        (record.id, NOWHERE, inert(5), (record, states), UsageError),
        (bound.id, NOWHERE, inert(4), (record, states), ConflictError),
        (record.id, NOWHERE, inert(4), (record, []), UsageError),
        (record.id, NOWHERE, inert(4), (dataclasses.replace(record, lifecycle="stopped"), states), UsageError),
        (record.id, NOWHERE, inert(4), (dataclasses.replace(record, name="web2"), states), ConflictError),
        (VtpmId(uuid4()), NOWHERE, inert(4), (record, states), UsageError),
    ]
    before, events = store.value, store.list_events()
    for vtpm_id, held, after, brought, error in cases:
        with pytest.raises(error):
            store.record_move(vtpm_id, held, after, arriving=brought, event=EVENT)
    assert (store.value, store.list_events(), store.list_holdings()) == (before, events, [])
    store.close()


def test_vtpm_that_is_bound_freezes_and_one_that_should_be_stopped_does_not_when_it_is_something_else(
    store: SqliteStore,
) -> None:
    bound = stopped(store)
    store.set_lifecycle(bound.id, "starting")
    with pytest.raises(ConflictError, match="is starting, not stopped"):
        store.record_move(bound.id, HELD, FROZEN)
    store.close()


def test_epoch_stays_known_when_a_vtpm_that_moved_is_deleted_and_is_never_taken_again(store: SqliteStore) -> None:
    record, states = arriving(4)
    store.record_move(record.id, NOWHERE, inert(4), arriving=(record, states))
    store.record_move(record.id, inert(4), dataclasses.replace(inert(4), right=Right.HELD))
    store.delete_vtpm(record.id)
    assert store.holding(record.id).holding == Holding(Right.ABSENT, 4)
    with pytest.raises(ConflictError, match="4 has passed here"):
        store.create_vtpm(dataclasses.replace(record, lifecycle="stopped"), states)
    again, again_states = arriving(5, record.id)
    store.create_vtpm(dataclasses.replace(again, lifecycle="stopped"), again_states)
    assert store.holding(record.id).holding == Holding(Right.HELD, 5)
    # Also when that one is deleted in turn.
    store.delete_vtpm(record.id)
    assert store.holding(record.id).holding == Holding(Right.ABSENT, 5)
    store.close()


def test_vtpm_is_not_begun_anew_while_the_host_that_it_went_to_waits_for_word(store: SqliteStore) -> None:
    bound = stopped(store)
    store.record_move(bound.id, HELD, FROZEN)
    store.record_move(bound.id, FROZEN, MOVED)
    record, states = arriving(5, bound.id)
    record = dataclasses.replace(record, lifecycle="stopped")
    with pytest.raises(ConflictError, match="has moved to b, which has not said yet"):
        store.create_vtpm(record, states)
    store.record_move(bound.id, MOVED, dataclasses.replace(MOVED, migration_id=b""))
    store.create_vtpm(record, states)
    store.close()


def test_nothing_more_arrives_when_enough_waits_or_is_known(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stopped(store, "own1")
    monkeypatch.setattr(sqlite_change, "MAX_INERT_OF_ONE", 1)
    first, states = arriving(4)
    store.record_move(first.id, NOWHERE, inert(4), arriving=(first, states))
    second, more = arriving(4)
    second = dataclasses.replace(second, name="web2")
    with pytest.raises(ConflictError, match="1 vTPMs of a wait here"):
        store.record_move(second.id, NOWHERE, inert(4), arriving=(second, more))
    other = dataclasses.replace(inert(4), peer="c")
    monkeypatch.setattr(sqlite_change, "MAX_ARRIVED", 1)
    with pytest.raises(ConflictError, match="takes none in any more"):
        store.record_move(second.id, NOWHERE, other, arriving=(second, more))
    # What is this host's own leaves all the same.
    store.record_move(own.id, HELD, FROZEN)
    store.close()


def test_what_was_adopted_is_never_forgotten(store: SqliteStore) -> None:
    record, states = arriving(4)
    store.record_move(record.id, NOWHERE, inert(4), arriving=(record, states))
    adopted = dataclasses.replace(inert(4), right=Right.HELD, digest=b"", adopted=ID)
    store.record_move(record.id, inert(4), adopted)
    for forgetful in (b"", bytes(16)):
        with pytest.raises(ConflictError, match="never forgotten"):
            store.record_move(record.id, adopted, Holding(Right.FROZEN, 4, ID, "b", DIGEST, adopted=forgetful))
    with pytest.raises(UsageError, match="adopted more than"):
        store.record_move(record.id, adopted, Holding(Right.FROZEN, 4, ID, "b", DIGEST, adopted=ID * 17))
    store.delete_vtpm(record.id)
    assert store.holding(record.id).holding == Holding(Right.ABSENT, 4, adopted=ID)
    store.close()


def test_move_is_refused_when_there_are_as_many_as_are_kept(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stopped(store), stopped(store, "web2")
    monkeypatch.setattr(sqlite_change, "MAX_HOLDINGS", 1)
    store.record_move(first.id, HELD, FROZEN)
    with pytest.raises(ConflictError, match="keeps no more"):
        store.record_move(second.id, HELD, FROZEN)
    store.record_move(first.id, FROZEN, MOVED)
    store.close()


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE holding SET epoch = 9",
        "UPDATE holding SET standing = 'absent'",
        "UPDATE holding SET peer = 'c'",
        "UPDATE holding SET migration_id = x''",
        "UPDATE holding SET mode = 2",
        "UPDATE holding SET name = 'web9'",
        "DELETE FROM holding",
    ],
)
def test_store_is_refused_when_its_holdings_are_not_those_that_were_written(folder: Path, edit: str) -> None:
    store = open_store(folder)
    bound = stopped(store)
    store.record_move(bound.id, HELD, FROZEN)
    store.record_move(bound.id, FROZEN, MOVED)
    keeper = MemoryKeeper(store.value)
    store.close()
    with closing(sqlite3.connect(folder / "vtpm.db", isolation_level=None)) as db:
        db.execute(edit)
    with pytest.raises(StateError, match="rows are not those"):
        open_store(folder, keeper)


def test_holdings_that_are_edited_under_a_running_manager_are_neither_believed_nor_signed(
    store: SqliteStore, folder: Path
) -> None:
    bound, other = stopped(store), stopped(store, "web2")
    store.record_move(bound.id, HELD, FROZEN)
    with store._file.reading() as db:
        db.execute("UPDATE holding SET epoch = 7")
    assert store.holding(bound.id).holding == FROZEN
    assert [known.holding for known in store.list_holdings()] == [FROZEN]
    with pytest.raises(ConflictError):
        store.record_move(bound.id, Holding(Right.FROZEN, 7, ID, "b", DIGEST), MOVED)
    # Another's change is signed, and not what stands beside it.
    store.record_move(other.id, HELD, FROZEN)
    keeper = MemoryKeeper(store.value)
    store.close()
    with pytest.raises(StateError, match="rows are not those"):
        open_store(folder, keeper)


def test_holdings_are_read_again_and_verified_when_the_store_was_reopened(store: SqliteStore) -> None:
    bound = stopped(store)
    store.record_move(bound.id, HELD, FROZEN)
    store._file.holdings = sqlite_change.HoldingsCache()
    assert store.holding(bound.id).holding == FROZEN
    with store._file.reading() as db:
        db.execute("UPDATE holding SET epoch = 7")
    store._file.holdings = sqlite_change.HoldingsCache()
    for attempt in (store.list_holdings, lambda: store.holding(bound.id)):
        with pytest.raises(StateError, match="holdings are not those that were written"):
            attempt()
    store.close()


def test_store_of_the_schema_before_keeps_it_until_the_first_move(folder: Path) -> None:
    store = open_store(folder)
    bound = stopped(store)
    keeper = MemoryKeeper(store.value)
    store.close()
    with closing(sqlite3.connect(folder / "vtpm.db", isolation_level=None)) as db:
        db.execute("DROP TABLE holding")
        db.execute("UPDATE vault_schema SET version = 4")
    store = open_store(folder, keeper)
    assert store.list_holdings() == []
    assert store.holding(bound.id).holding == HELD
    store.record_move(bound.id, HELD, FROZEN)
    keeper = MemoryKeeper(store.value)
    store.close()
    with closing(sqlite3.connect(folder / "vtpm.db")) as db:
        assert db.execute("SELECT version FROM vault_schema").fetchone() == (5,)
    store = open_store(folder, keeper)
    assert [known.holding for known in store.list_holdings()] == [FROZEN]
    store.close()


@pytest.mark.parametrize("before", Right)
@pytest.mark.parametrize("after", Right)
def test_epoch_never_goes_back_whatever_the_change(before: Right, after: Right) -> None:
    with pytest.raises(ConflictError):
        check_change(Holding(before, 5), Holding(after, 4))
