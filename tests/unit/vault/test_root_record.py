from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.unit.vault.world import MAC_KEY, MemoryKeeper, new_record, open_store
from vtpm.errors import StateError
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.entries import StateEntry, entry_of
from vtpm.vault.ledger import first_record
from vtpm.vault.records import DomainKind, Permit, PermitState, SaveMark
from vtpm.vault.root_record import (
    NOTHING_ANCHORED,
    RECORD_BYTES,
    AnchorValue,
    RootRecord,
    check_descends,
    decode,
    key_id_of,
)
from vtpm.vault.sqlite_store import SqliteStore

VECTORS = Path(__file__).parents[2] / "vectors" / "state"
Vector = dict[str, Any]


def vectors() -> list[Vector]:
    # The first is of before there were other makes than libtpms, the second of before vTPMs moved.
    names = ("root-record-v1.json", "root-record-v1-makes.json", "root-record-v1-holdings.json")
    return [vector for name in names for vector in json.loads((VECTORS / name).read_text())]


def rows_of(vector: Vector, table: str) -> list[dict[str, Any]]:
    return [
        {name: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value for name, value in row.items()}
        for row in vector["tables"].get(table, ())
    ]


def value_of(anchor: dict[str, Any]) -> AnchorValue:
    return AnchorValue(anchor["version"], bytes.fromhex(anchor["digest"]))


# A reader by the words of docs/state-format.md, with nothing of vtpm.


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def fields(*values: object) -> bytes:
    out = b""
    for value in values:
        if value is None:
            out += b"\xff" * 4
            continue
        data = (
            value
            if isinstance(value, bytes)
            else (
                value.encode("utf-8") if isinstance(value, str) else int(value).to_bytes(8, "big", signed=True)  # type: ignore[call-overload]
            )
        )
        out += len(data).to_bytes(4, "big") + data
    return out


def independent_tree(vector: Vector) -> bytes:
    """The root over 2^20 slots, from the rows."""
    level = {}
    for row in rows_of(vector, "vtpm"):
        states = [state for state in rows_of(vector, "state") if state["vtpm_id"] == row["id"]]
        marks = [mark for mark in rows_of(vector, "save_mark") if mark["vtpm_id"] == row["id"]]
        names = (
            "id name owner_uid owner_gid vm_uuid tpm_version domain created_at_us epoch lifecycle permit_state"
            " permit_id wrapped_key state_version instance_id engine_version"
        )
        entry = fields(b"vtpm entry v1", *(row[name] for name in names.split()), len(states))
        for state in sorted(states, key=lambda state: state["kind"]):
            assert state["digest"] == sha256(state["envelope"])
            entry += fields(state["kind"], state["epoch"], state["version"], state["digest"])
        for mark in marks:
            entry += fields(mark["instance_id"], mark["seq"], mark["digest"], mark["version"])
        level[row["slot"]] = sha256(b"\0", entry)
    if known := sorted(rows_of(vector, "holding"), key=lambda row: row["vtpm_id"]):
        entry = fields(b"vtpm holdings v1", len(known))
        for row in known:
            names = "vtpm_id name standing epoch migration_id peer digest mode adopted"
            entry += fields(*(row[name] for name in names.split()))
        level[2**20 - 2] = sha256(b"\0", entry)
    empty = bytes(32)
    for _ in range(20):
        parents = {slot // 2 for slot in level}
        level = {
            parent: sha256(b"\1", level.get(2 * parent, empty), level.get(2 * parent + 1, empty)) for parent in parents
        }
        empty = sha256(b"\1", empty, empty)
    return level.get(0, empty)


def independent_events(vector: Vector) -> tuple[int, bytes]:
    head = bytes(32)
    rows = rows_of(vector, "event")
    for row in rows:
        names = "event_id time_us actor_uid kind vtpm_name vtpm_id detail"
        head = sha256(fields(b"vtpm event v1", head, *(row[name] for name in names.split())))
        assert row["head"] == head
    return rows[-1]["event_id"], head


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_independent_reader_agrees_when_vector_is_frozen(vector: Vector) -> None:
    key, blob = bytes.fromhex(vector["mac_key"]), bytes.fromhex(vector["record"])
    number = int.from_bytes
    body, mac = blob[:208], blob[208:]
    assert len(mac) == 32
    assert hmac.digest(key, b"vtpm root mac v1" + body, "sha256") == mac
    assert sha256(b"vtpm root digest v1", body).hex() == vector["digest"]
    assert body[0:8] == b"VTPMROOT"
    assert (number(body[8:10], "big"), number(body[10:12], "big"), body[12:16]) == (1, 240, bytes(4))
    assert body[32:48] == hmac.digest(key, b"vtpm root key id v1", "sha256")[:16]
    assert number(body[48:56], "big") == vector["version"]
    assert body[56:88] == independent_tree(vector)
    assert (number(body[88:96], "big"), body[96:128]) == independent_events(vector)
    assert AnchorValue(number(body[128:136], "big"), body[136:168]) == value_of(vector["base"])
    assert AnchorValue(number(body[168:176], "big"), body[176:208]) == value_of(vector["attempted"])


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_same_bytes_are_read_and_written_when_vector_is_frozen(vector: Vector) -> None:
    key, blob = Secret(bytes.fromhex(vector["mac_key"])), bytes.fromhex(vector["record"])
    record = decode("it", blob, key)
    assert record.encode(key) == blob
    assert record.value == value_of(vector)


@pytest.mark.parametrize("anchored", ["base", "attempted", "itself"])
@pytest.mark.parametrize("vector", vectors(), ids=lambda v: v["name"])
def test_store_opens_when_its_rows_are_the_frozen_ones(vector: Vector, anchored: str, tmp_path: Path) -> None:
    open_store(tmp_path / "vault").close()
    with closing(sqlite3.connect(tmp_path / "vault" / "vtpm.db", isolation_level=None)) as db:
        db.execute("UPDATE root SET record = ?", (bytes.fromhex(vector["record"]),))
        for table in ("vtpm", "state", "save_mark", "event", "holding"):
            for row in rows_of(vector, table):
                marks = ", ".join("?" * len(row))
                db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
    keeper = MemoryKeeper(value_of(vector if anchored == "itself" else vector[anchored]))
    key = Secret(bytes.fromhex(vector["mac_key"]))
    with closing(SqliteStore(tmp_path / "vault", key, keeper)) as store:
        kept = sorted((row["name"], row["domain"]) for row in vector["tables"]["vtpm"])
        assert [(record.name, record.domain) for record in store.list_vtpms()] == kept
        assert len(store.list_events()) == len(vector["tables"]["event"])
    keeper.value = dataclasses.replace(keeper.value, digest=bytes(32))
    with pytest.raises(StateError, match="forked"):
        SqliteStore(tmp_path / "vault", key, keeper)


# Properties of each part

RECORD = dataclasses.replace(
    first_record(MAC_KEY), version=9, base=AnchorValue(5, b"b" * 32), attempted=AnchorValue(7, b"a" * 32)
)


@pytest.mark.parametrize("anchor", [RECORD.value, RECORD.base, RECORD.attempted])
def test_store_is_accepted_when_it_is_the_anchored_one_or_descends_from_it(anchor: AnchorValue) -> None:
    check_descends("it", RECORD, anchor)


@pytest.mark.parametrize(
    ("anchor", "cause"),
    [
        (AnchorValue(10, b"b" * 32), "older than the anchor"),
        (AnchorValue(9, b"b" * 32), "forked"),
        (AnchorValue(8, b"b" * 32), "forked"),
        (AnchorValue(5, b"a" * 32), "forked"),
        (AnchorValue(4, b"b" * 32), "forked"),
        (NOTHING_ANCHORED, "forked"),
    ],
)
def test_store_is_refused_when_it_does_not_descend_from_the_anchor(anchor: AnchorValue, cause: str) -> None:
    with pytest.raises(StateError, match=cause):
        check_descends("it", RECORD, anchor)


def test_ancestor_that_is_not_older_is_never_accepted() -> None:
    # No program of ours writes such a record; a bug that did must not open a way back.
    odd = dataclasses.replace(RECORD, attempted=AnchorValue(9, b"a" * 32))
    with pytest.raises(StateError, match="forked"):
        check_descends("it", odd, odd.attempted)


@pytest.mark.parametrize(
    "change",
    [
        {"store_id": uuid4()},
        {"version": 10},
        {"tree": b"t" * 32},
        {"events": 1},
        {"events_head": b"e" * 32},
        {"base": AnchorValue(6, b"b" * 32)},
        {"base": AnchorValue(5, b"c" * 32)},
        {"attempted": AnchorValue(8, b"a" * 32)},
        {"attempted": AnchorValue(7, b"c" * 32)},
    ],
)
def test_anchored_digest_differs_when_any_field_differs(change: dict[str, Any]) -> None:
    assert dataclasses.replace(RECORD, **change).value.digest != RECORD.value.digest


@pytest.mark.parametrize("change", [{"version": 0}, {"version": 1 << 63}, {"events": 1 << 63}])
def test_record_is_refused_when_signed_with_a_field_out_of_bounds(change: dict[str, int]) -> None:
    with pytest.raises(StateError, match="out of bounds"):
        decode("it", dataclasses.replace(RECORD, **change).encode(MAC_KEY), MAC_KEY)


def test_key_is_named_and_not_shown_by_its_id() -> None:
    assert key_id_of(MAC_KEY) != key_id_of(Secret(bytes(32)))
    record: RootRecord = decode("it", RECORD.encode(MAC_KEY), MAC_KEY)
    assert record.key_id == key_id_of(MAC_KEY)
    assert MAC_KEY.reveal() not in RECORD.encode(MAC_KEY)
    assert len(RECORD.encode(MAC_KEY)) == RECORD_BYTES == 240


def test_entry_differs_when_any_field_of_the_row_differs() -> None:
    record = new_record()
    states = [StateEntry(StateKind.PERMANENT, 1, 1, bytes(32)), StateEntry(StateKind.VOLATILE, 1, 2, bytes(32))]
    mark = SaveMark(InstanceId(uuid4()), 1, bytes(32), 1)
    changes: dict[str, Any] = {
        "id": VtpmId(uuid4()),
        "name": "web2",
        "owner_uid": 1,
        "owner_gid": 1,
        "vm_uuid": None,
        "tpm_version": TpmVersion.V1_2,
        "domain": DomainKind.XEN,
        "created_at": record.created_at.replace(microsecond=0),
        "epoch": 2,
        "lifecycle": "moved",
        "permit": Permit(PermitState.ISSUED, bytes(16)),
        "wrapped_key": None,
        "state_version": 1,
        "instance_id": InstanceId(uuid4()),
        "engine_version": 1,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(record)}
    entries = [entry_of(record, states, mark)]
    entries += [entry_of(dataclasses.replace(record, **{name: value}), states, mark) for name, value in changes.items()]
    for field in dataclasses.fields(StateEntry):
        value = {"kind": StateKind.SAVESTATE, "digest": b"d" * 32}.get(field.name, 9)
        entries.append(entry_of(record, [states[0], dataclasses.replace(states[1], **{field.name: value})], mark))
    entries += [entry_of(record, states[:1], mark), entry_of(record, [], mark), entry_of(record, states, None)]
    for field in dataclasses.fields(mark):
        value = {"instance_id": InstanceId(UUID(int=1)), "digest": b"d" * 32}.get(field.name, 9)
        entries.append(entry_of(record, states, dataclasses.replace(mark, **{field.name: value})))
    entries.append(entry_of(dataclasses.replace(record, permit=Permit(PermitState.CONSUMED, bytes(16))), states, mark))
    # Lengths say where a field ends.
    entries.append(entry_of(dataclasses.replace(record, name="web12", lifecycle="topped"), states, mark))
    assert len(set(entries)) == len(entries)
