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
from unittest.mock import AsyncMock, Mock
from uuid import uuid4

import pytest

from tests.unit.vault.world import KEY, MAC_KEY, Gate, MemoryKeeper
from vtpm.errors import ConflictError, StateError
from vtpm.manager.access import Caller
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
from vtpm.wire.api import CreateVtpm, LifeState, MeasuredServices
from vtpm.wire.keeper import NewKey
from vtpm.wire.launcher import Ended, InstanceInfo, Instances, LauncherStatus, NoArgs, Replaced, VtpmArgs
from vtpm.wire.manager_link import ShutdownMode

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
THIRD = replace(DEAD, instance_id=InstanceId(uuid4()), pid=1002)


class _Launcher:
    """Stands where the launcher would: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []
        self.alive: dict[VtpmId, list[tuple[InstanceInfo, socket.socket]]] = {}
        """What `attach` gives, one after the other."""

    async def call(self, op: str, args: object, timeout_s: float = 10.0) -> tuple[Any, tuple[int, ...]]:
        assert timeout_s > 0
        if op == "list":
            return Instances(tuple(self.alive)), ()
        if op == "status":
            return LauncherStatus(1, "boot", True, ("process",)), ()
        self.asked.append((op, args))
        if op == "attach":
            info, link = self.alive[RECORD.id].pop(0)
            return info, (link.detach(),)
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
            # After the opening, which would find that nothing runs.
            await service.door.run(lambda store: store.create_vtpm(RECORD))
            await service.door.run(lambda store: store.bind_instance(RECORD.id, DEAD.instance_id))
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
        service._states[RECORD.id] = LifeState.RUNNING
        running = Running(RECORD, DEAD, Mock())
        service.running[RECORD.id] = running
        await _tell_replaced(service, replace(SUCCESSOR, measurement="11" * 32))
        assert launcher.asked == [("stop", VtpmArgs(RECORD.id))]
        assert running.ended.is_set()
        assert service.running == {}

    _run(tmp_path, test)


def _tell(service: ManagerService, links: list[socket.socket], dead: InstanceInfo, successor: InstanceInfo) -> None:
    """As the launcher says it; the instance's end of the successor's link is appended to `links`."""
    ours, theirs = socket.socketpair()
    links.append(theirs)
    args = Replaced(dead.instance_id, "signal SIGSEGV", successor)
    service._on_launcher_event("replaced", args, (ours.detach(),))


def _let_go(service: ManagerService, links: list[socket.socket]) -> None:
    for running in service.running.values():
        running.link.close()
    service.running.clear()
    for link in links:
        link.close()


def test_the_last_successor_is_followed_when_two_die_within_one_slow_write_of_the_store(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        assert service.door._storage is not None
        committer = service.door._storage.committer
        service._states[RECORD.id] = LifeState.RUNNING
        service.running[RECORD.id] = Running(RECORD, DEAD, Mock())
        links: list[socket.socket] = []
        gate = Gate(committer)
        _tell(service, links, DEAD, SUCCESSOR)
        _tell(service, links, SUCCESSOR, THIRD)
        for _ in range(20):
            # Both have begun; what they can do without the store they have done.
            await asyncio.sleep(0)
        gate.open()
        await asyncio.wait(service._tasks)
        assert launcher.asked == []
        assert service.running[RECORD.id].info == THIRD
        assert service._states[RECORD.id] is LifeState.FAILED
        bound = await service.door.run(lambda store: store.get_vtpm(RECORD.id))
        assert bound.instance_id == THIRD.instance_id
        _let_go(service, links)

    _run(tmp_path, test)


def test_the_successor_is_attached_to_when_an_instance_dies_while_it_is_taken_up(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        links = [theirs for _, theirs in pairs]
        launcher.alive[RECORD.id] = [(DEAD, pairs[0][0]), (SUCCESSOR, pairs[1][0])]
        attach = service._attach

        async def attach_and_die(record: VtpmRecord, bound: InstanceId | None) -> tuple[InstanceInfo, socket.socket]:
            given = await attach(record, bound)
            if given[0] == DEAD:
                _tell(service, links, DEAD, SUCCESSOR)
                await asyncio.wait({task for task in service._tasks if task is not asyncio.current_task()})
            return given

        service._attach = attach_and_die  # type: ignore[method-assign]
        service.key = AsyncMock(return_value=KEY)  # type: ignore[method-assign]
        await service._reconcile()
        assert launcher.asked == [("attach", VtpmArgs(RECORD.id))] * 2
        assert service.running[RECORD.id].info == SUCCESSOR
        bound = await service.door.run(lambda store: store.get_vtpm(RECORD.id))
        assert bound.instance_id == SUCCESSOR.instance_id
        _let_go(service, links)

    _run(tmp_path, test)


@pytest.mark.parametrize("orderly", [True, False])
def test_the_audit_log_says_killed_when_an_orderly_stop_failed(tmp_path: Path, orderly: bool) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        service._states[RECORD.id] = LifeState.RUNNING
        link = Mock()
        link.shut_down = AsyncMock(side_effect=None if orderly else StateError("shutdown of web1 failed"))
        running = Running(RECORD, DEAD, link)
        service.running[RECORD.id] = running
        if orderly:
            service._spawn(service._in_turn(RECORD.id, service._on_ended(Ended(RECORD.id, DEAD.instance_id, "exit"))))
        stop = service._stop_locked(RECORD, running, Caller(0, 0, is_admin=True), ShutdownMode.ORDERLY)
        await stop
        (event,) = await service.door.run(lambda store: store.list_events())
        if orderly:
            assert (event.kind, launcher.asked) == ("stopped", [])
        else:
            assert (event.kind, launcher.asked) == ("killed", [("stop", VtpmArgs(RECORD.id))])
            assert "shutdown of web1 failed" in event.detail

    _run(tmp_path, test)


def test_only_callers_who_are_no_administrators_are_held_to_their_number_of_vtpms(tmp_path: Path) -> None:
    async def test(service: ManagerService, launcher: _Launcher) -> None:
        service._keeper.new_key = Mock(return_value=NewKey(b"wrapped", bytes(32)))  # type: ignore[method-assign]
        user, root = Caller(7, 7, is_admin=False, may_create=True, max_vtpms=1), Caller(0, 0, is_admin=True)
        await service.create(CreateVtpm("one"), user)
        with pytest.raises(ConflictError, match="uid 7 has 1 vTPMs"):
            await service.create(CreateVtpm("two"), user)
        for name in ("two", "three"):
            await service.create(CreateVtpm(name), root)

    _run(tmp_path, test)
