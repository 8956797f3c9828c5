"""Attacks on the list of images that may run vTPMs, by somebody who may write the vault's files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.security.stored_host import Host
from tests.unit.vault.test_launch_policy import IMAGE, OTHER
from vtpm.errors import StateError
from vtpm.vault.launch_policy import ImageState

RETIRED = replace(IMAGE, state=ImageState.RETIRED)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with two images, of which one was retired later."""
    host = Host(tmp_path)
    host.start()
    host.make("web1")
    host.run(lambda store: store.put_image(IMAGE))
    host.run(lambda store: store.put_image(OTHER))
    host.before = host.copy()  # type: ignore[attr-defined]
    host.run(lambda store: store.put_image(RETIRED))
    yield host
    host.stop()


def edit(host: Host, statements: str) -> None:
    with closing(sqlite3.connect(host.folder / "vtpm.db", isolation_level=None)) as db:
        db.executescript(statements)


EDITS = [
    "UPDATE launch_image SET state = 'allowed'",
    "UPDATE launch_image SET state = 'retired'",
    "UPDATE launch_image SET measurement = lower(hex(zeroblob(32))) WHERE label = 'second'",
    "UPDATE launch_image SET kind = 'qemu' WHERE label = 'second'",
    "UPDATE launch_image SET engine_version = engine_version + 1 WHERE label = 'second'",
    "DELETE FROM launch_image WHERE label = 'first'",
    "DELETE FROM launch_image",
    # Else the missing table itself is refused: a store of the schema before has none.
    "DROP TABLE launch_image; DROP TABLE holding; UPDATE vault_schema SET version = 2",
    "INSERT INTO launch_image SELECT 'xen', measurement, label, engine_version, state, changed_at_us FROM launch_image"
    " WHERE label = 'second'",
]


@pytest.mark.parametrize("statement", EDITS)
def test_store_is_refused_when_the_list_of_images_was_edited(host: Host, statement: str) -> None:
    host.stop()
    edit(host, statement)
    host.refused("not those that its root record stands for")


def test_store_is_refused_when_the_whole_list_is_put_back_to_an_older_one(host: Host) -> None:
    host.stop()
    with closing(sqlite3.connect(host.before / "vtpm.db")) as old:  # type: ignore[attr-defined]
        rows = old.execute("SELECT * FROM launch_image").fetchall()
    with closing(sqlite3.connect(host.folder / "vtpm.db", isolation_level=None)) as db:
        db.execute("DELETE FROM launch_image")
        db.executemany("INSERT INTO launch_image VALUES (?, ?, ?, ?, ?, ?)", rows)
    host.refused("not those that its root record stands for")


def test_store_is_refused_when_it_is_put_back_with_its_root_record_to_before_a_retirement(host: Host) -> None:
    host.stop()
    host.put_back(host.before)  # type: ignore[attr-defined]
    host.refused("is older than")


def test_list_is_refused_when_it_is_edited_under_a_running_manager(host: Host) -> None:
    def under_it(store: object) -> None:
        with store._file.reading() as db:  # type: ignore[attr-defined]
            db.execute("UPDATE launch_image SET state = 'allowed'")

    host.run(under_it)  # type: ignore[arg-type]
    for operation in (lambda store: store.list_images(), lambda store: store.put_image(OTHER)):
        with pytest.raises(StateError, match="launch policy is not the one that was written"):
            host.run(operation)  # type: ignore[arg-type]
