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

from vtpm.domains.base import ORDERLY, Domain
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
    Measured,
    NoArgs,
    Replaced,
    StartArgs,
    VtpmArgs,
)
from vtpm.wire.packet_socket import AsyncPacketServer, Peer, close_fds

CONFINED_TIMEOUT_S = 20.0
ATTACH_TIMEOUT_S = 8.0
"""Shorter than the manager waits for the answer."""
END_TIMEOUT_S = 10.0
MAX_DEATHS = 5
DEATHS_WITHIN_S = 60.0
"""An instance that dies more often than this is not replaced again."""
RETRY_S = 0.2
_NAME_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")
_log = logging.getLogger("vtpm.launcher")


class OtherImageError(ConflictError):
    """What would run is not what was to be started."""


class LauncherService:
    """See the module.

    Args:
        guests_dir: where guest links' sockets go.
        domains: kinds of domain by name.
        uid_base: first user id for instances.
        on_end: called when the manager has asked for the launcher's end.
        most: bound on the instances, from the limit of open files; see `descriptors`.
    """

    def __init__(
        self,
        guests_dir: Path,
        domains: Mapping[str, Domain],
        uid_base: int,
        on_end: Callable[[], None],
        *,
        most: int = MAX_INSTANCES,
    ) -> None:
        self._most = most
        self._on_end = on_end
        self._guests_dir = guests_dir
        self._domains = domains
        self._uid_base = uid_base
        self._slots: dict[VtpmId, Slot] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.server: AsyncPacketServer | None = None

    async def handle(self, op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, Sequence[int]]:
        """Carry one request out; see AsyncPacketServer."""
        close_fds(fds)
        match op:
            case "status":
                return LauncherStatus(os.getpid(), _boot_id(), os.geteuid() == 0, tuple(sorted(self._domains))), ()
            case "measure":
                return await self._measure(self._domain(args.kind)), ()
            case "start":
                return await self._start(args)
            case "attach":
                return await self._attach(self._slot(args))
            case "list":
                return Instances(tuple(self._slots)), ()
            case "stop":
                await self._stop(self._slot(args))
                return NoArgs(), ()
            case "end":
                self._loop.call_soon(self._on_end)
                return NoArgs(), ()
        raise ProtocolError(f"the launcher knows no operation {op}")

    async def close(self) -> None:
        """End every instance."""
        ends = [self._stop(slot) for slot in self._slots.values()]
        for error in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(error, VtpmError):
                _log.error("%s", error)

    # -- requests ---------------------------------------------------------------------------------------------------
    def _slot(self, args: VtpmArgs) -> Slot:
        slot = self._slots.get(args.vtpm_id)
        if slot is None:
            raise NotFoundError(f"no instance of the vTPM {args.vtpm_id} is running")
        return slot

    def _domain(self, kind: str) -> Domain:
        domain = self._domains.get(kind)
        if domain is None:
            raise UsageError(
                f"domains of the kind {kind} are not available on this host",
                next_step=f"Available: {', '.join(sorted(self._domains))}",
            )
        return domain

    async def _measure(self, domain: Domain) -> Measured:
        await domain.prepare()
        return Measured(domain.measurement, domain.engine_version, domain.label)

    async def _start(self, args: StartArgs) -> tuple[InstanceInfo, Sequence[int]]:
        if args.vtpm_id in self._slots:
            raise ConflictError(f"an instance of {args.name} is running already")
        if not args.name or set(args.name) - _NAME_CHARS or args.name.startswith("."):
            raise UsageError(f"{args.name!r} is not a name for a vTPM")
        if any(slot.args.name == args.name for slot in self._slots.values()):
            raise ConflictError(f"an instance of another vTPM named {args.name} is running")
        domain = self._domain(args.domain)
        if self._most <= len(self._slots) < MAX_INSTANCES:
            raise ConflictError(
                f"{args.name} is not started: {len(self._slots)} instances are running, and the launcher may not open "
                "files for more",
                next_step="Raise its hard limit of open files (LimitNOFILE= in its unit, or ulimit -Hn)",
            )
        uid = uid_for({slot.uid for slot in self._slots.values()}, self._uid_base, MAX_INSTANCES)
        if uid is None:
            raise ConflictError(f"{MAX_INSTANCES} instances are running, which is the most")
        sockets = open_guest_sockets(self._guests_dir, args.name, args.owner_uid, args.owner_gid)
        try:
            slot = Slot(args, domain, uid, sockets)
        except VtpmError:
            sockets.close()
            raise
        self._slots[args.vtpm_id] = slot
        try:
            instance = await self._launch(slot, Role.FIRST)
        except BaseException:
            self._forget(slot)
            raise
        task = self._loop.create_task(self._follow(slot, instance))
        self._tasks.add(task)
        task.add_done_callback(self._report_defect)
        return slot.info(), (instance.manager_end.fileno(),)

    async def _attach(self, slot: Slot) -> tuple[InstanceInfo, Sequence[int]]:
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                # An instance that is not confined yet is nobody's to talk to.
                while not slot.confined.is_set():
                    await slot.confined.wait()
        except TimeoutError:
            raise ConflictError(f"{slot.args.name} is being started or replaced") from None
        if slot.instance is None:
            raise NotFoundError(f"the instance of {slot.args.name} has ended")
        return slot.info(), (slot.instance.manager_end.fileno(),)

    async def _stop(self, slot: Slot) -> None:
        slot.stopping = True
        if slot.instance is not None:
            slot.instance.domain.kill()
        try:
            # Whoever follows the instance, or is starting it, forgets the slot.
            await asyncio.wait_for(slot.ended.wait(), END_TIMEOUT_S)
        except TimeoutError:
            raise DomainError(
                f"the instance of {slot.args.name} did not end within {END_TIMEOUT_S:g} s of its SIGKILL",
                next_step="The kernel may be holding it, over a broken disk for instance; see its log",
            ) from None

    # -- life of an instance ----------------------------------------------------------------------------------------
    async def _launch(self, slot: Slot, role: Role) -> Instance:
        await slot.domain.prepare()
        # Nothing may be awaited from here until it is started.
        if slot.domain.measurement != slot.args.measurement:
            raise OtherImageError(
                f"{slot.args.name} was to run the image {slot.args.measurement}, and what is here now is"
                f" {slot.domain.measurement}",
                next_step="Start it again; if it was running, its virtual machine must be restarted then",
            )
        if slot.stopping:
            raise ConflictError(f"{slot.args.name} was stopped while it was being started")
        instance = slot.start_instance(role)
        self._loop.add_reader(instance.hold, self._on_hold, slot, instance)
        try:
            instance.report = await asyncio.wait_for(instance.domain.confined(), CONFINED_TIMEOUT_S)
        except (TimeoutError, ConfinementError) as error:
            instance.domain.kill()
            how = await self._see_end(slot, instance)
            why = error.message if isinstance(error, VtpmError) else f"it took more than {CONFINED_TIMEOUT_S} s"
            raise DomainError(f"the instance of {slot.args.name} was not started: {why} ({how})") from error
        slot.confined.set()
        return instance

    async def _follow(self, slot: Slot, instance: Instance) -> None:
        """See a vTPM's instances to their ends, one after the other, and forget the vTPM after the last."""
        how = "nobody follows it any more: the launcher has a defect"
        try:
            successor: Instance | None = instance
            while successor is not None:
                instance = successor
                how = await self._see_end(slot, instance)
                successor, how = await self._successor(slot, instance, how)
        finally:
            self._forget(slot)
            self._tell_ended(slot, instance, how)

    async def _successor(self, slot: Slot, dead: Instance, how: str) -> tuple[Instance | None, str]:
        """Start an instance in place of one that ended, if there is to be one; else say why there is none."""
        if how == ORDERLY or slot.stopping:
            return None, how
        now = time.monotonic()
        slot.deaths = [at for at in slot.deaths if now - at < DEATHS_WITHIN_S] + [now]
        _log.warning("%s: its instance %d died: %s", slot.args.name, dead.domain.pid, how)
        if len(slot.deaths) > MAX_DEATHS:
            return None, f"{how}, for the {MAX_DEATHS + 1}th time in {DEATHS_WITHIN_S:.0f} s"
        why_none = how
        while len(slot.deaths) <= MAX_DEATHS and not slot.stopping:
            try:
                successor = await self._launch(slot, Role.SUCCESSOR)
            except OtherImageError as error:
                # It was let in with the other image alone; a start that somebody asks for decides about this one.
                return None, f"{how}; no successor: {error.message}"
            except VtpmError as error:
                _log.error("%s: no successor: %s", slot.args.name, error)
                # What killed one may have killed the other too (no memory, say): the parked guest is worth another try.
                slot.deaths.append(time.monotonic())
                why_none = f"{how}; no successor: {error.message}"
                await asyncio.sleep(RETRY_S)
                continue
            if self.server is not None and not slot.stopping:
                self.server.broadcast_event(
                    "replaced", Replaced(dead.instance_id, how, slot.info()), (successor.manager_end.fileno(),)
                )
            return successor, how
        return None, why_none

    def _tell_ended(self, slot: Slot, instance: Instance, how: str) -> None:
        if self.server is not None:
            self.server.broadcast_event("ended", Ended(slot.args.vtpm_id, instance.instance_id, how[:500]))

    async def _see_end(self, slot: Slot, instance: Instance) -> str:
        """Wait until an instance has ended, keep what it parked last, and say how it ended."""
        how = await instance.domain.ended()
        slot.instance = None
        slot.confined.clear()
        self._loop.remove_reader(instance.hold)
        # What the instance parked last may still be in the channel.
        try:
            while _has_more(instance) and slot.take_hold_message(instance):
                pass
        except ProtocolError as error:
            _log.warning("%s: %s", slot.args.name, error)
        finally:
            instance.close()
        return how

    def _forget(self, slot: Slot) -> None:
        del self._slots[slot.args.vtpm_id]
        slot.ended.set()
        slot.confined.set()
        slot.close()
        instance, slot.instance = slot.instance, None
        if instance is not None:
            # Only after a defect, or when the launcher ends meanwhile: nothing may run that nobody knows of.
            self._loop.remove_reader(instance.hold)
            instance.close()
            instance.domain.kill()

    def _on_hold(self, slot: Slot, instance: Instance) -> None:
        try:
            alive = slot.take_hold_message(instance)
        except ProtocolError as error:
            _log.error("%s: its instance is ended: %s", slot.args.name, error)
            instance.domain.kill()
            alive = False
        if not alive:
            self._loop.remove_reader(instance.hold)

    def _report_defect(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("an instance is not followed any more", exc_info=error)


def _has_more(instance: Instance) -> bool:
    poller = select.poll()
    poller.register(instance.hold, select.POLLIN)
    return any(event & select.POLLIN for _, event in poller.poll(0))


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
