"""Attacks on the vault's files by somebody who may write them but holds neither the root key nor the platform TPM.

The store's content is one anchored value: whatever is older, edited, forked or gone is refused, and stays as evidence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.security.stored_host import EACH_COMMIT, LIMIT_S, Host
from tests.unit.vault.world import CREATED, ENGINE, HELD, KEY, LEAVING, MAC_KEY, MOVED
from vtpm.errors import StateError, StoreError
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, VtpmId
from vtpm.vault.anchor import AnchorMode, AnchorPolicy
from vtpm.vault.merkle import MerkleTree
from vtpm.vault.records import Event
from vtpm.vault.root_record import NOTHING_ANCHORED, RECORD_BYTES, AnchorValue, decode
from vtpm.vault.sqlite_anchored import _all_leaves
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store

DAY_S = 86400.0
DAILY = AnchorPolicy(DAY_S)
WORD = Event(CREATED, 0, "reanchored", detail='{"why": "the platform TPM was replaced"}')


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.keeper.go_on()
    host.stop()


@pytest.fixture
def stopped(host: Host) -> Host:
    """Two vTPMs, one of which saved twice; anchored and stopped."""
    host.start()
    one = host.make("web1")
    host.make("web2")
    host.save(one, b"second of web1").result(LIMIT_S)
    host.stop()
    return host


# An older state


def test_load_is_refused_when_an_older_blob_is_put_back(host: Host) -> None:
    host.start()
    vtpm = host.make()
    (old,) = host.run(lambda store: store.read_state(vtpm[0]))
    host.save(vtpm, b"second").result(LIMIT_S)
    host.stop()
    host.execute("UPDATE state SET envelope = ?", values=(old.envelope,))
    host.start()
    host.vault.open_vtpm(vtpm[0], KEY)
    with pytest.raises(StateError, match="edited: permanent state of vTPM"):
        host.vault.load(*vtpm, ENGINE)


def test_store_is_refused_when_an_older_blob_is_put_back_with_its_row(host: Host) -> None:
    host.start()
    vtpm = host.make()
    host.stop()
    with closing(sqlite3.connect(host.folder / "vtpm.db")) as db:
        (row,) = db.execute("SELECT version, epoch, digest, envelope FROM state").fetchall()
        (state_version,) = db.execute("SELECT state_version FROM vtpm").fetchone()
        (mark,) = db.execute("SELECT seq, digest, version FROM save_mark").fetchall()
    host.start()
    host.save(vtpm, b"second").result(LIMIT_S)
    host.stop()
    host.execute("UPDATE state SET version = ?, epoch = ?, digest = ?, envelope = ?", values=row)
    host.execute("UPDATE vtpm SET state_version = ?", values=(state_version,))
    host.execute("UPDATE save_mark SET seq = ?, digest = ?, version = ?", values=mark)
    host.refused("edited: its rows are not those")


def test_store_is_refused_when_blob_metadata_and_root_record_are_put_back_at_once(host: Host) -> None:
    host.start()
    vtpm = host.make()
    host.stop()
    old = host.copy()
    host.start()
    host.save(vtpm, b"second").result(LIMIT_S)
    host.stop()
    newest = host.copy()
    host.put_back(old)
    host.refused("older than the anchor")
    host.put_back(newest)
    host.start()
    assert host.content(vtpm) == b"second"


def test_store_is_refused_when_put_back_to_before_a_deletion(stopped: Host) -> None:
    old = stopped.copy()
    stopped.start()
    record = stopped.run(lambda store: store.find_vtpm("web2"))
    assert record.instance_id is not None
    instance = record.instance_id
    stopped.run(lambda store: store.unbind_instance(record.id, instance))
    stopped.run(lambda store: store.delete_vtpm(record.id))
    stopped.crash()
    stopped.put_back(old)
    stopped.refused("older than the anchor")


@pytest.mark.parametrize("policy", [EACH_COMMIT, DAILY])
def test_store_is_refused_when_put_back_to_before_a_vtpm_was_moved(stopped: Host, policy: AnchorPolicy) -> None:
    old = stopped.copy()
    stopped.start(policy)
    record = stopped.run(lambda store: store.find_vtpm("web2"))
    stopped.run(lambda store: store.record_move(record.id, HELD, LEAVING))
    stopped.run(lambda store: store.record_move(record.id, LEAVING, MOVED))
    stopped.crash()
    stopped.put_back(old)
    stopped.refused("older than the anchor", policy)


# Forks


def unanswered(host: Host, vtpm: tuple[VtpmId, InstanceId], data: bytes) -> Path:
    """Die between the transaction and its anchor; returns the files."""
    host.keeper.hang()
    attempts = host.keeper.attempts
    saved = host.save(vtpm, data)
    host.keeper.await_attempts(attempts + 1)
    assert not saved.done()
    died, anchor = host.copy(), host.keeper.value
    host.keeper.go_on()
    host.stop()
    host.keeper.value = anchor
    return died


def test_only_one_is_accepted_when_crashes_left_two_different_next_records(host: Host) -> None:
    host.start()
    vtpm = host.make()
    host.stop()
    before, anchor = host.copy(), host.keeper.value
    host.start()
    one = unanswered(host, vtpm, b"one future")
    host.put_back(before)
    host.start()
    other = unanswered(host, vtpm, b"another future")
    assert host.keeper.value == anchor
    host.put_back(one)
    host.start()
    assert host.keeper.value.version == anchor.version + 1
    assert host.content(vtpm) == b"one future"
    host.crash()
    host.put_back(other)
    host.refused("forked")
    host.put_back(before)
    host.refused("older than the anchor")


def test_store_is_refused_when_it_went_on_from_an_anchor_that_another_overtook(host: Host) -> None:
    host.start(DAILY)
    vtpm = host.make()
    host.stop()
    before = host.copy()
    host.start(DAILY)
    for number in range(5):
        host.save(vtpm, b"long branch %d" % number).result(LIMIT_S)
    host.crash()
    long_branch = host.copy()
    host.put_back(before)
    host.start(DAILY)
    host.save(vtpm, b"short branch").result(LIMIT_S)
    host.stop()
    host.put_back(long_branch)
    host.refused("forked", DAILY)


def test_store_is_refused_when_it_is_another_of_the_same_host(host: Host) -> None:
    host.start()
    host.make()
    host.stop()
    mine, anchor = host.copy(), host.keeper.value
    shutil.rmtree(host.folder)
    host.keeper.value = NOTHING_ANCHORED
    host.start()
    host.make()
    host.stop()
    assert host.keeper.value.version == anchor.version
    host.put_back(mine)
    host.refused("forked")


# Edited content

EDITS = {
    "owner": "UPDATE vtpm SET owner_uid = 0 WHERE name = 'web1'",
    "group": "UPDATE vtpm SET owner_gid = 0 WHERE name = 'web1'",
    "life cycle": "UPDATE vtpm SET lifecycle = 'moved' WHERE name = 'web1'",
    "epoch": "UPDATE vtpm SET epoch = 2 WHERE name = 'web1'",
    "name": "UPDATE vtpm SET name = 'web3' WHERE name = 'web1'",
    "VM": "UPDATE vtpm SET vm_uuid = NULL WHERE name = 'web1'",
    "TPM version": "UPDATE vtpm SET tpm_version = '1.2' WHERE name = 'web1'",
    "domain": "UPDATE vtpm SET domain = 'xen' WHERE name = 'web1'",
    "time of creation": "UPDATE vtpm SET created_at_us = created_at_us + 1 WHERE name = 'web1'",
    "permit": "UPDATE vtpm SET permit_state = 'issued' WHERE name = 'web1'",
    "permit's id": "UPDATE vtpm SET permit_id = zeroblob(16) WHERE name = 'web1'",
    "wrapped key": "UPDATE vtpm SET wrapped_key = x'00' WHERE name = 'web1'",
    "no wrapped key": "UPDATE vtpm SET wrapped_key = NULL WHERE name = 'web1'",
    "state version": "UPDATE vtpm SET state_version = 1 WHERE name = 'web1'",
    "instance": "UPDATE vtpm SET instance_id = NULL WHERE name = 'web1'",
    "engine": "UPDATE vtpm SET engine_version = 1 WHERE name = 'web1'",
    "state's version": "UPDATE state SET version = 1",
    "state's epoch": "UPDATE state SET epoch = 2",
    "state's kind": "UPDATE state SET kind = 3",
    "state's digest": "UPDATE state SET digest = zeroblob(32)",
    "state gone": "DELETE FROM state",
    "mark's number": "UPDATE save_mark SET seq = 0",
    "mark's digest": "UPDATE save_mark SET digest = zeroblob(32)",
    "mark gone": "DELETE FROM save_mark",
    "vTPM gone": "DELETE FROM vtpm WHERE name = 'web1'",
    "slot": "UPDATE vtpm SET slot = 7 WHERE name = 'web1'",
    "last event gone": "DELETE FROM event WHERE event_id = (SELECT max(event_id) FROM event)",
    "event added": "INSERT INTO event SELECT event_id + 9, 0, 0, kind, NULL, NULL, detail, head FROM event LIMIT 1",
}


@pytest.mark.parametrize("edit", EDITS)
def test_store_is_refused_when_a_row_is_edited(stopped: Host, edit: str) -> None:
    stopped.execute("PRAGMA foreign_keys=OFF", EDITS[edit])
    stopped.refused("edited")


def test_store_is_refused_when_a_sibling_is_made_of_a_vtpms_row(stopped: Host) -> None:
    stopped.execute(
        "INSERT INTO vtpm SELECT zeroblob(16), 2, 'evil', 1000, owner_gid, vm_uuid, tpm_version, domain, created_at_us,"
        " epoch, lifecycle, permit_state, permit_id, wrapped_key, state_version, NULL, engine_version"
        " FROM vtpm WHERE name = 'web1'"
    )
    stopped.refused("edited")


def test_store_is_refused_when_state_of_nobody_is_added(stopped: Host) -> None:
    stopped.execute(
        "PRAGMA foreign_keys=OFF",
        "INSERT INTO state SELECT zeroblob(16), kind, version, epoch, digest, envelope FROM state LIMIT 1",
    )
    stopped.refused("edited: it holds state of vTPMs that are not in its registry")


def swap(host: Host, *columns: str) -> None:
    with closing(sqlite3.connect(host.folder / "vtpm.db", isolation_level=None)) as db:
        rows = db.execute(f"SELECT vtpm_id, {', '.join(columns)} FROM state ORDER BY vtpm_id").fetchall()
        assert len(rows) == 2
        for (owner, *_), (_, *values) in zip(rows, reversed(rows), strict=True):
            changes = ", ".join(f"{column} = ?" for column in columns)
            db.execute(f"UPDATE state SET {changes} WHERE vtpm_id = ?", (*values, owner))


def test_loads_are_refused_when_two_vtpms_blobs_are_swapped(stopped: Host) -> None:
    swap(stopped, "envelope")
    stopped.start()
    for record in stopped.run(lambda store: store.list_vtpms()):
        assert record.instance_id is not None
        stopped.vault.open_vtpm(record.id, KEY)
        with pytest.raises(StateError, match="is not what was saved"):
            stopped.vault.load(record.id, record.instance_id, ENGINE)


def test_store_is_refused_when_two_vtpms_blobs_are_swapped_with_their_digests(stopped: Host) -> None:
    swap(stopped, "envelope", "digest")
    stopped.refused("edited: its rows")


@pytest.mark.parametrize(
    "edit", ["UPDATE event SET detail = '{\"x\": 1}' WHERE event_id = 1", "DELETE FROM event WHERE event_id = 1"]
)
def test_listing_is_refused_when_an_earlier_event_is_edited(stopped: Host, edit: str) -> None:
    stopped.execute(edit)
    stopped.start()
    with pytest.raises(StateError, match="of the audit log is not the one that was written"):
        stopped.run(lambda store: store.list_events())


def test_newest_event_of_a_kind_is_refused_when_it_was_edited(stopped: Host) -> None:
    stopped.execute("UPDATE event SET detail = '{\"x\": 1}' WHERE event_id = 1")
    stopped.start()
    one, two = (stopped.run(lambda store, name=name: store.find_vtpm(name)) for name in ("web1", "web2"))
    with pytest.raises(StateError, match="event 1 of the audit log is not the one that was written"):
        stopped.run(lambda store: store.last_event(one.id, "created"))
    assert stopped.run(lambda store: store.last_event(two.id, "created")) is not None


def test_vtpm_alone_is_refused_and_not_signed_when_its_row_is_edited_under_a_running_manager(host: Host) -> None:
    host.start()
    victim, sibling = host.make("web1"), host.make("web2")

    def edit(store: Store) -> None:
        assert isinstance(store, SqliteStore)
        with store._file.reading() as db:
            db.execute("UPDATE vtpm SET owner_uid = 0 WHERE id = ?", (victim[0].bytes,))

    host.run(edit)
    with pytest.raises(StateError, match="edited: the rows of vTPM web1"):
        host.save(victim, b"second").result(LIMIT_S)
    with pytest.raises(StateError, match="edited"):
        host.run(lambda store: store.get_vtpm(victim[0]))
    with pytest.raises(StateError, match="edited"):
        host.run(lambda store: store.set_lifecycle(victim[0], "running"))
    host.save(sibling, b"second").result(LIMIT_S)
    host.stop()
    host.refused("edited")


# The root record


def set_record(host: Host, record: bytes) -> None:
    host.execute("UPDATE root SET record = ?", values=(record,))


def stored_record(host: Host) -> bytes:
    with closing(sqlite3.connect(host.folder / "vtpm.db")) as db:
        record: bytes
        (record,) = db.execute("SELECT record FROM root").fetchone()
    return record


def stored_tree(host: Host) -> bytes:
    """The root of the tree over the rows as they are."""
    with closing(sqlite3.connect(host.folder / "vtpm.db")) as db:
        return MerkleTree(_all_leaves(db, "it")).root


def test_store_is_refused_when_any_byte_of_the_root_record_is_changed(stopped: Host) -> None:
    whole = stored_record(stopped)
    assert len(whole) == RECORD_BYTES
    for place in range(RECORD_BYTES):
        set_record(stopped, whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        with pytest.raises(StateError):
            stopped.start()
    set_record(stopped, whole)
    stopped.start()


@pytest.mark.parametrize("length", [0, 1, 8, 16, RECORD_BYTES - 32, RECORD_BYTES - 1, RECORD_BYTES + 1])
def test_store_is_refused_when_the_root_record_is_cut_or_longer(stopped: Host, length: int) -> None:
    set_record(stopped, (stored_record(stopped) + b"\0")[:length])
    stopped.refused("damaged")


def test_store_is_refused_when_a_next_record_was_forged_without_the_root_key(stopped: Host) -> None:
    """By what is no secret: the record's form, the tree's hashes, the anchored value and the key's id."""
    whole = decode("it", stored_record(stopped), MAC_KEY)
    stopped.execute("UPDATE vtpm SET owner_uid = 0 WHERE name = 'web1'")
    for tree in (stored_tree(stopped), whole.tree):
        forged = dataclasses.replace(
            whole, version=whole.version + 1, tree=tree, base=stopped.keeper.value, attempted=stopped.keeper.value
        )
        set_record(stopped, forged.encode(Secret(bytes(32))))
        stopped.refused("edited")


def test_store_is_refused_when_the_root_record_is_gone(stopped: Host) -> None:
    stopped.execute("DELETE FROM root")
    stopped.refused("damaged")


def test_store_is_refused_when_the_root_record_alone_is_put_back(host: Host) -> None:
    host.start()
    vtpm = host.make()
    host.stop()
    old = stored_record(host)
    host.start()
    host.save(vtpm, b"second").result(LIMIT_S)
    host.stop()
    set_record(host, old)
    host.refused("edited: its rows")


def test_store_is_refused_when_it_is_under_another_root_key(stopped: Host) -> None:
    before = stopped.files()
    with pytest.raises(StateError, match="foreign"):
        SqliteStore(stopped.folder, Secret(bytes(32)), stopped.keeper)
    assert stopped.files() == before


@pytest.mark.parametrize("cause", ["older than the anchor", "forked", "edited"])
def test_no_byte_of_file_and_log_changes_when_a_store_with_a_log_is_refused(host: Host, cause: str) -> None:
    host.start()
    vtpm = host.make()
    before = host.copy()
    died = unanswered(host, vtpm, b"second") if cause == "forked" else before
    if cause != "edited":
        host.put_back(before)
        host.start()
        host.save(vtpm, b"another second").result(LIMIT_S)
        host.save(vtpm, b"third").result(LIMIT_S)
        host.stop()
    if cause == "forked":
        host.keeper.value = AnchorValue(host.keeper.value.version - 1, bytes(32))
    host.stop()
    host.put_back(died)
    if cause == "edited":
        host.keeper.value = NOTHING_ANCHORED
        other = sqlite3.connect(host.folder / "vtpm.db", isolation_level=None)
        other.execute("UPDATE vtpm SET owner_uid = 4242")
        died = host.copy()
        other.close()
        host.put_back(died)
        (host.folder / "vtpm.db-shm").unlink()
    assert (host.folder / "vtpm.db-wal").stat().st_size > 0
    host.refused(cause)


# What is gone


def test_store_is_refused_when_it_was_deleted_after_it_was_anchored(stopped: Host) -> None:
    newest = stopped.copy()
    for path in stopped.folder.iterdir():
        path.unlink()
    stopped.refused("missing")
    shutil.rmtree(stopped.folder)
    stopped.refused("missing")
    assert list(stopped.folder.iterdir()) == []
    stopped.put_back(newest)
    stopped.start()


def test_store_is_begun_when_nothing_was_ever_anchored(host: Host) -> None:
    host.start()
    assert host.keeper.value.version == 1
    host.stop()
    host.start()


def test_store_is_refused_until_an_operator_accepts_it_when_the_platform_tpm_was_replaced(stopped: Host) -> None:
    stopped.keeper.value = NOTHING_ANCHORED
    stopped.refused("forked")
    stopped.start(accepting=WORD)
    events = stopped.run(lambda store: store.list_events())
    assert dataclasses.replace(events[-1], event_id=0) == WORD
    assert stopped.keeper.value == stopped.run(lambda store: store.value)
    stopped.stop()
    stopped.start()


def test_later_store_is_refused_when_an_operator_accepted_an_older_one(host: Host) -> None:
    host.start()
    vtpm = host.make()
    host.stop()
    old = host.copy()
    host.start()
    host.save(vtpm, b"second").result(LIMIT_S)
    host.stop()
    lost, anchor = host.copy(), host.keeper.value
    host.put_back(old)
    host.start(accepting=WORD)
    assert host.content(vtpm) == b"first of web1"
    assert host.keeper.value.version > anchor.version
    host.stop()
    host.put_back(lost)
    host.refused("older than the anchor")


def test_operators_word_changes_nothing_when_the_store_is_the_anchored_one(stopped: Host) -> None:
    anchor = stopped.keeper.value
    stopped.start(accepting=WORD)
    assert stopped.keeper.value == anchor
    assert "reanchored" not in [event.kind for event in stopped.run(lambda store: store.list_events())]


@pytest.mark.parametrize("edit", ["owner", "state gone", "last event gone"])
def test_edited_store_is_refused_whatever_an_operator_says(stopped: Host, edit: str) -> None:
    stopped.keeper.value = NOTHING_ANCHORED
    stopped.execute(EDITS[edit])
    with pytest.raises(StateError, match="edited"):
        stopped.start(accepting=WORD)
    set_record(stopped, stored_record(stopped)[:-1] + b"\0")
    with pytest.raises(StateError, match="edited"):
        stopped.start(accepting=WORD)


# The window of interval mode


def test_answered_saves_survive_a_crash_when_they_were_not_anchored_yet(host: Host) -> None:
    host.start(DAILY)
    vtpm = host.make()
    anchor = host.keeper.value
    for number in range(10):
        host.save(vtpm, b"state %d" % number).result(LIMIT_S)
    assert host.keeper.value == anchor
    host.crash()
    host.start(DAILY)
    assert host.content(vtpm) == b"state 9"
    # What was rolled forward is anchored before anything else is done.
    assert host.keeper.value.version == anchor.version + 10
    assert host.vault.stats().oldest_unanchored_s is None


def test_rollback_is_told_as_window_inside_the_interval_and_refused_beyond(host: Host) -> None:
    host.start(DAILY)
    vtpm = host.make()
    host.save(vtpm, b"last of the earlier window").result(LIMIT_S)
    beyond = host.copy()
    host.stop()
    host.start(DAILY)
    assert host.vault.stats().oldest_unanchored_s is None
    host.save(vtpm, b"old").result(LIMIT_S)
    inside = host.copy()
    host.save(vtpm, b"new").result(LIMIT_S)
    stats = host.vault.stats()
    assert (stats.mode, stats.window_s) == (AnchorMode.INTERVAL, DAY_S)
    assert stats.version == stats.anchored_version + 2
    assert stats.oldest_unanchored_s is not None
    assert 0 <= stats.oldest_unanchored_s < LIMIT_S
    host.crash()
    host.put_back(inside)
    host.start(DAILY)
    assert host.content(vtpm) == b"old"
    host.crash()
    host.put_back(beyond)
    host.refused("older than the anchor", DAILY)


def test_no_window_is_told_and_each_answer_is_anchored_in_each_commit_mode(host: Host) -> None:
    host.start()
    vtpm = host.make()
    host.save(vtpm, b"second").result(LIMIT_S)
    stats = host.vault.stats()
    assert (stats.mode, stats.window_s, stats.oldest_unanchored_s) == (AnchorMode.EACH_COMMIT, 0, None)
    assert stats.version == stats.anchored_version == host.keeper.value.version
    assert stats.transactions == stats.version - 1
    assert 0 < stats.anchor_writes <= stats.transactions


def test_crash_at_any_answer_of_the_keeper_leaves_a_store_that_opens(host: Host) -> None:
    """Whatever of the writes got through, the store that is on the disk descends from it."""
    host.start()
    vtpm = host.make()
    for lost in range(1, 4):
        host.keeper.answers_to_lose = lost
        host.save(vtpm, b"lost answers %d" % lost).result(LIMIT_S)
        host.keeper.failures_left = 1 << 30
        with pytest.raises(StoreError, match="not anchored in time"):
            host.save(vtpm, b"unanswered %d" % lost, patience_s=0.1).result(LIMIT_S)
        died, anchor = host.copy(), host.keeper.value
        host.keeper.failures_left = 0
        host.stop()
        for reached in (anchor, host.keeper.value):
            host.put_back(died)
            host.keeper.value = reached
            host.start()
            assert host.content(vtpm) == b"unanswered %d" % lost
            host.stop()
        host.start()


def test_store_opens_when_the_keeper_went_after_a_write_whose_answer_was_lost(host: Host) -> None:
    """What is written after it does not know whether it descends from that write, and so names it."""
    host.start()
    vtpm = host.make()
    before = host.keeper.value
    host.keeper.answers_to_lose, host.keeper.goes_after_loss = 1, True
    for number in range(4):
        with pytest.raises(StoreError, match="not anchored in time"):
            host.save(vtpm, b"unanswered %d" % number, patience_s=0.2).result(LIMIT_S)
    assert host.keeper.value.version == before.version + 1
    host.keeper.goes_after_loss = False
    died, anchor = host.copy(), host.keeper.value
    host.keeper.failures_left = 0
    host.stop()
    host.put_back(died)
    for anchored in (before, anchor):
        host.put_back(died)
        host.keeper.value = anchored
        host.start()
        assert host.content(vtpm) == b"unanswered 3"
        host.stop()


def test_operators_word_is_noted_when_a_store_of_before_the_first_anchor_is_accepted(host: Host) -> None:
    SqliteStore(host.folder, MAC_KEY, host.keeper).close()
    first = host.copy()
    host.start()
    host.make("web1")
    host.stop()
    host.put_back(first)
    host.keeper.value = NOTHING_ANCHORED
    host.start(accepting=WORD)
    assert [event.kind for event in host.run(lambda store: store.list_events())] == ["reanchored"]


# What the file would do by itself


def test_older_state_does_not_come_back_when_a_trigger_was_put_into_the_file(host: Host) -> None:
    host.start()
    vtpm = host.make()
    (old,) = host.run(lambda store: store.read_state(vtpm[0]))
    host.save(vtpm, b"second").result(LIMIT_S)
    host.stop()
    blob, digest = old.envelope.hex(), hashlib.sha256(old.envelope).hexdigest()
    host.execute(
        "CREATE TRIGGER back AFTER UPDATE OF lifecycle ON vtpm BEGIN"
        f" UPDATE state SET version = {old.version}, digest = x'{digest}', envelope = x'{blob}'; END"
    )
    host.refused("its schema is not the one that it was made with")
