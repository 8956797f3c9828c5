"""A kind of domain without a process: descriptors that behave as one's would, at the test's word."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from vtpm.confine.report import Protection, ProtectionStatus, Report
from vtpm.domains.base import DomainPlan
from vtpm.errors import ConfinementError
from vtpm.launcher.service import LauncherService
from vtpm.tpm.types import TpmVersion, VtpmId
from vtpm.wire.instance_spec import InstanceFd, Role
from vtpm.wire.launcher import Ended, InstanceInfo, Replaced, StartArgs, VtpmArgs
from vtpm.wire.packet_socket import Peer

LIMIT_S = 10.0
MEASUREMENT = "00" * 32
PEER = Peer(1, 0, 0)


class FakeRunning:
    """See RunningDomain."""

    def __init__(self, plan: DomainPlan, pid: int) -> None:
        self.log = os.dup(plan.log_fd)
        self.pid = pid
        self.role = plan.args.role
        self.link = plan.fds[InstanceFd.MANAGER_LINK]
        self.dies_when_killed = True
        self._how = "signal SIGKILL"
        self._failed = False
        self._reported = asyncio.Event()
        self._exited = asyncio.Event()

    def confine(self) -> None:
        """Be locked in."""
        self._reported.set()

    def fail(self) -> None:
        """End before being locked in."""
        self._failed = True
        self._reported.set()
        self.die()

    def die(self, how: str = "signal SIGSEGV") -> None:
        """End, as the process itself would."""
        if not self._exited.is_set():
            self._how = how
            self._exited.set()
            os.close(self.log)

    async def confined(self) -> Report:
        await self._reported.wait()
        if self._failed:
            raise ConfinementError("it died before it was confined")
        return (Protection("title", ProtectionStatus.IN_FORCE, "named"),)

    def kill(self) -> None:
        if self.dies_when_killed:
            self.die("signal SIGKILL")

    async def ended(self) -> str:
        await self._exited.wait()
        return self._how


class FakeDomain:
    """See Domain.

    Args:
        confines: whether what it starts is locked in at once.
    """

    measurement = MEASUREMENT
    engine_version = 0x000902
    label = "fake"
    ready_within_s = 1

    def __init__(self, *, confines: bool = True) -> None:
        self.confines = confines
        self.started: list[FakeRunning] = []
        self.failures: list[Exception] = []
        """Raised by the next starts, in this order."""
        self.prepared: asyncio.Event | None = None
        """What a preparation waits for; None: for nothing."""

    async def prepare(self) -> None:
        if self.prepared is not None:
            await self.prepared.wait()

    def start(self, plan: DomainPlan) -> FakeRunning:
        if self.failures:
            raise self.failures.pop(0)
        running = FakeRunning(plan, 1000 + len(self.started))
        self.started.append(running)
        if self.confines:
            running.confine()
        return running


class Events:
    """Stands where the server would: takes what the launcher tells everybody."""

    def __init__(self) -> None:
        self.seen: list[Replaced | Ended] = []
        self._came = asyncio.Event()

    def broadcast_event(self, _event: str, args: Any, _fds: Sequence[int] = ()) -> None:
        self.seen.append(args)
        self._came.set()

    async def next(self) -> Replaced | Ended:
        """Wait for the next event and take it."""
        while not self.seen:
            self._came.clear()
            await self._came.wait()
        return self.seen.pop(0)


class Launcher:
    """A launcher service over one fake domain, called as its server would call it."""

    def __init__(self, folder: Path, domain: FakeDomain, **bounds: int) -> None:
        self.domain = domain
        self.events = Events()
        self.service = LauncherService(folder, {"process": domain}, 70000, lambda: None, **bounds)
        self.service.server = self.events  # type: ignore[assignment]

    async def call(self, op: str, args: object) -> tuple[Any, tuple[int, ...]]:
        """Run one operation."""
        result, fds = await self.service.handle(op, args, (), PEER)
        return result, tuple(fds)

    async def start(self, name: str, vtpm_id: VtpmId | None = None) -> InstanceInfo:
        """Start a vTPM."""
        owner = os.getuid(), os.getgid()
        args = StartArgs(vtpm_id or VtpmId(uuid4()), name, TpmVersion.V2_0, "process", *owner, MEASUREMENT)
        info: InstanceInfo = (await self.call("start", args))[0]
        return info

    async def attach(self, vtpm_id: VtpmId) -> InstanceInfo:
        """Ask for a vTPM's instance."""
        info: InstanceInfo = (await self.call("attach", VtpmArgs(vtpm_id)))[0]
        return info

    async def list(self) -> tuple[VtpmId, ...]:
        """Return the vTPMs that have an instance."""
        ids: tuple[VtpmId, ...] = (await self.call("list", object()))[0].vtpm_ids
        return ids

    async def stop(self, vtpm_id: VtpmId) -> None:
        """Stop a vTPM."""
        await self.call("stop", VtpmArgs(vtpm_id))


def run(folder: Path, test: Callable[[Launcher], Awaitable[None]], *, confines: bool = True, **bounds: int) -> None:
    """Run a test on a launcher; every instance is ended afterwards, and no descriptor may be left."""

    async def limited() -> None:
        launcher = Launcher(folder, FakeDomain(confines=confines), **bounds)
        async with asyncio.timeout(LIMIT_S):
            await test(launcher)
            for running in launcher.domain.started:
                running.dies_when_killed = True
            await launcher.service.close()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(limited())
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors are left"


def is_successor(running: FakeRunning) -> bool:
    """Say whether an instance was started in place of a dead one."""
    return running.role is Role.SUCCESSOR
