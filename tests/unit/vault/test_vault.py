from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest

from tests.unit.vault.world import ENGINE, KEY, MemoryKeeper, new_record, open_store
from vtpm.errors import ConflictError, NotFoundError, ProtocolError, StateError
from vtpm.instance.manager_channel import LOAD_TIMEOUT_S
from vtpm.tpm.types import MAX_STATE_BYTES, InstanceId, StateKind, VtpmId
from vtpm.vault.anchor import AnchorPolicy
from vtpm.vault.committer import SAVE_PATIENCE_S, Committer
from vtpm.vault.entries import envelope_digest
from vtpm.vault.records import SaveAck, SavedState, SaveEffect
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store
from vtpm.vault.vault import LOAD_PATIENCE_S, PermitGranted, Vault

T = TypeVar("T")
LIMIT_S = 20.0
PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE


class Manager:
    """The little of a manager that these tests need; `restart` begins a new one on the same store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.keeper = MemoryKeeper()
        self.start()

    def start(self) -> None:
        self.committer = Committer(open_store(self._folder, self.keeper), self.keeper, AnchorPolicy())
        self.vault = Vault(self.committer)

    def stop(self) -> None:
        self.vault.close()
        self.committer.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def run(self, operation: Callable[[Store], T]) -> T:
        return self.committer.run(operation).result(LIMIT_S)

    def create(self, name: str = "web1", key: bytes = KEY) -> tuple[VtpmId, InstanceId]:
        record, instance = new_record(name), InstanceId(uuid4())
        self.run(lambda store: store.create_vtpm(record))
        self.run(lambda store: store.bind_instance(record.id, instance))
        self.vault.open_vtpm(record.id, key)
        return record.id, instance

    def replace(self, vtpm_id: VtpmId, old: InstanceId) -> InstanceId:
        new = InstanceId(uuid4())
        self.run(lambda store: store.bind_instance(vtpm_id, new, replaces=old))
        return new

    def manufacture(self, name: str = "web1", key: bytes = KEY) -> tuple[VtpmId, InstanceId]:
        vtpm_id, instance = self.create(name, key)
        granted = self.vault.load(vtpm_id, instance, ENGINE)
        assert isinstance(granted, PermitGranted)
        self.save(vtpm_id, instance, 1, PERMANENT, b"first of " + name.encode(), granted.permit_id)
        return vtpm_id, instance

    def save(self, *arguments: object) -> SaveAck:
        return self.vault.save(*arguments).result(LIMIT_S)  # type: ignore[arg-type]

    def overwrite(self, vtpm_id: VtpmId, change: Callable[[SavedState], SavedState]) -> None:
        """Tamper with the stored rows, and make the root record fit: what is refused then is refused by the vault."""

        def tamper(store: Store) -> None:
            assert isinstance(store, SqliteStore)
            for state in store.read_state(vtpm_id):
                changed = change(state)
                with store._file.changing() as transaction:
                    transaction.vtpm(vtpm_id)
                    transaction.db.execute(
                        "UPDATE state SET version = ?, epoch = ?, digest = ?, envelope = ?"
                        " WHERE vtpm_id = ? AND kind = ?",
                        (
                            changed.version,
                            changed.epoch,
                            envelope_digest(changed.envelope),
                            changed.envelope,
                            vtpm_id.bytes,
                            state.kind,
                        ),
                    )

        self.run(tamper)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "vault")
    yield manager
    manager.stop()


def test_state_is_there_when_loaded_by_the_next_instance_after_a_restart(manager: Manager) -> None:
    vtpm_id, first = manager.manufacture()
    assert manager.save(vtpm_id, first, 2, PERMANENT, b"second") == SaveAck(SaveEffect.COMMITTED, 2)
    manager.save(vtpm_id, first, 3, SAVESTATE, b"suspended")
    manager.restart()
    manager.vault.open_vtpm(vtpm_id, KEY)
    second = manager.replace(vtpm_id, first)
    assert manager.vault.load(vtpm_id, second, ENGINE) == {PERMANENT: b"second", SAVESTATE: b"suspended"}


def test_plain_state_and_key_are_nowhere_when_saved(manager: Manager, tmp_path: Path) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.save(vtpm_id, instance, 2, PERMANENT, b"plain state of the guest" * 10)
    content = b"".join(path.read_bytes() for path in (tmp_path / "vault").iterdir())
    assert b"plain state" not in content
    assert KEY not in content
    session = manager.vault._sessions[vtpm_id]
    assert KEY.hex() not in repr(session)
    assert repr(KEY)[2:20] not in repr(session)


def test_permit_is_the_same_when_asked_for_again_and_gone_when_used(manager: Manager) -> None:
    vtpm_id, instance = manager.create()
    granted = manager.vault.load(vtpm_id, instance, ENGINE)
    assert manager.vault.load(vtpm_id, instance, ENGINE) == granted
    assert isinstance(granted, PermitGranted)
    assert granted.permit_id.hex() not in repr(granted)
    manager.save(vtpm_id, instance, 1, PERMANENT, b"state", granted.permit_id)
    with pytest.raises(StateError):
        manager.save(vtpm_id, instance, 2, PERMANENT, b"blank again", granted.permit_id)
    assert manager.vault.load(vtpm_id, instance, ENGINE) == {PERMANENT: b"state"}


def test_running_vtpm_saves_on_when_the_manager_restarted(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.restart()
    manager.vault.open_vtpm(vtpm_id, KEY)
    assert manager.save(vtpm_id, instance, 1, PERMANENT, b"first of web1") == SaveAck(SaveEffect.REPLAYED, 1)
    with pytest.raises(ProtocolError):
        manager.save(vtpm_id, instance, 1, PERMANENT, b"something else")
    assert manager.save(vtpm_id, instance, 2, PERMANENT, b"next").effect is SaveEffect.COMMITTED


def test_first_save_is_taken_when_the_manager_restarted_after_the_permit(manager: Manager) -> None:
    vtpm_id, instance = manager.create()
    granted = manager.vault.load(vtpm_id, instance, ENGINE)
    assert isinstance(granted, PermitGranted)
    manager.restart()
    manager.vault.open_vtpm(vtpm_id, KEY)
    assert manager.save(vtpm_id, instance, 1, PERMANENT, b"state", granted.permit_id).version == 1


def test_load_waits_longer_for_its_anchor_than_a_save_when_state_is_taken(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is had once is gone when it was taken: a load that gave up like a save would lose it."""
    vtpm_id, instance = manager.manufacture()
    manager.save(vtpm_id, instance, 2, VOLATILE, b"volatile")
    run, patience = manager.committer.run, []

    def noted(operation: Callable[[Store], T], *, patience_s: float) -> Future[T]:
        patience.append(patience_s)
        return run(operation, patience_s=patience_s)

    monkeypatch.setattr(manager.committer, "run", noted)
    manager.vault.load(vtpm_id, instance, ENGINE)
    assert patience[-1] == LOAD_PATIENCE_S > 3 * SAVE_PATIENCE_S
    assert LOAD_PATIENCE_S < LOAD_TIMEOUT_S


def test_volatile_state_is_had_once_when_loaded(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.save(vtpm_id, instance, 2, VOLATILE, b"registers")
    second = manager.replace(vtpm_id, instance)
    assert VOLATILE in manager.vault.load(vtpm_id, second, ENGINE)
    third = manager.replace(vtpm_id, second)
    assert manager.vault.load(vtpm_id, third, ENGINE) == {PERMANENT: b"first of web1"}
    assert manager.save(vtpm_id, third, 1, PERMANENT, b"after").effect is SaveEffect.COMMITTED


def test_volatile_state_is_still_there_when_an_older_engine_was_refused(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.save(vtpm_id, instance, 2, VOLATILE, b"registers")
    second = manager.replace(vtpm_id, instance)
    with pytest.raises(StateError, match=r"needs engine 0\.9\.2; this one is 0\.8\.0"):
        manager.vault.load(vtpm_id, second, 0x000800)
    assert len(manager.vault.load(vtpm_id, second, ENGINE)) == 2


def test_load_is_refused_when_two_vtpms_blobs_are_swapped(manager: Manager) -> None:
    one, one_instance = manager.manufacture("web1")
    two, two_instance = manager.manufacture("web2", bytes(32))
    states = {vtpm_id: manager.run(lambda store, v=vtpm_id: store.read_state(v))[0] for vtpm_id in (one, two)}
    manager.overwrite(one, lambda _: states[two])
    manager.overwrite(two, lambda _: states[one])
    with pytest.raises(StateError, match=f"foreign: it belongs to vTPM {two}"):
        manager.vault.load(one, one_instance, ENGINE)
    with pytest.raises(StateError, match=f"foreign: it belongs to vTPM {one}"):
        manager.vault.load(two, two_instance, ENGINE)


def test_load_is_refused_when_an_older_blob_is_put_back(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    (old,) = manager.run(lambda store: store.read_state(vtpm_id))
    manager.save(vtpm_id, instance, 2, PERMANENT, b"second")
    manager.overwrite(vtpm_id, lambda state: dataclasses.replace(state, envelope=old.envelope))
    with pytest.raises(StateError, match="older version: 1, not 2"):
        manager.vault.load(vtpm_id, instance, ENGINE)


@pytest.mark.parametrize("change", [{"version": 9}, {"epoch": 2}])
def test_load_is_refused_when_row_is_later_than_the_record(manager: Manager, change: dict[str, int]) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.overwrite(vtpm_id, lambda state: dataclasses.replace(state, **change))
    with pytest.raises(StateError, match="later than"):
        manager.vault.load(vtpm_id, instance, ENGINE)


@pytest.mark.parametrize("envelope", [b"", b"x", bytes(200)])
def test_load_is_refused_when_blob_is_no_envelope(manager: Manager, envelope: bytes) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.overwrite(vtpm_id, lambda state: dataclasses.replace(state, envelope=envelope))
    with pytest.raises(StateError, match="damaged"):
        manager.vault.load(vtpm_id, instance, ENGINE)


def test_load_is_refused_when_key_is_not_the_vtpms(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.vault.close_vtpm(vtpm_id)
    manager.vault.open_vtpm(vtpm_id, bytes(32))
    with pytest.raises(StateError, match="another key"):
        manager.vault.load(vtpm_id, instance, ENGINE)


def test_load_and_save_are_refused_when_instance_is_not_bound(manager: Manager) -> None:
    vtpm_id, _ = manager.manufacture()
    stranger = InstanceId(uuid4())
    with pytest.raises(ConflictError, match="not bound"):
        manager.vault.load(vtpm_id, stranger, ENGINE)
    with pytest.raises(ConflictError, match="not bound"):
        manager.save(vtpm_id, stranger, 1, PERMANENT, b"state")


def test_nothing_can_be_done_when_vtpm_is_not_open(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.vault.close_vtpm(vtpm_id)
    manager.vault.close_vtpm(vtpm_id)
    with pytest.raises(ConflictError, match="not open"):
        manager.vault.load(vtpm_id, instance, ENGINE)
    with pytest.raises(ConflictError, match="not open"):
        manager.vault.save(vtpm_id, instance, 2, PERMANENT, b"state")
    with pytest.raises(NotFoundError):
        manager.vault.open_vtpm(VtpmId(uuid4()), KEY)


def test_second_opening_is_refused_when_vtpm_is_open(manager: Manager) -> None:
    vtpm_id, _ = manager.manufacture()
    with pytest.raises(ConflictError, match="open in the vault already"):
        manager.vault.open_vtpm(vtpm_id, KEY)


def test_save_is_refused_when_nothing_was_loaded(manager: Manager) -> None:
    vtpm_id, instance = manager.create()
    with pytest.raises(ConflictError, match="has not loaded"):
        manager.vault.save(vtpm_id, instance, 1, PERMANENT, b"state")


def test_save_is_refused_when_too_large_and_taken_when_as_large_as_can_be(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    with pytest.raises(ProtocolError, match="can be kept"):
        manager.vault.save(vtpm_id, instance, 2, PERMANENT, bytes(MAX_STATE_BYTES + 1))
    manager.save(vtpm_id, instance, 2, PERMANENT, bytes(MAX_STATE_BYTES))
    assert manager.vault.load(vtpm_id, instance, ENGINE) == {PERMANENT: bytes(MAX_STATE_BYTES)}


def test_kind_is_gone_when_saved_empty(manager: Manager) -> None:
    vtpm_id, instance = manager.manufacture()
    manager.save(vtpm_id, instance, 2, SAVESTATE, b"suspended")
    manager.save(vtpm_id, instance, 3, SAVESTATE, b"")
    assert list(manager.vault.load(vtpm_id, instance, ENGINE)) == [PERMANENT]
