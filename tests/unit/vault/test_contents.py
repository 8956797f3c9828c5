"""A vTPM that begins with state: sealed under its own key and epoch, never blank again, and nothing volatile in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.unit.vault.world import ENGINE, KEY, MemoryKeeper, new_record, open_store
from vtpm.errors import StateError
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, StateKind, TpmVersion
from vtpm.vault.anchor import AnchorPolicy
from vtpm.vault.committer import Committer
from vtpm.vault.contents import ANY_ENGINE, Contents, begin, carried, open_all, open_saved
from vtpm.vault.records import MAX_COUNTER, PermitState, SavedState, VtpmRecord
from vtpm.vault.vault import Vault

SECRET = Secret(KEY)
STATES = {StateKind.PERMANENT: b"permanent", StateKind.SAVESTATE: b"savestate"}
OLD = dataclasses.replace(new_record(), tpm_version=TpmVersion.V1_2, epoch=5, state_version=40)


def begun(record: VtpmRecord = OLD, contents: Contents | None = None) -> tuple[VtpmRecord, list[SavedState]]:
    return begin(record, SECRET, contents or Contents(STATES, ENGINE))


def test_all_is_opened_as_it_was_when_a_vtpm_begins_with_it() -> None:
    record, states = begun()
    assert (record.permit.state, record.epoch, record.state_version) == (PermitState.CONSUMED, 5, 42)
    assert [(state.kind, state.epoch, state.version) for state in states] == [
        (StateKind.PERMANENT, 5, 41),
        (StateKind.SAVESTATE, 5, 42),
    ]
    assert open_all(SECRET, record, states) == Contents(STATES, ENGINE)


def test_state_of_an_earlier_epoch_does_not_open_when_its_row_says_the_present_one() -> None:
    record, (old, _) = begun()
    imported = dataclasses.replace(record, epoch=record.epoch + 1)
    with pytest.raises(StateError, match="another epoch: 5, not 6"):
        open_saved(SECRET, imported, dataclasses.replace(old, epoch=imported.epoch), ENGINE)


def test_engine_that_is_needed_is_the_newest_of_all_states_when_they_differ() -> None:
    record, (permanent, _) = begun(contents=Contents(STATES, ENGINE))
    _, (_, savestate) = begun(contents=Contents(STATES, ENGINE + 1))
    assert open_all(SECRET, record, [permanent, savestate]).engine_version == ENGINE + 1


def test_nothing_volatile_is_carried_when_it_is_there() -> None:
    every = dict.fromkeys(StateKind, b"x")
    assert set(carried(TpmVersion.V2_0, every)) == {StateKind.PERMANENT}
    assert set(carried(TpmVersion.V1_2, every)) == {StateKind.PERMANENT, StateKind.SAVESTATE}
    record, states = begun(contents=Contents(every, ENGINE))
    assert open_all(SECRET, record, states).states.keys() == {StateKind.PERMANENT, StateKind.SAVESTATE}


def test_backup_is_refused_when_permanent_state_is_missing_or_damaged() -> None:
    record, (permanent, savestate) = begun()
    with pytest.raises(StateError, match="permanent state is missing"):
        open_all(SECRET, record, [savestate])
    flipped = permanent.envelope[:-1] + bytes([permanent.envelope[-1] ^ 1])
    with pytest.raises(StateError, match="damaged"):
        open_all(SECRET, record, [dataclasses.replace(permanent, envelope=flipped), savestate])


@pytest.mark.parametrize("end", [{"epoch": MAX_COUNTER + 1}, {"state_version": MAX_COUNTER - 1}])
def test_beginning_is_refused_when_a_counter_is_at_its_end(end: dict[str, int]) -> None:
    with pytest.raises(StateError, match="out of bounds"):
        begun(dataclasses.replace(OLD, **end))


@pytest.mark.parametrize("engine_version", [ANY_ENGINE, ENGINE])
def test_vault_loads_what_a_vtpm_began_with(tmp_path: Path, engine_version: int) -> None:
    keeper = MemoryKeeper()
    committer = Committer(open_store(tmp_path / "vault", keeper), keeper, AnchorPolicy())
    vault = Vault(committer)
    record, states = begun(contents=Contents(STATES, engine_version))
    instance = InstanceId(record.id)
    try:
        committer.run(lambda store: store.create_vtpm(record, states)).result(10)
        committer.run(lambda store: store.bind_instance(record.id, instance)).result(10)
        vault.open_vtpm(record.id, KEY)
        if engine_version:
            with pytest.raises(StateError, match="needs engine"):
                vault.load(record.id, instance, ENGINE - 1)
        assert vault.load(record.id, instance, ENGINE) == STATES
        vault.save(record.id, instance, 1, StateKind.PERMANENT, b"next").result(10)
        assert vault.load(record.id, instance, ENGINE)[StateKind.PERMANENT] == b"next"
    finally:
        vault.close()
        committer.close()
