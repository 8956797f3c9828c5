"""What tests of the vault share: records, bound vTPMs, requests."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

from vtpm.errors import StateError, UnavailableError
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.committer import Committer
from vtpm.vault.holding import Holding, Right
from vtpm.vault.records import DomainKind, SaveRequest, VtpmRecord
from vtpm.vault.root_record import NOTHING_ANCHORED, AnchorValue
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store
from vtpm.wire.migration import Mode

KEY = bytes(range(32))
MAC_KEY = Secret(bytes(range(100, 132)))
ENGINE = 0x000902
LIMIT_S = 20.0
CREATED = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


ID, DIGEST = b"m" * 16, b"d" * 32
HELD = Holding(Right.HELD, 1)
FROZEN = Holding(Right.FROZEN, 1, ID, "b", DIGEST, Mode.STOPPED)
LEAVING = dataclasses.replace(FROZEN, mode=Mode.DRIVEN)
"""Of one whose instance is bound."""
MOVED = Holding(Right.MOVED, 2, ID, "b")


class MemoryKeeper:
    """An anchor in memory, for unit tests alone: it can fail, lose its answers, and hang."""

    def __init__(self, value: AnchorValue = NOTHING_ANCHORED) -> None:
        self.value = value
        self.written: list[AnchorValue] = []
        self.attempts = 0
        self.reads = 0
        self.failures_left = 0
        self.answers_to_lose = 0
        self.goes_after_loss = False
        self.bug: Exception | None = None
        self.wrote = threading.Condition()
        self._open = threading.Event()
        self._open.set()

    def read(self) -> AnchorValue:
        self.reads += 1
        return self.value

    def write(self, value: AnchorValue) -> None:
        with self.wrote:
            self.attempts += 1
            self.wrote.notify_all()
        assert self._open.wait(60)
        if self.bug is not None:
            raise self.bug
        if self.failures_left > 0:
            self.failures_left -= 1
            raise UnavailableError("the keeper does not answer")
        if value != self.value:
            if value.version <= self.value.version:
                raise StateError(f"the anchor has {self.value}; {value} is not later")
            with self.wrote:
                self.value = value
                self.written.append(value)
                self.wrote.notify_all()
        if self.answers_to_lose > 0:
            self.answers_to_lose -= 1
            self.failures_left = 1 << 30 if self.goes_after_loss else 0
            raise UnavailableError("the keeper's answer was lost")

    def hang(self) -> None:
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    def await_attempts(self, count: int) -> None:
        with self.wrote:
            assert self.wrote.wait_for(lambda: self.attempts >= count, 20)

    def await_version(self, version: int) -> None:
        with self.wrote:
            assert self.wrote.wait_for(lambda: self.value.version >= version, 20)


class Gate:
    """Holds the committer's thread inside an operation until opened."""

    def __init__(self, committer: Committer) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()
        self._done = committer.run(self._hold)
        assert self._reached.wait(LIMIT_S)

    def _hold(self, store: Store) -> None:
        self._reached.set()
        assert self._opened.wait(LIMIT_S)

    def open(self) -> None:
        self._opened.set()
        self._done.result(LIMIT_S)


def open_store(folder: Path, keeper: MemoryKeeper | None = None) -> SqliteStore:
    """Open a store; without a keeper, one that was never anchored."""
    return SqliteStore(folder, MAC_KEY, keeper or MemoryKeeper())


def new_record(name: str = "web1", vtpm_id: UUID | None = None) -> VtpmRecord:
    return VtpmRecord(
        id=VtpmId(vtpm_id or uuid4()),
        name=name,
        owner_uid=1000,
        owner_gid=1001,
        vm_uuid=uuid4(),
        tpm_version=TpmVersion.V2_0,
        domain=DomainKind.PROCESS,
        created_at=CREATED,
        wrapped_key=b"wrapped key of " + name.encode(),
    )


@dataclass
class Bound:
    """One vTPM with a bound instance, and a counter for its saves."""

    record: VtpmRecord
    instance: InstanceId
    permit: bytes | None
    count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def id(self) -> VtpmId:
        return self.record.id

    def save(
        self,
        data: bytes = b"sealed",
        *,
        kind: StateKind = StateKind.PERMANENT,
        seq: int | None = None,
        version: int | None = None,
        epoch: int = 1,
        permit: bytes | None = None,
        instance: InstanceId | None = None,
    ) -> SaveRequest:
        """The next save as the vault would hand it to the store; `data` stands for an envelope."""
        number = next(self.count) if seq is None else seq
        digest = hashlib.sha256(bytes([kind]) + data).digest()
        return SaveRequest(
            self.id,
            instance or self.instance,
            number,
            digest,
            kind,
            epoch,
            number if version is None else version,
            data,
            permit,
        )


def bind(store: Store, name: str = "web1") -> Bound:
    """Create a vTPM, bind an instance, issue the permit."""
    record = new_record(name)
    store.create_vtpm(record)
    instance = InstanceId(uuid4())
    store.bind_instance(record.id, instance)
    return Bound(record, instance, store.issue_permit(record.id, instance, ENGINE))


def manufacture(store: Store, name: str = "web1") -> Bound:
    """As bind, with the first permanent state saved as save 1, version 1."""
    bound = bind(store, name)
    (outcome,) = store.commit_saves([bound.save(b"first", permit=bound.permit)])
    assert not isinstance(outcome, Exception), outcome
    return bound


def rebind(store: Store, bound: Bound) -> Bound:
    """A new instance in place of the bound one."""
    instance = InstanceId(uuid4())
    store.bind_instance(bound.id, instance, replaces=bound.instance)
    return Bound(bound.record, instance, None)
