"""What every store promises, run over SqliteStore; a second store joins by its own line in STORES."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.unit.vault.world import CREATED, ENGINE, Bound, bind, manufacture, new_record, open_store, rebind
from vtpm.errors import (
    ConflictError,
    NotFoundError,
    ProtocolError,
    StateError,
    UsageError,
    VtpmError,
)
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault.envelope import MAX_ENVELOPE_BYTES
from vtpm.vault.records import Event, Permit, PermitState, SaveAck, SavedState, SaveEffect, VtpmRecord
from vtpm.vault.store import Store

STORES: dict[str, Callable[[Path], Store]] = {"sqlite": lambda folder: open_store(folder / "vault")}


@pytest.fixture(params=STORES)
def reopened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Each call closes the store, if any, and opens it anew, as a restarted manager does."""
    stores: list[Store] = []

    def reopen() -> Store:
        for store in stores:
            store.close()
        stores.append(STORES[request.param](tmp_path))
        return stores[-1]

    yield reopen
    for store in stores:
        store.close()


@pytest.fixture
def store(reopened: Callable[[], Store]) -> Store:
    return reopened()


def outcome_of(store: Store, *requests: object) -> object:
    (outcome,) = store.commit_saves(requests)  # type: ignore[arg-type]
    return outcome


def refused(store: Store, bound: Bound, error: type[VtpmError], /, **changes: object) -> VtpmError:
    before = (store.get_vtpm(bound.id), store.read_state(bound.id), store.last_save(bound.id))
    outcome = outcome_of(store, bound.save(**changes))  # type: ignore[arg-type]
    assert isinstance(outcome, error), outcome
    assert before == (store.get_vtpm(bound.id), store.read_state(bound.id), store.last_save(bound.id))
    return outcome


# Registry


def test_record_is_found_unchanged_when_store_is_reopened(reopened: Callable[[], Store]) -> None:
    store, record = reopened(), new_record()
    store.create_vtpm(record)
    store = reopened()
    assert store.get_vtpm(record.id) == record
    assert store.find_vtpm("web1") == record
    assert store.list_vtpms() == [record]


def test_creation_is_refused_when_name_or_id_is_taken(store: Store) -> None:
    record = new_record("web1")
    store.create_vtpm(record)
    with pytest.raises(ConflictError, match="web1"):
        store.create_vtpm(new_record("web1"))
    with pytest.raises(ConflictError):
        store.create_vtpm(new_record("web2", record.id))
    assert store.list_vtpms() == [record]


def begun(name: str = "web1", **changes: object) -> tuple[VtpmRecord, list[SavedState]]:
    """A vTPM that begins with state, in epoch 3."""
    used = Permit(PermitState.CONSUMED, bytes(16))
    record = dataclasses.replace(new_record(name), permit=used, state_version=9, epoch=3, **changes)
    return record, [
        SavedState(record.id, StateKind.PERMANENT, 8, 3, b"permanent"),
        SavedState(record.id, StateKind.SAVESTATE, 9, 3, b"savestate"),
    ]


def test_record_and_state_are_found_unchanged_when_a_vtpm_began_with_state(reopened: Callable[[], Store]) -> None:
    store, (record, states) = reopened(), begun()
    store.create_vtpm(record, states, event=Event(CREATED, 0, "imported", "web1", record.id))
    store = reopened()
    assert store.get_vtpm(record.id) == record
    assert store.read_state(record.id) == states
    assert [event.kind for event in store.list_events()] == ["imported"]


def test_vtpm_that_began_with_state_is_never_made_blank(store: Store) -> None:
    record, states = begun()
    store.create_vtpm(record, states)
    instance = InstanceId(uuid4())
    store.bind_instance(record.id, instance)
    with pytest.raises(StateError):
        store.issue_permit(record.id, instance, ENGINE)
    assert store.load_state(record.id, instance, ENGINE) == states
    bound = Bound(record, instance, None)
    # The epoch before, and a version that was given out, count no more.
    refused(store, bound, StateError, epoch=2, version=10)
    refused(store, bound, StateError, epoch=3, version=9)
    refused(store, bound, StateError, epoch=3, version=10, permit=record.permit.permit_id)
    assert isinstance(outcome_of(store, bound.save(epoch=3, version=10)), SaveAck)


def test_nothing_is_changed_when_name_or_uuid_of_a_vtpm_with_state_is_taken(store: Store) -> None:
    record, states = begun()
    store.create_vtpm(record, states)
    before = store.value
    with pytest.raises(ConflictError, match=f"vTPM web1 has the uuid {record.id} already"):
        store.create_vtpm(dataclasses.replace(record, name="web2"), states)
    with pytest.raises(ConflictError, match="a vTPM web1 exists already"):
        store.create_vtpm(*begun())
    assert store.value == before
    assert store.list_vtpms() == [record]


def _first_states_changed(
    record: VtpmRecord, states: list[SavedState]
) -> Iterator[tuple[VtpmRecord, list[SavedState]]]:
    permanent, savestate = states
    yield record, [savestate]
    yield record, [permanent, permanent]
    yield record, [permanent, dataclasses.replace(savestate, kind=StateKind.VOLATILE)]
    for change in ({"version": 10}, {"version": 0}, {"epoch": 2}, {"vtpm_id": VtpmId(uuid4())}, {"envelope": b""},
                   {"envelope": bytes(MAX_ENVELOPE_BYTES + 1)}):  # fmt: skip
        yield record, [permanent, dataclasses.replace(savestate, **change)]  # type: ignore[arg-type]
    for permit in (Permit(), Permit(PermitState.ISSUED, bytes(16)), Permit(PermitState.CONSUMED, bytes(15))):
        yield dataclasses.replace(record, permit=permit), states
    yield dataclasses.replace(record, instance_id=InstanceId(uuid4())), states
    yield dataclasses.replace(record, engine_version=ENGINE), states
    yield dataclasses.replace(record, state_version=0), states
    yield record, []


def test_first_states_are_refused_when_they_do_not_fit_the_record(store: Store) -> None:
    refusals = 0
    for record, states in _first_states_changed(*begun()):
        with pytest.raises(UsageError):
            store.create_vtpm(record, states)
        refusals += 1
    assert refusals == 16
    assert store.list_vtpms() == []


def test_vtpms_are_listed_by_name_when_there_are_many(store: Store) -> None:
    for name in ("c", "a", "b"):
        store.create_vtpm(new_record(name))
    assert [record.name for record in store.list_vtpms()] == ["a", "b", "c"]


def test_each_operation_says_not_found_when_vtpm_is_unknown(store: Store) -> None:
    nobody, instance = VtpmId(uuid4()), InstanceId(uuid4())
    for operation in (
        lambda: store.get_vtpm(nobody),
        lambda: store.find_vtpm("nobody"),
        lambda: store.set_lifecycle(nobody, "running"),
        lambda: store.set_wrapped_key(nobody, b"k", expected=None),
        lambda: store.delete_vtpm(nobody),
        lambda: store.bind_instance(nobody, instance),
        lambda: store.unbind_instance(nobody, instance),
        lambda: store.issue_permit(nobody, instance, ENGINE),
        lambda: store.read_state(nobody),
        lambda: store.load_state(nobody, instance, ENGINE),
    ):
        with pytest.raises(NotFoundError):
            operation()
    assert isinstance(outcome_of(store, Bound(new_record(), instance, None).save()), NotFoundError)


def test_lifecycle_changes_only_when_the_expected_word_stands(store: Store) -> None:
    record = new_record()
    store.create_vtpm(record)
    store.set_lifecycle(record.id, "starting", expected="stopped")
    with pytest.raises(ConflictError, match="is starting, not stopped"):
        store.set_lifecycle(record.id, "running", expected="stopped")
    assert store.get_vtpm(record.id).lifecycle == "starting"
    store.set_lifecycle(record.id, "failed")
    assert store.get_vtpm(record.id).lifecycle == "failed"


def test_wrapped_key_changes_only_when_the_expected_one_stands(store: Store) -> None:
    record = dataclasses.replace(new_record(), wrapped_key=None)
    store.create_vtpm(record)
    store.set_wrapped_key(record.id, b"first", expected=None)
    with pytest.raises(ConflictError):
        store.set_wrapped_key(record.id, b"second", expected=None)
    store.set_wrapped_key(record.id, b"second", expected=b"first")
    assert store.get_vtpm(record.id).wrapped_key == b"second"


def test_nothing_remains_but_events_when_vtpm_is_deleted(store: Store) -> None:
    bound, sibling = manufacture(store, "web1"), manufacture(store, "web2")
    with pytest.raises(ConflictError, match="has an instance"):
        store.delete_vtpm(bound.id)
    store.unbind_instance(bound.id, bound.instance)
    store.delete_vtpm(bound.id, event=Event(CREATED, 0, "deleted", "web1", bound.id))
    with pytest.raises(NotFoundError):
        store.get_vtpm(bound.id)
    assert [event.kind for event in store.list_events()] == ["deleted"]
    assert len(store.read_state(sibling.id)) == 1
    # The name may be used again, and whoever has it now begins with nothing.
    assert bind(store, "web1").permit != bound.permit


# One instance


def test_second_instance_is_refused_when_one_is_bound(store: Store) -> None:
    bound = bind(store)
    store.bind_instance(bound.id, bound.instance)
    other = InstanceId(uuid4())
    with pytest.raises(ConflictError, match=str(bound.instance)):
        store.bind_instance(bound.id, other)
    with pytest.raises(ConflictError):
        store.bind_instance(bound.id, other, replaces=InstanceId(uuid4()))
    with pytest.raises(ConflictError):
        store.unbind_instance(bound.id, other)
    assert store.get_vtpm(bound.id).instance_id == bound.instance


def test_instance_is_refused_when_bound_to_another_vtpm(store: Store) -> None:
    bound, other = bind(store, "web1"), bind(store, "web2")
    with pytest.raises(ConflictError, match="another"):
        store.bind_instance(other.id, bound.instance, replaces=other.instance)


def test_nothing_of_the_old_instance_is_accepted_when_replaced_or_unbound(store: Store) -> None:
    old = manufacture(store)
    new = rebind(store, old)
    refused(store, old, ConflictError)
    with pytest.raises(ConflictError):
        store.load_state(old.id, old.instance, ENGINE)
    store.unbind_instance(new.id, new.instance)
    store.unbind_instance(new.id, new.instance)
    refused(store, new, ConflictError)
    with pytest.raises(ConflictError):
        store.issue_permit(new.id, new.instance, ENGINE)


def test_save_is_refused_when_the_new_instance_has_not_loaded(store: Store) -> None:
    new = rebind(store, manufacture(store))
    refused(store, new, ProtocolError, seq=1, version=2)
    store.load_state(new.id, new.instance, ENGINE)
    assert outcome_of(store, new.save(version=2)) == SaveAck(SaveEffect.COMMITTED, 2)


# Permit


def test_permit_stays_the_same_when_asked_for_again_before_it_is_used(reopened: Callable[[], Store]) -> None:
    store = reopened()
    bound = bind(store)
    assert bound.permit is not None
    assert len(bound.permit) == 16
    store = reopened()
    assert store.get_vtpm(bound.id).permit.state is PermitState.ISSUED
    assert store.issue_permit(bound.id, bound.instance, ENGINE) == bound.permit
    new = rebind(store, bound)
    assert store.issue_permit(new.id, new.instance, ENGINE) == bound.permit


def test_permit_is_consumed_when_the_first_permanent_state_is_saved(store: Store) -> None:
    bound = manufacture(store)
    assert store.get_vtpm(bound.id).permit.state is PermitState.CONSUMED
    with pytest.raises(StateError, match="never made blank"):
        store.issue_permit(bound.id, bound.instance, ENGINE)
    refused(store, bound, StateError, permit=bound.permit)


@pytest.mark.parametrize("permit", [None, b"", bytes(16)])
def test_first_save_is_refused_when_it_has_not_the_issued_permit(store: Store, permit: bytes | None) -> None:
    refused(store, bind(store), StateError, permit=permit)


def test_other_state_is_refused_when_there_is_no_permanent_state_yet(store: Store) -> None:
    bound = bind(store)
    refused(store, bound, StateError, kind=StateKind.VOLATILE)
    refused(store, bound, StateError, kind=StateKind.SAVESTATE, permit=bound.permit)


def test_load_gives_nothing_when_nothing_was_ever_saved(store: Store) -> None:
    bound = bind(store)
    assert store.load_state(bound.id, bound.instance, ENGINE) == []


# Saves


def test_state_is_replaced_and_version_counted_when_saved(reopened: Callable[[], Store]) -> None:
    store = reopened()
    bound = manufacture(store)
    assert outcome_of(store, bound.save(b"second")) == SaveAck(SaveEffect.COMMITTED, 2)
    assert outcome_of(store, bound.save(b"save", kind=StateKind.SAVESTATE, version=9)) == SaveAck(
        SaveEffect.COMMITTED, 9
    )
    store = reopened()
    assert [(s.kind, s.version, s.epoch, s.envelope) for s in store.read_state(bound.id)] == [
        (StateKind.PERMANENT, 2, 1, b"second"),
        (StateKind.SAVESTATE, 9, 1, b"save"),
    ]
    assert store.get_vtpm(bound.id).state_version == 9


def test_kind_is_deleted_when_an_empty_blob_is_saved(store: Store) -> None:
    bound = manufacture(store)
    outcome_of(store, bound.save(b"save", kind=StateKind.SAVESTATE))
    assert outcome_of(store, bound.save(b"", kind=StateKind.SAVESTATE)) == SaveAck(SaveEffect.COMMITTED, 3)
    assert [state.kind for state in store.read_state(bound.id)] == [StateKind.PERMANENT]
    refused(store, bound, ProtocolError, data=b"")


@pytest.mark.parametrize("epoch", [2, 1 << 62])
def test_save_is_refused_when_of_another_epoch(store: Store, epoch: int) -> None:
    refused(store, manufacture(store), StateError, epoch=epoch)


def test_save_is_refused_when_its_version_is_not_newer(store: Store) -> None:
    bound = manufacture(store)
    refused(store, bound, StateError, seq=2, version=1)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": -1},
        {"seq": 1 << 63},
        {"version": 0},
        {"version": 1 << 63},
        {"epoch": 0},
        {"data": bytes(MAX_ENVELOPE_BYTES + 1)},
    ],
)
def test_save_is_refused_when_a_field_is_out_of_bounds(store: Store, change: dict[str, object]) -> None:
    refused(store, manufacture(store), ProtocolError, **{"seq": 2, "version": 2, **change})


def test_save_has_no_second_effect_when_replayed_after_a_restart(reopened: Callable[[], Store]) -> None:
    store = reopened()
    bound = bind(store)
    first = bound.save(b"first", permit=bound.permit)
    assert outcome_of(store, first) == SaveAck(SaveEffect.COMMITTED, 1)
    store = reopened()
    before = store.get_vtpm(bound.id), store.read_state(bound.id)
    # Sealed anew by the restarted manager: other bytes and version, the same digest.
    replay = dataclasses.replace(first, envelope=b"other bytes", version=5)
    assert outcome_of(store, replay) == SaveAck(SaveEffect.REPLAYED, 1)
    assert before == (store.get_vtpm(bound.id), store.read_state(bound.id))


def test_save_is_refused_when_its_number_was_used_or_is_older(store: Store) -> None:
    bound = manufacture(store)
    outcome_of(store, bound.save(b"second"))
    refused(store, bound, ProtocolError, seq=2, data=b"different", version=3)
    refused(store, bound, ProtocolError, seq=1, data=b"first", version=3)
    refused(store, bound, ProtocolError, seq=0, version=3)


def test_siblings_are_committed_when_one_save_of_the_group_is_refused(store: Store) -> None:
    good, bad, also_good = (manufacture(store, name) for name in ("a", "b", "c"))
    outcomes = store.commit_saves([good.save(b"new"), bad.save(epoch=7), also_good.save(b"new")])
    assert [type(outcome) for outcome in outcomes] == [SaveAck, StateError, SaveAck]
    assert [s.envelope for v in (good, bad, also_good) for s in store.read_state(v.id)] == [b"new", b"first", b"new"]


def test_siblings_are_committed_when_rows_of_one_vtpm_were_changed_to_what_none_of_ours_has(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    web1, web2 = manufacture(store), manufacture(store, "web2")
    with store._file.reading() as db:
        db.execute("UPDATE vtpm SET domain = 'none' WHERE id = ?", (web1.id.bytes,))
    damaged, kept = store.commit_saves([web1.save(b"newer"), web2.save(b"newer")])
    assert isinstance(damaged, StateError)
    assert "'none' is not a valid DomainKind" in damaged.message
    assert kept == SaveAck(SaveEffect.COMMITTED, 2)
    store.close()


def test_each_is_checked_against_the_one_before_when_one_vtpm_is_twice_in_a_group(store: Store) -> None:
    bound = bind(store)
    outcomes = store.commit_saves(
        [bound.save(b"1", permit=bound.permit), bound.save(b"2", permit=bound.permit), bound.save(b"3")]
    )
    assert [type(outcome) for outcome in outcomes] == [SaveAck, StateError, SaveAck]


# Volatile state


def test_volatile_state_is_had_once_when_loaded(reopened: Callable[[], Store]) -> None:
    store = reopened()
    bound = manufacture(store)
    outcome_of(store, bound.save(b"volatile", kind=StateKind.VOLATILE))
    assert len(store.read_state(bound.id)) == 2
    kinds = [state.kind for state in store.load_state(bound.id, bound.instance, ENGINE)]
    assert kinds == [StateKind.PERMANENT, StateKind.VOLATILE]
    store = reopened()
    kinds = [state.kind for state in store.load_state(bound.id, bound.instance, ENGINE)]
    assert kinds == [StateKind.PERMANENT]
    assert store.get_vtpm(bound.id).state_version == 3


def test_volatile_state_is_dropped_when_permanent_state_is_saved_after_it(store: Store) -> None:
    bound = manufacture(store)
    outcome_of(store, bound.save(b"volatile", kind=StateKind.VOLATILE))
    outcome_of(store, bound.save(b"later"))
    assert [state.kind for state in store.read_state(bound.id)] == [StateKind.PERMANENT]


# Events


def test_events_are_listed_in_order_and_in_pages_when_appended(reopened: Callable[[], Store]) -> None:
    store, record = reopened(), new_record()
    store.create_vtpm(record, event=Event(CREATED, 1000, "created", "web1", record.id, '{"by": "test"}'))
    ids = [store.append_event(Event(CREATED, None, f"kind{number}")) for number in range(4)]
    events = reopened().list_events()
    assert [event.event_id for event in events] == [events[0].event_id, *ids]
    assert events[0] == Event(CREATED, 1000, "created", "web1", record.id, '{"by": "test"}', events[0].event_id)
    assert [event.event_id for event in reopened().list_events(ids[0], 2)] == ids[1:3]


def test_newest_event_of_a_kind_is_found_when_there_are_several(store: Store) -> None:
    one, other = new_record(), new_record("web2")
    assert store.last_event(one.id, "locked_out") is None
    ids = [
        store.append_event(Event(CREATED, None, kind, record.name, record.id))
        for record, kind in ((one, "locked_out"), (one, "locked_out"), (one, "started"), (other, "locked_out"))
    ]
    found = store.last_event(one.id, "locked_out")
    assert found == Event(CREATED, None, "locked_out", one.name, one.id, event_id=ids[1])
    assert store.last_event(other.id, "started") is None


def test_event_is_not_found_when_it_is_too_far_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtpm.vault.sqlite_store.MAX_EVENTS_SEARCHED", 2)
    record = new_record()
    store.append_event(Event(CREATED, None, "locked_out", record.name, record.id))
    store.append_event(Event(CREATED, None, "other"))
    assert store.last_event(record.id, "locked_out") is not None
    store.append_event(Event(CREATED, None, "other"))
    assert store.last_event(record.id, "locked_out") is None


def test_nothing_is_done_when_the_event_of_an_operation_is_refused(store: Store) -> None:
    with pytest.raises(UsageError):
        store.create_vtpm(new_record(), event=Event(CREATED, 0, "created", detail="no json"))
    assert store.list_vtpms() == []


@pytest.mark.parametrize(("after_id", "limit"), [(-1, 1), (0, 0), (0, 1001), (1 << 63, 1)])
def test_listing_is_refused_when_out_of_bounds(store: Store, after_id: int, limit: int) -> None:
    with pytest.raises(UsageError):
        store.list_events(after_id, limit)


@pytest.mark.parametrize("engine_version", [0, -1, 1 << 32])
def test_engine_version_is_refused_when_out_of_bounds(store: Store, engine_version: int) -> None:
    bound = bind(store)
    with pytest.raises(UsageError):
        store.issue_permit(bound.id, bound.instance, engine_version)
    with pytest.raises(UsageError):
        store.load_state(bound.id, bound.instance, engine_version)


def test_vtpms_are_listed_by_owner_and_page_by_page_when_asked_so(store: Store) -> None:
    records = [dataclasses.replace(new_record(f"web{n}"), owner_uid=1000 + n % 2) for n in (3, 1, 4, 0, 2)]
    for record in records:
        store.create_vtpm(record)
    records.sort(key=lambda record: record.name)
    assert store.list_vtpms() == records
    assert store.list_vtpms(owner_uid=1001) == [records[1], records[3]]
    assert store.list_vtpms(owner_uid=1000, limit=2) == [records[0], records[2]]
    assert store.list_vtpms(owner_uid=1000, after="web2", limit=2) == [records[4]]
    assert store.list_vtpms(after="web1", limit=1) == [records[2]]
    assert store.list_vtpms(owner_uid=7) == []
    assert store.count_vtpms() == {1000: 3, 1001: 2}
    ids = {record.id for record in records[:3]}
    assert store.owned_by(1000, ids) == {records[0].id, records[2].id}
    assert store.owned_by(1000, {VtpmId(uuid4())}) == set()


def test_creation_is_refused_when_the_owner_has_as_many_as_allowed(store: Store) -> None:
    owned = [dataclasses.replace(new_record(f"web{number}"), owner_uid=1000) for number in range(4)]
    for record in owned[:3]:
        store.create_vtpm(record, max_owned=3)
    with pytest.raises(ConflictError, match="uid 1000 has 3 vTPMs, and may have 3"):
        store.create_vtpm(owned[3], event=Event(CREATED, 1000, "created", "web3", owned[3].id), max_owned=3)
    assert store.list_vtpms() == owned[:3]
    assert store.list_events() == []
    # Others, and whoever is not bounded, may go on; so may the owner who deletes one.
    store.create_vtpm(dataclasses.replace(new_record("other"), owner_uid=1001), max_owned=3)
    store.delete_vtpm(owned[0].id)
    store.create_vtpm(owned[3], max_owned=3)
    store.create_vtpm(dataclasses.replace(new_record("more"), owner_uid=1000))
