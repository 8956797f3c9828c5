"""What the manager makes of the launcher's word that an instance was replaced."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest

from tests.unit.vault.world import MAC_KEY, MemoryKeeper
from vtpm.manager.running import Running
from vtpm.manager.service import ManagerService
from vtpm.manager.storage import Storage
from vtpm.tpm.types import InstanceId, TpmVersion, VtpmId
from vtpm.vault.anchor import AnchorPolicy
from vtpm.vault.committer import Committer
from vtpm.vault.launch_policy import NewImages
from vtpm.vault.records import DomainKind, VtpmRecord
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.vault import Vault
from vtpm.wire.api import LifeState, MeasuredServices
from vtpm.wire.launcher import InstanceInfo, Instances, NoArgs, Replaced, VtpmArgs

pytestmark = pytest.mark.timeout(30)
RECORD = VtpmRecord(
    id=VtpmId(uuid4()),
    name="web1",
    owner_uid=1000,
    owner_gid=1000,
    vm_uuid=None,
    tpm_version=TpmVersion.V2_0,
    domain=DomainKind.PROCESS,
    created_at=datetime.now(UTC),
    wrapped_key=b"wrapped",
    lifecycle=LifeState.RUNNING.value,
)
DEAD = InstanceInfo(RECORD.id, InstanceId(uuid4()), "web1", 1000, "00" * 32, 1, "/c", "/d", ())
SUCCESSOR = replace(DEAD, instance_id=InstanceId(uuid4()), pid=1001)


class _Launcher:
    """Stands where the launcher would: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []

    async def call(self, op: str, args: object, timeout_s: float = 10.0) -> tuple[Any, tuple[int, ...]]:
        assert timeout_s > 0
        if op == "list":
            return Instances(()), ()
        self.asked.append((op, args))
        return NoArgs(), ()


def _storage(folder: Path) -> Storage:
    keeper = MemoryKeeper()
    committer = Committer(SqliteStore(folder, MAC_KEY, keeper), keeper, AnchorPolicy())
    return Storage(committer, Vault(committer))


def _run(folder: Path, test: Callable[[ManagerService, _Launcher], Awaitable[None]]) -> None:
    async def run() -> None:
        service = ManagerService(folder, folder, lambda _: _storage(folder), MeasuredServices(), NewImages.ALLOW)
        launcher = _Launcher()
        service.launcher = launcher  # type: ignore[assignment]
        try:
            await service.door.open()
            await test(service, launcher)
        finally:
            await service.door.close()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before


async def _tell_replaced(service: ManagerService, successor: InstanceInfo = SUCCESSOR) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        await service._on_replaced(Replaced(DEAD.instance_id, "signal SIGSEGV", successor), ours)
        theirs.setblocking(False)
        assert theirs.recv(1) == b"", "the link is still open"


def test_the_successor_lives_on_when_attach_gave_it_already(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        service._states[RECORD.id] = LifeState.RUNNING
        running = Running(RECORD, SUCCESSOR, Mock())
        service.running[RECORD.id] = running
        await _tell_replaced(service)
        assert launcher.asked == []
        assert service.running[RECORD.id] is running
        assert not running.ended.is_set()

    _run(tmp_path, test)


def test_the_successor_lives_on_when_a_manager_that_has_just_begun_has_not_asked_for_it_yet(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        await _tell_replaced(service)
        assert launcher.asked == []

    _run(tmp_path, test)


def test_the_successor_is_ended_when_the_start_of_its_vtpm_failed_meanwhile(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        service._states[RECORD.id] = LifeState.STOPPED
        await _tell_replaced(service)
        assert launcher.asked == [("stop", VtpmArgs(RECORD.id))]

    _run(tmp_path, test)


def test_the_successor_is_ended_when_it_is_of_another_image(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        await service._store(lambda store: store.create_vtpm(RECORD))
        await service._store(lambda store: store.bind_instance(RECORD.id, DEAD.instance_id))
        service._states[RECORD.id] = LifeState.RUNNING
        running = Running(RECORD, DEAD, Mock())
        service.running[RECORD.id] = running
        await _tell_replaced(service, replace(SUCCESSOR, measurement="11" * 32))
        assert launcher.asked == [("stop", VtpmArgs(RECORD.id))]
        assert running.ended.is_set()
        assert service.running == {}

    _run(tmp_path, test)
