"""What is special to the SQLite store: its file, and what is refused when that was tampered with or lost."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.vault.world import manufacture, new_record, open_store
from vtpm.errors import StateError, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vault"


def filled(folder: Path) -> Path:
    """A closed store with three vTPMs; returns its database."""
    with closing(open_store(folder)) as store:
        for name in ("a", "b", "c"):
            manufacture(store, name)
    return folder / "vtpm.db"


def refused_and_kept(folder: Path, cause: str) -> None:
    database = folder / "vtpm.db"
    before = database.read_bytes()
    with pytest.raises(StateError, match=cause) as refusal:
        open_store(folder)
    assert str(folder) in str(refusal.value)
    assert database.read_bytes() == before


def execute(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON event BEGIN UPDATE vtpm SET owner_uid = 1; END",
        "CREATE VIEW v AS SELECT * FROM vtpm",
        "CREATE TABLE t (a)",
        "CREATE INDEX i ON vtpm (lower(name))",
        "ALTER TABLE event ADD COLUMN more TEXT",
        "DROP TABLE save_mark",
    ],
)
def test_store_is_refused_when_its_schema_is_not_the_one_it_was_made_with(folder: Path, statement: str) -> None:
    execute(filled(folder), statement)
    refused_and_kept(folder, "its schema is not the one that it was made with")


def test_directory_and_files_are_private_when_made_under_a_lax_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        with closing(open_store(folder)) as store:
            manufacture(store)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    finally:
        os.umask(before)
    assert modes == {"vault": 0o700, "vtpm.db": 0o600, "vtpm.db-wal": 0o600}


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_directory_is_refused_when_open_to_others(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StateError, match="open to others"):
        open_store(folder)
    assert list(folder.iterdir()) == []


def test_database_is_refused_when_readable_by_others(folder: Path) -> None:
    filled(folder).chmod(0o644)
    refused_and_kept(folder, "open to others")


def test_database_is_refused_when_it_is_a_link(folder: Path, tmp_path: Path) -> None:
    database = filled(folder)
    database.rename(tmp_path / "elsewhere")
    database.symlink_to(tmp_path / "elsewhere")
    refused_and_kept(folder, "symbolic link")


def test_second_store_is_refused_when_one_is_open(folder: Path) -> None:
    with closing(open_store(folder)), pytest.raises(StoreError, match="in use by another process"):
        open_store(folder)
    open_store(folder).close()


def test_second_process_is_refused_when_store_is_open(folder: Path) -> None:
    script = "import sys; from pathlib import Path; from tests.unit.vault.world import open_store;"
    script += "open_store(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with closing(open_store(folder)):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert "in use by another process" in result.stderr
    assert subprocess.run(command, env=environment, timeout=30).returncode == 0


def test_store_is_not_begun_anew_when_database_is_empty(folder: Path) -> None:
    os.truncate(filled(folder), 0)
    refused_and_kept(folder, "damaged")


def test_store_is_not_begun_anew_when_only_the_log_is_left(folder: Path) -> None:
    database = filled(folder)
    database.rename(folder / "vtpm.db-wal")
    with pytest.raises(StateError, match="missing although"):
        open_store(folder)
    assert [path.name for path in folder.iterdir()] == ["vtpm.db-wal"]


@pytest.mark.parametrize("leftover", ["", "-journal", "-wal"])
def test_store_is_made_when_an_earlier_making_was_interrupted(folder: Path, leftover: str) -> None:
    folder.mkdir(mode=0o700)
    (folder / f"vtpm.db.new{leftover}").write_bytes(b"half made")
    with closing(open_store(folder)) as store:
        manufacture(store)
    assert [path.name for path in folder.iterdir()] == ["vtpm.db"]


def test_second_name_is_removed_when_making_was_interrupted_after_the_link(folder: Path) -> None:
    database = filled(folder)
    (folder / "vtpm.db.new").hardlink_to(database)
    with closing(open_store(folder)) as store:
        assert len(store.list_vtpms()) == 3
    assert [path.name for path in folder.iterdir()] == ["vtpm.db"]


def test_what_is_left_of_a_view_changes_nothing_when_checking_was_interrupted(folder: Path) -> None:
    database = filled(folder)
    (folder / "vtpm.db.check").hardlink_to(database)
    for name in ("vtpm.db.check-wal", "vtpm.db.check-shm"):
        (folder / name).write_bytes(b"half copied")
    with closing(open_store(folder)) as store:
        assert len(store.list_vtpms()) == 3
    assert [path.name for path in folder.iterdir()] == ["vtpm.db"]


def test_database_is_refused_when_cut_at_any_page(folder: Path) -> None:
    content = filled(folder).read_bytes()
    for length in [*range(1, 200, 33), *range(4096, len(content), 4096), len(content) - 1]:
        (folder / "vtpm.db").write_bytes(content[:length])
        refused_and_kept(folder, "damaged")


def test_database_is_refused_when_pages_are_overwritten(folder: Path) -> None:
    content = filled(folder).read_bytes()
    for start in range(4096, len(content), 4096):
        (folder / "vtpm.db").write_bytes(content[:start] + b"\xa5" * 4096 + content[start + 4096 :])
        refused_and_kept(folder, "damaged")


def test_nothing_but_our_errors_comes_when_bytes_are_changed_at_random(folder: Path) -> None:
    """SQLite has no checksums: a change inside a row may pass here, and then fails when the envelope is opened."""
    content = filled(folder).read_bytes()
    chance = random.Random(20260101)
    refusals = 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(8):
            changed[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        (folder / "vtpm.db").write_bytes(changed)
        try:
            with closing(open_store(folder)) as store:
                for record in store.list_vtpms():
                    store.read_state(record.id)
                    store.last_save(record.id)
                store.list_events()
        except StateError:
            refusals += 1
    assert refusals > 100


def test_database_is_refused_when_of_another_application(folder: Path) -> None:
    database = filled(folder)
    execute(database, "PRAGMA application_id=1")
    refused_and_kept(folder, "application id is 0x1")


def test_database_is_refused_when_its_schema_is_newer(folder: Path) -> None:
    database = filled(folder)
    execute(database, "UPDATE vault_schema SET version = 6")
    refused_and_kept(folder, "schema version 6")


def test_database_is_refused_when_of_the_schema_before_the_first_release(folder: Path) -> None:
    database = filled(folder)
    execute(database, "UPDATE vault_schema SET version = 1", "DROP TABLE root")
    refused_and_kept(folder, "schema version 1, of a time before the first release")


@pytest.mark.parametrize(
    "statement", ["DROP TABLE vault_schema", "DELETE FROM vault_schema", "UPDATE vault_schema SET version = 0"]
)
def test_database_is_refused_when_its_schema_is_not_told(folder: Path, statement: str) -> None:
    execute(filled(folder), statement)
    refused_and_kept(folder, "damaged")


@pytest.mark.parametrize("table", ["root", "vtpm", "state", "save_mark", "event"])
def test_database_is_refused_when_a_table_is_missing(folder: Path, table: str) -> None:
    execute(filled(folder), f"DROP TABLE {table}")
    refused_and_kept(folder, r"vtpm\.db is damaged")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE vtpm SET tpm_version = '3.0'",
        "UPDATE vtpm SET domain = 'cloud'",
        "UPDATE vtpm SET created_at_us = 9000000000000000000",
    ],
)
def test_row_is_refused_when_no_program_of_ours_wrote_it(folder: Path, statement: str) -> None:
    execute(filled(folder), statement)
    refused_and_kept(folder, "damaged")


def test_wrapped_key_is_nowhere_in_the_files_when_vtpm_is_deleted(folder: Path) -> None:
    with closing(open_store(folder)) as store:
        bound, sibling = manufacture(store, "web1"), manufacture(store, "web2")
        assert any(bound.record.wrapped_key in path.read_bytes() for path in folder.iterdir())
        store.unbind_instance(bound.id, bound.instance)
        store.delete_vtpm(bound.id)
        content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert bound.record.wrapped_key not in content
    assert bound.id.bytes not in content
    assert sibling.record.wrapped_key in content


def test_store_is_usable_again_when_reopened(folder: Path) -> None:
    with closing(open_store(folder)) as store:
        store.create_vtpm(new_record())
        store.reopen()
        assert len(store.list_vtpms()) == 1
    with pytest.raises(StoreError, match="not open"):
        store.list_vtpms()


def test_owners_are_found_by_an_index_when_the_database_was_made_without_it(folder: Path) -> None:
    execute(filled(folder), "DROP INDEX vtpm_by_owner")
    with closing(open_store(folder)) as store:
        assert len(store.list_vtpms(owner_uid=1000)) == 3
    with closing(sqlite3.connect(folder / "vtpm.db")) as db:
        query = "EXPLAIN QUERY PLAN SELECT * FROM vtpm WHERE owner_uid = 1 AND name > 'a' ORDER BY name LIMIT 9"
        plan = " ".join(row[3] for row in db.execute(query))
    assert "vtpm_by_owner" in plan
    assert "TEMP B-TREE" not in plan
