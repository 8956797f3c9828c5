"""One vTPM in a real domain of any kind, held as the launcher holds it, with its manager and its clients played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import uuid4

from tests.support.processes import short_directory
from tests.support.uids import own_uid_base
from tests.support.vtpmd import PlayedManager
from vtpm.confine.report import Report
from vtpm.domains.base import Domain
from vtpm.launcher.guest_sockets import open_guest_sockets
from vtpm.launcher.slot import Instance, Slot
from vtpm.tpm.types import StateKind, TpmVersion, VtpmId
from vtpm.wire.instance_spec import Role
from vtpm.wire.launcher import StartArgs

T = TypeVar("T")
TIMEOUT_S = 120.0
"""Of what a domain does; one that boots under emulation beside others takes long."""


class HeldVtpm:
    """See the module. A context manager; made without an instance.

    Args:
        domain: kind of domain.
    """

    def __init__(self, domain: Domain, version: TpmVersion = TpmVersion.V2_0, name: str = "web1") -> None:
        self._stack = contextlib.ExitStack()
        # The launcher's loop: domains are started, watched and seen to their ends in its thread.
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        self._stack.callback(self._loop.close)
        self._stack.callback(thread.join, TIMEOUT_S)
        self._stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        self.folder: Path = self._stack.enter_context(short_directory())
        self.folder.chmod(0o755)
        args = StartArgs(VtpmId(uuid4()), name, version, "", os.geteuid(), os.getegid(), self._run(measured(domain)))
        sockets = open_guest_sockets(self.folder, name, args.owner_uid, args.owner_gid)
        uid = own_uid_base() + 300 if os.geteuid() == 0 else os.geteuid()
        self.domain = domain
        self.slot = Slot(args, domain, uid, sockets)
        self._stack.callback(self.slot.close)
        self.state: dict[StateKind, bytes] = {}
        self.instance: Instance | None = None
        self.manager: PlayedManager | None = None
        self.report: Report = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.instance is not None:
            self.kill()
        self._stack.close()

    def start(self, role: Role = Role.FIRST) -> PlayedManager:
        """Start an instance and wait until it is confined and its vtpmd has answered a Hello."""
        self.instance, self.report = self._run(self._start(role))
        self.manager = PlayedManager(self.instance.manager_end, timeout_s=TIMEOUT_S)
        self.manager.state = self.state
        self.manager.hello()
        return self.manager

    def kill(self) -> str:
        """Kill the domain and say how it ended."""
        assert self.instance is not None
        self.instance.domain.kill()
        return self.ended()

    def ended(self) -> str:
        """Wait for the domain's end, keep what it parked, and say how it ended."""
        instance, self.instance = self.instance, None
        assert instance is not None and self.manager is not None
        how = self._run(self._see_end(instance))
        with contextlib.suppress(OSError):
            instance.manager_end.shutdown(socket.SHUT_RDWR)
        self.manager.join()
        self._run(self._close(instance))
        return how

    async def _start(self, role: Role) -> tuple[Instance, Report]:
        await self.domain.prepare()
        instance = self.slot.start_instance(role)
        self._loop.add_reader(instance.hold, self._take, instance)
        try:
            return instance, await instance.domain.confined()
        except BaseException:
            instance.domain.kill()
            await self._see_end(instance)
            instance.close()
            raise

    async def _see_end(self, instance: Instance) -> str:
        how = await instance.domain.ended()
        self._loop.remove_reader(instance.hold)
        while readable(instance.hold) and self.slot.take_hold_message(instance):
            pass
        return how

    async def _close(self, instance: Instance) -> None:
        instance.close()

    def _take(self, instance: Instance) -> None:
        if not self.slot.take_hold_message(instance):
            self._loop.remove_reader(instance.hold)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def connect(self, name: str) -> socket.socket:
        """Connect to its "data" or "control" socket."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.folder / f"{self.slot.args.name}.sock{'.ctrl' if name == 'control' else ''}"))
        sock.settimeout(TIMEOUT_S)
        return sock


async def measured(domain: Domain) -> str:
    """Return what a domain would run."""
    await domain.prepare()
    return domain.measurement


def readable(sock: socket.socket) -> bool:
    """Whether something has come, or the other side has gone."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))
