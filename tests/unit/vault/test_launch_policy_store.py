"""The launch policy in a store: durable with its event, part of the root record, made on first use in older stores."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.vault.test_launch_policy import IMAGE, OTHER, QEMU
from tests.unit.vault.world import CREATED, MemoryKeeper, manufacture, new_record, open_store
from vtpm.errors import ConflictError, StateError, UsageError
from vtpm.vault import launch_policy
from vtpm.vault.launch_policy import ImageState
from vtpm.vault.merkle import POLICY_SLOT
from vtpm.vault.records import DomainKind, Event
from vtpm.vault.sqlite_store import SqliteStore

EVENT = Event(CREATED, 0, "image_allowed")


def older(folder: Path) -> Path:
    """Make a store of schema version 2, with a vTPM in it."""
    store = open_store(folder)
    manufacture(store)
    store.close()
    database = folder / "vtpm.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("DROP TABLE launch_image")
        db.execute("DROP TABLE holding")
        db.execute("UPDATE vault_schema SET version = 2")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return database


def schema_version(database: Path) -> int:
    with closing(sqlite3.connect(database)) as db:
        (version,) = db.execute("SELECT version FROM vault_schema").fetchone()
    return int(version)


def anchored(store: SqliteStore) -> MemoryKeeper:
    return MemoryKeeper(store.value)


def test_images_are_there_with_their_events_when_reopened(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    assert store.list_images() == []
    for image in (QEMU, OTHER, IMAGE):
        version = store.value.version
        store.put_image(image, event=EVENT)
        # Written with its event in one transaction, and nothing may count before that is anchored.
        assert store.value.version == store.prompt_version == version + 1
    gone = replace(OTHER, state=ImageState.RETIRED)
    store.put_image(gone)
    keeper = anchored(store)
    store.close()
    again = open_store(tmp_path / "vault", keeper)
    assert again.list_images() == [IMAGE, gone, QEMU]
    assert [event.kind for event in again.list_events()] == ["image_allowed"] * 3
    again.close()


def test_record_stays_as_it_is_when_an_image_is_put_again_that_is_the_same(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    store.put_image(IMAGE)
    value = store.value
    store.put_image(IMAGE)
    assert store.value == value
    store.close()


def test_image_is_refused_when_it_is_out_of_bounds_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "vault")
    with pytest.raises(UsageError):
        store.put_image(replace(IMAGE, kind=""), event=EVENT)
    monkeypatch.setattr(launch_policy, "MAX_IMAGES", 1)
    store.put_image(IMAGE)
    value = store.value
    with pytest.raises(ConflictError):
        store.put_image(OTHER, event=EVENT)
    assert (store.value, store.list_images(), store.list_events()) == (value, [IMAGE], [])
    store.close()


def test_store_of_the_schema_before_keeps_it_and_its_root_until_the_first_image(tmp_path: Path) -> None:
    database = older(tmp_path / "vault")
    store = open_store(tmp_path / "vault")
    value = store.value
    assert store.list_images() == []
    store.create_vtpm(new_record("web2"))
    keeper = anchored(store)
    store.close()
    assert schema_version(database) == 2
    store = open_store(tmp_path / "vault", keeper)
    assert store.value.version == value.version + 1
    store.put_image(IMAGE, event=EVENT)
    keeper = anchored(store)
    store.close()
    assert schema_version(database) == 5
    store = open_store(tmp_path / "vault", keeper)
    assert store.list_images() == [IMAGE]
    assert [record.name for record in store.list_vtpms()] == ["web1", "web2"]
    store.close()


@pytest.mark.parametrize("version", [2, 3])
def test_store_of_a_schema_before_keeps_it_until_the_first_vtpm_of_another_make(tmp_path: Path, version: int) -> None:
    database = older(tmp_path / "vault")
    keeper = None
    if version == 3:
        store = open_store(tmp_path / "vault")
        store.put_image(IMAGE)
        keeper = anchored(store)
        store.close()
        with closing(sqlite3.connect(database, isolation_level=None)) as db:
            db.execute("DROP TABLE holding")
            db.execute("UPDATE vault_schema SET version = 3")
    store = open_store(tmp_path / "vault", keeper)
    store.create_vtpm(new_record("web2"))
    images = store.list_images()
    keeper = anchored(store)
    store.close()
    assert schema_version(database) == version
    store = open_store(tmp_path / "vault", keeper)
    foreign = replace(new_record("web3"), domain=DomainKind.QEMU_SWTPM)
    store.create_vtpm(foreign)
    keeper = anchored(store)
    store.close()
    assert schema_version(database) == 5
    store = open_store(tmp_path / "vault", keeper)
    assert store.find_vtpm("web3") == foreign
    assert store.list_images() == images
    store.put_image(OTHER)
    store.close()


def test_vtpms_take_the_slots_that_they_would_without_a_policy(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    for number in range(3):
        store.create_vtpm(new_record(f"web{number}"))
        store.put_image(replace(IMAGE, label=str(number)))
    second = store.find_vtpm("web1")
    store.delete_vtpm(second.id)
    keeper = anchored(store)
    store.close()
    store = open_store(tmp_path / "vault", keeper)
    store.create_vtpm(new_record("again"))
    store.create_vtpm(new_record("last"))
    with store._file.reading() as db:
        slots = dict(db.execute("SELECT name, slot FROM vtpm"))
    assert slots == {"web0": 0, "again": 1, "web2": 2, "last": 3}
    store.close()


def test_store_is_refused_when_a_vtpm_has_the_slot_of_the_policy(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    store.create_vtpm(new_record("web1"))
    store.close()
    with closing(sqlite3.connect(tmp_path / "vault" / "vtpm.db", isolation_level=None)) as db:
        db.execute("UPDATE vtpm SET slot = ?", (POLICY_SLOT,))
    with pytest.raises(StateError, match="the slot of the launch policy"):
        open_store(tmp_path / "vault")
