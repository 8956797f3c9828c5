"""A vault as a manager runs it, its files in an attacker's hands; for tests of attacks."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest

from tests.unit.vault.world import CREATED, ENGINE, KEY, MAC_KEY, MemoryKeeper, new_record
from vtpm.errors import StateError
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault.anchor import AnchorPolicy
from vtpm.vault.committer import Committer
from vtpm.vault.records import Event, SaveAck
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store
from vtpm.vault.vault import PermitGranted, Vault

T = TypeVar("T")
LIMIT_S = 20.0
EACH_COMMIT = AnchorPolicy()
PERMANENT = StateKind.PERMANENT


class Host:
    """A vault as a manager runs it, its files in the attacker's hands whenever it is stopped or dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "vault"
        self.copies = folder / "copies"
        self.copies.mkdir()
        self.keeper = MemoryKeeper()
        self.seq = 0
        self.running = False

    def start(self, policy: AnchorPolicy = EACH_COMMIT, accepting: Event | None = None) -> None:
        store = SqliteStore(self.folder, MAC_KEY, self.keeper, accepting=accepting)
        self.committer = Committer(store, self.keeper, policy)
        self.vault = Vault(self.committer)
        self.running = True

    def stop(self) -> None:
        if self.running:
            self.running = False
            self.vault.close()
            self.committer.close()

    def crash(self) -> None:
        """End as by kill -9: neither files nor anchor see anything of an orderly end."""
        died, anchor = self.copy(), self.keeper.value
        self.keeper.go_on()
        self.stop()
        self.keeper.value = anchor
        self.put_back(died)

    def copy(self) -> Path:
        copy = self.copies / str(uuid4())
        shutil.copytree(self.folder, copy)
        return copy

    def put_back(self, copy: Path) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(copy, self.folder)
        self.folder.chmod(0o700)

    def run(self, operation: Callable[[Store], T]) -> T:
        return self.committer.run(operation).result(LIMIT_S)

    def make(self, name: str = "web1") -> tuple[VtpmId, InstanceId]:
        """A vTPM that was manufactured and runs."""
        record, instance = new_record(name), InstanceId(uuid4())
        self.run(lambda store: store.create_vtpm(record, event=Event(CREATED, 0, "created", name, record.id)))
        self.run(lambda store: store.bind_instance(record.id, instance))
        self.vault.open_vtpm(record.id, KEY)
        granted = self.vault.load(record.id, instance, ENGINE)
        assert isinstance(granted, PermitGranted)
        self.seq += 1
        first = self.vault.save(
            record.id, instance, self.seq, PERMANENT, b"first of " + name.encode(), granted.permit_id
        )
        first.result(LIMIT_S)
        return record.id, instance

    def save(self, vtpm: tuple[VtpmId, InstanceId], data: bytes, patience_s: float = LIMIT_S) -> Future[SaveAck]:
        if not self.vault._sessions:
            self.vault.open_vtpm(vtpm[0], KEY)
        self.seq += 1
        return self.vault.save(*vtpm, self.seq, PERMANENT, data, patience_s=patience_s)

    def content(self, vtpm: tuple[VtpmId, InstanceId]) -> bytes:
        """What the vTPM has if it is started now."""
        if not self.vault._sessions:
            self.vault.open_vtpm(vtpm[0], KEY)
        loaded = self.vault.load(*vtpm, ENGINE)
        assert not isinstance(loaded, PermitGranted)
        return loaded[PERMANENT]

    def execute(self, *statements: str, values: tuple[object, ...] = ()) -> None:
        with closing(sqlite3.connect(self.folder / "vtpm.db", isolation_level=None)) as db:
            for statement in statements:
                db.execute(statement, values)

    def refused(self, cause: str, policy: AnchorPolicy = EACH_COMMIT) -> None:
        """The store is refused, twice, and no byte of its files nor the anchor changes."""
        before, anchor = self.files(), self.keeper.value
        for _ in range(2):
            with pytest.raises(StateError, match=cause) as refusal:
                self.start(policy)
            assert str(self.folder) in str(refusal.value)
        assert self.files() == before
        assert self.keeper.value == anchor

    def files(self) -> dict[str, bytes]:
        """The digest of each file."""
        if not self.folder.exists():
            return {}
        return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in self.folder.iterdir()}

    def rows(self) -> list[str]:
        if not (self.folder / "vtpm.db").exists():
            return []
        # A copy is read, so that reading leaves the evidence alone.
        with closing(sqlite3.connect(self.copy() / "vtpm.db")) as db:
            return list(db.iterdump())
