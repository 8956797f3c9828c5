"""The launcher's work under asyncio: starts and stops instances, keeps what is parked, replaces the dead.

It knows no key and reads no guest's byte. Told to do things by the manager alone (by its user id).
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtpm.domains.base import Domain
from vtpm.errors import (
    ConfinementError,
    ConflictError,
    DomainError,
    NotFoundError,
    ProtocolError,
    UsageError,
    VtpmError,
)
from vtpm.launcher.guest_sockets import open_guest_sockets
from vtpm.launcher.slot import Instance, Slot, uid_for
from vtpm.tpm.types import VtpmId
from vtpm.wire.instance_spec import Role
from vtpm.wire.launcher import (
    MAX_INSTANCES,
    Ended,
    InstanceInfo,
    Instances,
    LauncherStatus,
    NoArgs,
    Replaced,
    StartArgs,
    VtpmArgs,
)
from vtpm.wire.packet_socket import AsyncPacketServer, Peer, close_fds

CONFINED_TIMEOUT_S = 20.0
MAX_DEATHS = 5
DEATHS_WITHIN_S = 60.0
"""An instance that dies more often than this is not replaced again."""
RETRY_S = 0.2
_NAME_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
_log = logging.getLogger("vtpm.launcher")


class LauncherService:
    """See the module.

    Args:
        guests_dir: where guest links' sockets go.
        domains: kinds of domain by name.
        uid_base: first user id for instances.
        on_end: called when the manager has asked for the launcher's end.
    """

    def __init__(
        self, guests_dir: Path, domains: Mapping[str, Domain], uid_base: int, on_end: Callable[[], None]
    ) -> None:
        self._on_end = on_end
        self._guests_dir = guests_dir
        self._domains = domains
        self._uid_base = uid_base
        self._slots: dict[VtpmId, Slot] = {}
        self._loop = asyncio.get_running_loop()
        self.server: AsyncPacketServer | None = None

    async def handle(self, op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, Sequence[int]]:
        """Carry one request out; see AsyncPacketServer."""
        close_fds(fds)
        match op:
            case "status":
                return LauncherStatus(os.getpid(), _boot_id(), os.geteuid() == 0), ()
            case "start":
                return await self._start(args)
            case "attach":
                slot = self._slot(args)
                if slot.instance is None:
                    raise ConflictError(f"{slot.args.name} is being started or replaced")
                return slot.info(), (slot.instance.manager_end.fileno(),)
            case "list":
                return Instances(tuple(self._slots)), ()
            case "stop":
                await self._stop(args)
                return NoArgs(), ()
            case "end":
                self._loop.call_soon(self._on_end)
                return NoArgs(), ()
        raise ProtocolError(f"the launcher knows no operation {op}")

    async def close(self) -> None:
        """End every instance."""
        for slot in list(self._slots.values()):
            await self._stop(VtpmArgs(slot.args.vtpm_id))

    # -- requests ---------------------------------------------------------------------------------------------------
    def _slot(self, args: VtpmArgs) -> Slot:
        slot = self._slots.get(args.vtpm_id)
        if slot is None:
            raise NotFoundError(f"no instance of the vTPM {args.vtpm_id} is running")
        return slot

    async def _start(self, args: StartArgs) -> tuple[InstanceInfo, Sequence[int]]:
        if args.vtpm_id in self._slots:
            raise ConflictError(f"an instance of {args.name} is running already")
        if not args.name or set(args.name) - _NAME_CHARS or args.name.startswith("."):
            raise UsageError(f"{args.name!r} is not a name for a vTPM")
        if any(slot.args.name == args.name for slot in self._slots.values()):
            raise ConflictError(f"an instance of another vTPM named {args.name} is running")
        domain = self._domains.get(args.domain)
        if domain is None:
            raise UsageError(
                f"domains of the kind {args.domain} are not available on this host",
                next_step=f"Available: {', '.join(sorted(self._domains))}",
            )
        uid = uid_for({slot.uid for slot in self._slots.values()}, self._uid_base, MAX_INSTANCES)
        if uid is None:
            raise ConflictError(f"{MAX_INSTANCES} instances are running, which is the most")
        sockets = open_guest_sockets(self._guests_dir, args.name, args.owner_uid, args.owner_gid)
        slot = Slot(args, domain, uid, sockets)
        self._slots[args.vtpm_id] = slot
        try:
            instance = await self._launch(slot, Role.FIRST)
        except VtpmError:
            self._forget(slot)
            raise
        return slot.info(), (instance.manager_end.fileno(),)

    async def _stop(self, args: VtpmArgs) -> None:
        slot = self._slot(args)
        slot.stopping = True
        instance = slot.instance
        if instance is not None:
            instance.domain.kill()
            await self._ended(instance)
        while self._slots.get(args.vtpm_id) is slot:
            # The watcher of the instance's end runs in this loop too, and forgets the slot.
            await asyncio.sleep(0)

    # -- life of an instance ----------------------------------------------------------------------------------------
    async def _launch(self, slot: Slot, role: Role) -> Instance:
        instance = slot.start_instance(role)
        self._loop.add_reader(instance.hold, self._on_hold, slot, instance)
        try:
            await asyncio.wait_for(self._readable(instance.domain.report_fd), CONFINED_TIMEOUT_S)
            instance.report = instance.domain.report()
        except (TimeoutError, ConfinementError) as error:
            instance.domain.kill()
            await self._ended(instance)
            how = self._close_instance(slot, instance)
            why = error.message if isinstance(error, VtpmError) else f"it took more than {CONFINED_TIMEOUT_S} s"
            raise DomainError(f"the instance of {slot.args.name} was not started: {why} ({how})") from error
        task = self._loop.create_task(self._watch(slot, instance))
        task.add_done_callback(_report_defect)
        return instance

    async def _watch(self, slot: Slot, instance: Instance) -> None:
        await self._ended(instance)
        orderly = slot.stopping
        how = self._close_instance(slot, instance)
        now = time.monotonic()
        slot.deaths = [at for at in slot.deaths if now - at < DEATHS_WITHIN_S] + [now]
        if how == "exit status 0" or orderly:
            self._forget(slot)
            self._tell_ended(slot, instance, how)
            return
        _log.warning("%s: its instance %d died: %s", slot.args.name, instance.domain.pid, how)
        if len(slot.deaths) > MAX_DEATHS:
            self._forget(slot)
            self._tell_ended(slot, instance, f"{how}, for the {MAX_DEATHS + 1}th time in {DEATHS_WITHIN_S:.0f} s")
            return
        while True:
            try:
                successor = await self._launch(slot, Role.SUCCESSOR)
                break
            except VtpmError as error:
                _log.error("%s: no successor: %s", slot.args.name, error)
                # What killed one may have killed the other too (no memory, say): the parked guest is worth another try.
                slot.deaths.append(time.monotonic())
                if len(slot.deaths) > MAX_DEATHS or slot.stopping:
                    self._forget(slot)
                    self._tell_ended(slot, instance, f"{how}; no successor: {error.message}"[:500])
                    return
                await asyncio.sleep(RETRY_S)
        if slot.stopping:
            successor.domain.kill()
            return
        if self.server is not None:
            self.server.broadcast_event(
                "replaced", Replaced(instance.instance_id, how, slot.info()), (successor.manager_end.fileno(),)
            )

    def _tell_ended(self, slot: Slot, instance: Instance, how: str) -> None:
        if self.server is not None:
            self.server.broadcast_event("ended", Ended(slot.args.vtpm_id, instance.instance_id, how))

    def _close_instance(self, slot: Slot, instance: Instance) -> str:
        how = instance.domain.reap()
        # What the instance parked last may still be in the channel.
        try:
            while _has_more(instance) and slot.take_hold_message(instance):
                pass
        except ProtocolError as error:
            _log.warning("%s: %s", slot.args.name, error)
        self._loop.remove_reader(instance.hold)
        instance.close()
        slot.instance = None
        return how

    def _forget(self, slot: Slot) -> None:
        if self._slots.get(slot.args.vtpm_id) is slot:
            del self._slots[slot.args.vtpm_id]
            slot.close()

    def _on_hold(self, slot: Slot, instance: Instance) -> None:
        try:
            alive = slot.take_hold_message(instance)
        except ProtocolError as error:
            _log.error("%s: its instance is ended: %s", slot.args.name, error)
            instance.domain.kill()
            alive = False
        if not alive:
            self._loop.remove_reader(instance.hold)

    async def _ended(self, instance: Instance) -> None:
        await self._readable(os.dup(instance.domain.exit_fd), close=True)

    async def _readable(self, fd: int, *, close: bool = False) -> None:
        ready = self._loop.create_future()

        def on_ready() -> None:
            self._loop.remove_reader(fd)
            if not ready.done():
                ready.set_result(None)

        self._loop.add_reader(fd, on_ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(fd)
            if close:
                os.close(fd)


def _has_more(instance: Instance) -> bool:
    poller = select.poll()
    poller.register(instance.hold, select.POLLIN)
    return any(event & select.POLLIN for _, event in poller.poll(0))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _report_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("an instance is not watched any more", exc_info=error)
