"""What the manager does: creates, starts, stops and deletes vTPMs, and follows what happens to their instances.

Orchestrates registry and vault (durable truth), keeper (keys) and launcher (instances). One asyncio loop; what blocks
runs in threads. Nothing here depends on the kind of domain.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import vtpm.manager.describe as describe
from vtpm.errors import ConflictError, NotFoundError, StateError, UnavailableError, UsageError, VtpmError
from vtpm.manager.access import Caller, may_create, require_owner, sees
from vtpm.manager.audit_log import AuditLog
from vtpm.manager.health import Health
from vtpm.manager.images import ImageService
from vtpm.manager.instance_link import InstanceLink
from vtpm.manager.instance_moves import LiveMoves, MoveCalls, NotYet
from vtpm.manager.launcher_link import LauncherLink
from vtpm.manager.lifecycle import Happening, after
from vtpm.manager.running import Running, event_of
from vtpm.manager.storage import Storage, VaultDoor
from vtpm.tpm.types import InstanceId, Startup, StateKind, VtpmId
from vtpm.vault.launch_policy import NewImages
from vtpm.vault.records import DomainKind, Event, SavedState, VtpmRecord, valid_name
from vtpm.vault.store import Store
from vtpm.wire.api import CreateVtpm, LifeState, Lockout, MeasuredServices, ShutDown, Status, Vtpm
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.launcher import (
    Ended,
    InstanceInfo,
    LauncherStatus,
    NoArgs,
    Replaced,
    StartArgs,
    VtpmArgs,
)
from vtpm.wire.manager_link import LinkPower, ShutdownMode
from vtpm.wire.packet_socket import close_fds

START_TIMEOUT_S = 60.0
"""Of the launcher's part; a TPM 1.2 makes an RSA key when it is manufactured, which is slow under emulation."""
POWER_ON_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
LET_GO_S = 3.0
"""How long a stop waits for an emulator that has just ended: it may be told through a relay and a machine."""
KEEPER_TIMEOUT_S = 10.0
POWER_PAUSE_S = 5.0
LOCKOUT_ANSWER_S = 0.5
"""How long `show` waits for a TPM that may be busy; then it says what was known before."""
_MOVABLE = (LifeState.STOPPED, LifeState.FROZEN, LifeState.INERT)
LOCKED_OUT = "locked_out"
DELETED = "deleted"
_log = logging.getLogger("vtpm.manager")
T = TypeVar("T")


class ManagerService:
    """See the module.

    Args:
        run_dir, state_dir: the services' directories.
        open_storage: opens the vault, blocking; with an event, as the operator's decision to take it as it is.
        measured: what was measured of the services.
        new_images: what becomes of software for vTPMs that was never seen.
    """

    def __init__(
        self,
        run_dir: Path,
        state_dir: Path,
        open_storage: Callable[[Event | None], Storage],
        measured: MeasuredServices,
        new_images: NewImages,
    ) -> None:
        self.run_dir = run_dir
        self.state_dir = state_dir
        self.measured = measured
        self.running: dict[VtpmId, Running] = {}
        self.launcher = LauncherLink(run_dir, self._on_launcher_event, self._on_launcher_gone, self._on_launcher_back)
        self.door = VaultDoor(open_storage, self._reconcile)
        self.audit = AuditLog(self.door)
        self._keeper = KeeperClient(run_dir, timeout_s=KEEPER_TIMEOUT_S)
        # One: calls of one client go one after the other anyway.
        self._keeper_threads = CallThreads("keeper", 1)
        self._health = Health(run_dir, self.door, self.launcher)
        self.images = ImageService(
            lambda: self.launcher, self._keeper, self._keeper_threads, self.door, self.audit, self.running, new_images
        )
        self._locks: dict[VtpmId, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._states: dict[VtpmId, LifeState] = {}
        # What the launcher says of one vTPM is followed in the order in which it says it, however slow the store is.
        self._turns: dict[VtpmId, asyncio.Lock] = {}
        # Instances that died before this manager, which has just begun, followed their vTPMs.
        self._died_early: set[InstanceId] = set()
        self.live_moves: LiveMoves = NotYet()
        """Set once, when what moves vTPMs has been loaded."""
        self._passing: dict[VtpmId, VtpmRecord] = {}
        self._closing = False

    # -- start and end of the manager -------------------------------------------------------------------------------
    async def begin(self) -> None:
        """Connect to the launcher, open the vault and take up what runs.

        A vault that does not open is no error here: `status` says why, and whoever asks for a vTPM hears it too.

        Raises:
            UnavailableError: there is no launcher.
        """
        await self.launcher.connect()
        self._spawn(self.launcher.follow())
        try:
            await self.door.open()
        except VtpmError as error:
            _log.error("%s", error)
        else:
            self._spawn(self._note_recovery())

    async def _note_recovery(self) -> None:
        """Note a recovery whose manager died before it could."""
        try:
            status = await self._keeper_threads.run(self._keeper.status)
            if status.recovery_unnoted:
                detail = json.dumps({"key": status.recovery_unnoted, "noted": "by the next manager"})
                await self.audit.append(Event(datetime.now(UTC), None, "recovered", detail=detail))
                await self._keeper_threads.run(self._keeper.recovery_noted)
        except VtpmError as error:
            _log.error("whether there was a recovery is not known, the next manager looks again: %s", error)

    async def end(self) -> None:
        """Let go of everything; instances run on."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        for running in list(self.running.values()):
            running.link.close()
        self.launcher.close()
        self._keeper_threads.close()
        self._health.close()
        await self.door.close()

    async def _on_launcher_gone(self) -> None:
        for running in list(self.running.values()):
            await self._settle_end(running, "the launcher is gone")
        await self.live_moves.all_ended("the launcher is gone")

    async def _on_launcher_back(self) -> None:
        if self.door.is_open:
            await self._reconcile()

    async def _reconcile(self) -> None:
        """Bring registry and launcher together, by the crash rule of each state."""
        records = {record.id: record for record in await self._store(lambda store: store.list_vtpms())}
        alive = (await self.launcher.call("list", NoArgs()))[0].vtpm_ids
        # At the same time, for the saves of each wait until its own instance is taken up.
        ends = await asyncio.gather(*(self._take_up_or_end(vtpm_id, records.get(vtpm_id)) for vtpm_id in alive))
        why = dict(zip(alive, ends, strict=True))
        self._died_early.clear()
        for record in records.values():
            if record.id in self.running or record.id in self._passing:
                continue
            try:
                # As it is by now: a peer's word may have moved it while the launcher was asked.
                current = await self._store(lambda store, record=record: store.get_vtpm(record.id))  # type: ignore[misc]
            except NotFoundError:
                continue
            if LifeState(current.lifecycle) not in _MOVABLE:
                self._states[record.id] = LifeState(current.lifecycle)
            await self._settle_read(current, why.get(record.id) or "no instance was found when the manager started")
        self._spawn(self.live_moves.take_up())

    async def _take_up_or_end(self, vtpm_id: VtpmId, record: VtpmRecord | None) -> str:
        """Take an instance up, or end it and say why."""
        how = ""
        if self.live_moves.expects(vtpm_id):
            return ""
        if record is not None and record.lifecycle in (LifeState.FROZEN, LifeState.INERT) and record.instance_id:
            # Its guest is on its way, and so is what becomes of it.
            self._passing[vtpm_id] = record
            return ""
        if record is not None and LifeState(record.lifecycle) in (LifeState.RUNNING, LifeState.FAILED):
            try:
                await self._take_up(record)
                return ""
            except VtpmError as error:
                how = f"it was ended when the manager started: {error.message}"
                _log.error("%s: its instance cannot be taken up again: %s", record.name, error)
        await self._end_instance(vtpm_id)
        return how

    def left_passing(self) -> Sequence[VtpmRecord]:
        """Return, once, the frozen and inert vTPMs whose instances an earlier manager has left running."""
        passing, self._passing = self._passing, {}
        return list(passing.values())

    async def take_up_frozen(self, record: VtpmRecord) -> None:
        """Take up the instance of a frozen vTPM. Raises VtpmError: it is not there, or not to be; it is ended."""
        try:
            await self._take_up(record)
        except VtpmError as error:
            await self.end_passing(record, f"it was ended when the manager started: {error.message}")
            raise

    async def end_passing(self, record: VtpmRecord, how: str) -> None:
        """End the instance of a frozen or inert vTPM, which stays what it is."""
        await self._end_instance(record.id)
        await self._settle_record(record, how)

    async def _take_up(self, record: VtpmRecord) -> None:
        info, link_socket = await self._attach(record, record.instance_id)
        while info.instance_id in self._died_early:
            # Its successor's link was refused, for nobody followed the vTPM yet; see _on_replaced.
            link_socket.close()
            self.door.vault.close_vtpm(record.id)
            info, link_socket = await self._attach(record, info.instance_id)
        self._states[record.id] = LifeState(record.lifecycle)
        self._spawn(self._confirm(self._follow(record, info, link_socket)))

    async def _attach(self, record: VtpmRecord, bound: InstanceId | None) -> tuple[InstanceInfo, socket.socket]:
        """Get the instance that runs, and give it the vTPM's state in the place of the one that is bound to it."""
        info, fds = await self.launcher.call("attach", VtpmArgs(record.id))
        link_socket = _one_socket(fds)
        try:
            await self.images.check_taken_up(record, info)
            key = await self.key(record)
            if bound != info.instance_id:
                await self._store(lambda store: store.bind_instance(record.id, info.instance_id, replaces=bound))
            await asyncio.to_thread(self.door.vault.open_vtpm, record.id, key)
        except BaseException:
            link_socket.close()
            raise
        return info, link_socket

    async def _confirm(self, running: Running) -> None:
        """End an instance that was taken up and does not answer. Nobody else waits for it."""
        record = running.record
        try:
            await running.link.ready(running.info.ready_within_s)
        except VtpmError as error:
            if self.running.get(record.id) is not running:
                return
            _log.error("%s: its instance %d is ended: %s", record.name, running.info.pid, error)
            await self._end_instance(record.id)
            await self._settle_end(running, error.message)
        else:
            _log.info("%s: its instance %d is taken up again", record.name, running.info.pid)

    # -- what callers ask -------------------------------------------------------------------------------------------
    async def create(self, wanted: CreateVtpm, caller: Caller) -> Vtpm:
        """Register a vTPM with a key of its own; it is manufactured at its first start."""
        may_create(caller)
        name = valid_name(wanted.name)
        kind = DomainKind.of(wanted.domain, wanted.make)
        if wanted.tpm_version not in kind.tpm_versions:
            raise UsageError(f"vTPMs of the make {kind.make} are TPM {' or '.join(kind.tpm_versions)}")
        launcher: LauncherStatus = (await self.launcher.call("status", NoArgs()))[0]
        if kind not in launcher.domains:
            raise UsageError(
                f"vTPM {name} cannot have the domain {kind}: this host's launcher does not start such",
                next_step=f"This host has {', '.join(launcher.domains)}",
            )
        vtpm_id = VtpmId(uuid4())
        new_key = await self._keeper_threads.run(self._keeper.new_key, vtpm_id)
        record = VtpmRecord(
            id=vtpm_id,
            name=name,
            owner_uid=caller.uid,
            owner_gid=caller.gid,
            vm_uuid=wanted.vm_uuid,
            tpm_version=wanted.tpm_version,
            domain=kind,
            created_at=datetime.now(UTC),
            wrapped_key=new_key.wrapped,
        )
        event = event_of(caller.uid, "created", record, tpm_version=record.tpm_version, domain=record.domain)
        return await self.add(record, (), event, None if caller.is_admin else caller.max_vtpms)

    async def add(
        self, record: VtpmRecord, states: Sequence[SavedState], event: Event, max_owned: int | None = None
    ) -> Vtpm:
        """Register a vTPM, with the state that it begins with; durable as a whole, or not there at all.

        Args:
            max_owned: how many its owner may have with it.
        """
        await self._store(lambda store: store.create_vtpm(record, states, event=event, max_owned=max_owned))
        await self.audit.came()
        return self._describe(record)

    @contextlib.asynccontextmanager
    async def held(self, name: str, caller: Caller, happening: Happening) -> AsyncIterator[VtpmRecord]:
        """Keep a vTPM in the state that it is in, if this may happen to it there; see lifecycle."""
        record = await self._find(name, caller)
        async with self._lock(record.id):
            after(name, self._state(record), happening)
            yield record

    def look_again(self, vtpm_id: VtpmId) -> None:
        """Take a vTPM's state from the store from here on, if it is one that a move may have changed there.

        Not of one that is being started, stopped or runs: no move changes it, and the store may be behind.
        """
        if vtpm_id not in self.running and self._states.get(vtpm_id) in _MOVABLE:
            del self._states[vtpm_id]

    async def list(self, after: str, limit: int, caller: Caller) -> Sequence[Vtpm]:
        """Return the first `limit` vTPMs after a name, by name, of those that the caller may see."""
        owner_uid = None if caller.is_admin else caller.uid
        records = await self._store(lambda store: store.list_vtpms(owner_uid=owner_uid, after=after, limit=limit))
        return [self._describe(record) for record in records]

    async def show(self, name: str, caller: Caller) -> Vtpm:
        """Return one vTPM. One that was locked is looked at again: a lockout ends by itself, without a word."""
        record = await self._find(name, caller)
        running = self.running.get(record.id)
        if running is not None and running.link.facts.lockout is not None:
            await running.link.ask_lockout(LOCKOUT_ANSWER_S)
        return self._describe(record)

    async def start(self, name: str, startup: Startup, caller: Caller) -> Vtpm:
        """Start a vTPM: an instance, powered on, answering on its tcti."""
        record = await self._find(name, caller)
        async with self._lock(record.id):
            if self._state(record) is LifeState.FAILED and (running := self.running.get(record.id)) is not None:
                if running.has_emulator:
                    raise ConflictError(f"vTPM {name} failed under a guest", next_step="Reset the guest, or stop it")
                await self._stop_locked(record, running, caller, ShutdownMode.IMMEDIATE)
            await self._move(record, Happening.START)
            try:
                async with self.images.admitted(record) as measurement:
                    running = await self._start_locked(record, measurement, startup)
            except VtpmError as error:
                event = event_of(caller.uid, "start_failed", record, why=str(error))
                if self._state(record) is LifeState.STARTING:
                    await self._move(record, Happening.START_FAILED, event)
                else:
                    # The end of its instance was noted already.
                    await self.audit.append(event)
                raise
            await self._move(record, Happening.STARTED, event_of(caller.uid, "started", record, pid=running.info.pid,
                             measurement=running.info.measurement))  # fmt: skip
        return self._describe(await self._find(name, caller))

    async def stop(self, name: str, caller: Caller, *, force: bool = False) -> Vtpm:
        """End a vTPM's instance in order: TPM2_Shutdown, all state saved. `force`: also under a virtual machine."""
        record = await self._find(name, caller)
        if not force and (in_use := self.running.get(record.id)) is not None:
            await in_use.wait_let_go(LET_GO_S)
        async with self._lock(record.id):
            running = self.running.get(record.id)
            if running is None and self._state(record) in (LifeState.RUNNING, LifeState.FAILED):
                # Its end could not be noted when it came.
                await self._end_instance(record.id)
                await self._settle_record(record, "no instance was found when it was stopped")
                return self._describe(await self._find(name, caller))
            if running is None:
                raise ConflictError(f"vTPM {name} is {self._state(record)}: there is nothing to stop")
            if running.has_emulator and not force:
                raise ConflictError(
                    f"vTPM {name} is in use by a virtual machine, which would lose its TPM",
                    next_step="Shut the machine down first, or use --force",
                )
            await self._stop_locked(record, running, caller, ShutdownMode.ORDERLY)
        return self._describe(await self._find(name, caller))

    async def delete(self, name: str, caller: Caller) -> None:
        """Destroy a stopped vTPM's key, state and record."""
        async with self.held(name, caller, Happening.DELETE) as record:
            event = event_of(caller.uid, DELETED, record, epoch=record.epoch)
            await self._store(lambda store: store.delete_vtpm(record.id, event=event))
            self._states.pop(record.id, None)
        self._locks.pop(record.id, None)
        self._turns.pop(record.id, None)
        await self.audit.came()

    async def shut_down(self, caller: Caller) -> ShutDown:
        """Stop every vTPM in order, for `vtpm shutdown`; the caller then ends the services."""
        caller.require_admin("shut the host's vTPMs down")
        stopped = []
        for running in list(self.running.values()):
            name = running.record.name
            try:
                await self.stop(name, caller, force=True)
            except VtpmError as error:
                _log.error("%s: not stopped in order: %s", name, error)
                continue
            stopped.append(name)
        shutdown = Event(datetime.now(UTC), caller.uid, "shutdown", detail=json.dumps({"stopped": stopped}))
        try:
            await self.audit.append(shutdown)
        except VtpmError as error:
            # A vault that does not open, or fails, is often why the services are to end.
            _log.error("the shutdown is not in the audit log: %s", error)
        return ShutDown(stopped)

    async def end_services(self) -> None:
        """End launcher and keeper, after `shut_down`."""
        self._closing = True
        try:
            await self.launcher.call("end", NoArgs())
        except VtpmError as error:
            _log.error("the launcher was not ended: %s", error)
        try:
            await self._keeper_threads.run(self._keeper.end)
        except VtpmError as error:
            _log.error("the keeper was not ended: %s", error)

    async def status(self, caller: Caller) -> Status:
        """Say how the host's services are, soon; also when the vault does not open, or one of them hangs."""
        found = await self._health.ask()
        trouble = found.vtpms if isinstance(found.vtpms, VtpmError) else None
        counts = {} if isinstance(found.vtpms, VtpmError) else found.vtpms
        protections = next(iter(running.info.protections for running in self.running.values()), ())
        stats = self.door.stats()
        return describe.status(
            self.run_dir,
            self.state_dir,
            sum(counts.values()) if caller.is_admin else counts.get(caller.uid, 0),
            sum(sees(caller, running.record) for running in self.running.values()),
            found.keeper,
            found.launcher,
            protections,
            stats,
            trouble,
            self.measured,
        )

    # -- starting and stopping --------------------------------------------------------------------------------------
    async def _start_locked(self, record: VtpmRecord, measurement: str, startup: Startup) -> Running:
        key = await self.key(record)
        info, link_socket = await self._launch(record, measurement)
        try:
            await self._store(
                lambda store: store.bind_instance(record.id, info.instance_id, replaces=record.instance_id)
            )
            await asyncio.to_thread(self.door.vault.open_vtpm, record.id, key)
        except BaseException:
            link_socket.close()
            await self._end_instance(record.id)
            raise
        running = self._follow(record, info, link_socket)
        try:
            await running.link.ready(running.info.ready_within_s)
            await running.link.power_on(startup, POWER_ON_TIMEOUT_S)
        except VtpmError:
            await self._end_instance(record.id)
            await self._settle_end(running, "its start failed")
            raise
        return running

    async def _launch(self, record: VtpmRecord, measurement: str) -> tuple[InstanceInfo, socket.socket]:
        owner = record.owner_uid, record.owner_gid
        args = StartArgs(record.id, record.name, record.tpm_version, record.domain.value, *owner, measurement)
        info, fds = await self.launcher.call("start", args, START_TIMEOUT_S)
        return info, _one_socket(fds)

    async def _stop_locked(self, record: VtpmRecord, running: Running, caller: Caller, mode: ShutdownMode) -> None:
        await self._move(record, Happening.STOP)
        try:
            await running.link.shut_down(mode, STOP_TIMEOUT_S)
            await asyncio.wait_for(running.ended.wait(), STOP_TIMEOUT_S)
        except (VtpmError, TimeoutError) as error:
            _log.warning("%s: it is ended without an orderly shutdown: %s", record.name, error)
            await self._end_instance(record.id)
            # Perhaps it died meanwhile, and what is followed now is its successor.
            await self._settle_end(self.running.get(record.id, running), "it did not shut down in order")
            # Whoever settles its end, the vTPM is stopped when this returns.
            await running.ended.wait()
            await self.audit.append(event_of(caller.uid, "killed", record, why=error))
        else:
            await self.audit.append(event_of(caller.uid, "stopped", record))

    async def _end_instance(self, vtpm_id: VtpmId) -> None:
        try:
            await self.launcher.call("stop", VtpmArgs(vtpm_id), STOP_TIMEOUT_S)
        except NotFoundError:
            return
        except VtpmError as error:
            # With the launcher's end its instances end too; whoever calls this has the rest to settle.
            _log.error("the instance of vTPM %s was not ended: %s", vtpm_id, error)

    def _follow(self, record: VtpmRecord, info: InstanceInfo, link_socket: socket.socket) -> Running:
        return self._run_as(record, info, self.link(record, info, link_socket))

    def _run_as(self, record: VtpmRecord, info: InstanceInfo, link: InstanceLink) -> Running:
        running = Running(record, info, link)
        self.running[record.id] = running
        return running

    def link(self, record: VtpmRecord, info: InstanceInfo, link_socket: socket.socket) -> InstanceLink:
        """Return the manager's end of an instance's link. What it says is followed once it runs."""

        # Asked each time, for an instance may be taken up before what moves vTPMs has been loaded.
        async def depart(volatile: bytes) -> bytes:
            return await self.live_moves.depart(record.id, info.instance_id, volatile)

        async def take_back() -> None:
            await self.live_moves.take_back(record.id)

        async def arrive(sealed: bytes) -> Mapping[StateKind, bytes]:
            return await self.live_moves.arrive(record.id, sealed)

        def wanted() -> None:
            self.live_moves.wanted(record.id)

        return InstanceLink(
            link_socket,
            record.name,
            record.id,
            info.instance_id,
            record.tpm_version,
            self.door.vault,
            self._on_link_change,
            self._on_misbehaviour,
            MoveCalls(depart, take_back, arrive, wanted),
        )

    # -- vTPMs that move with their guests ----------------------------------------------------------------------------
    def freeze(self, running: Running) -> None:
        """A vTPM under its guest is about to be frozen in the store. Raises ConflictError: it does not run in order."""
        record = running.record
        self._states[record.id] = after(record.name, self._state(record), Happening.DEPART)

    async def go_on(self, running: Running, record: VtpmRecord) -> None:
        """Have a vTPM run here under its guest: one that was frozen, or about to be, and is held.

        Args:
            record: as it is in the store by now.
        """
        await asyncio.to_thread(self.door.vault.renew, record.id)
        running.record = record
        self._states[record.id] = LifeState.RUNNING

    async def begin_arrived(self, record: VtpmRecord, info: InstanceInfo, link: InstanceLink) -> None:
        """Have a vTPM run here that arrived with its guest, in the instance that had it inert."""
        key = await self.key(record)
        await asyncio.to_thread(self.door.vault.open_vtpm, record.id, key)
        self._states[record.id] = LifeState.RUNNING
        self._run_as(record, info, link)
        link.activate()

    def is_held(self, running: Running) -> bool:
        """Whether a vTPM that has an instance runs here by right, as far as this manager knows."""
        return self._state(running.record) in (LifeState.RUNNING, LifeState.FAILED)

    async def settle_ended(self, vtpm_id: VtpmId) -> None:
        """Have a vTPM that is held, and whose instance ended while it was not, be stopped."""
        async with self._lock(vtpm_id):
            record = await self._store(lambda store: store.get_vtpm(vtpm_id))
            if vtpm_id not in self.running and record.instance_id is not None:
                await self._settle_read(record, "its instance ended while its guest was on its way")

    async def settle_running(self, running: Running, how: str) -> None:
        """An instance that has begun with what arrived has ended."""
        await self._settle_end(running, how)

    async def let_go(self, running: Running, how: str) -> None:
        """End the instance of a vTPM that has moved from under it."""
        await self._end_instance(running.record.id)
        await self._settle_end(running, how)

    async def start_inert(self, record: VtpmRecord) -> tuple[InstanceInfo, InstanceLink]:
        """Start an instance for a vTPM that is to arrive, which gets no state yet. Raises VtpmError: it was not."""
        async with self.images.admitted(record) as measurement:
            info, link_socket = await self._launch(record, measurement)
            return info, await self._linked(record, info, link_socket)

    async def attach_inert(self, record: VtpmRecord) -> tuple[InstanceInfo, InstanceLink]:
        """Take up the instance that is bound to an inert vTPM. Raises VtpmError: it is not there, or not to be."""
        info, fds = await self.launcher.call("attach", VtpmArgs(record.id))
        link_socket = _one_socket(fds)
        try:
            if info.instance_id != record.instance_id:
                raise ConflictError(f"the instance that vTPM {record.name} arrived at is no more")
            await self.images.check_taken_up(record, info)
        except VtpmError:
            link_socket.close()
            raise
        return info, await self._linked(record, info, link_socket)

    async def _linked(self, record: VtpmRecord, info: InstanceInfo, link_socket: socket.socket) -> InstanceLink:
        link = self.link(record, info, link_socket)
        try:
            await link.ready(info.ready_within_s)
        except VtpmError:
            link.close()
            await self._end_instance(record.id)
            raise
        return link

    # -- what happens by itself -------------------------------------------------------------------------------------
    def _on_launcher_event(self, event: str, args: Any, fds: tuple[int, ...]) -> None:
        if isinstance(args, Replaced) and len(fds) == 1:
            self._spawn(self._in_turn(args.instance.vtpm_id, self._on_replaced(args, _one_socket(fds))))
        elif isinstance(args, Ended):
            close_fds(fds)
            self._spawn(self._in_turn(args.vtpm_id, self._on_ended(args)))
        else:
            close_fds(fds)

    async def _in_turn(self, vtpm_id: VtpmId, work: Coroutine[Any, Any, None]) -> None:
        # A lock of asyncio's is given in the order in which it was asked for.
        async with self._turns.setdefault(vtpm_id, asyncio.Lock()):
            await work

    async def _on_ended(self, args: Ended) -> None:
        running = self.running.get(args.vtpm_id)
        if running is not None and running.info.instance_id == args.instance_id:
            await self._settle_end(running, args.how)
        elif running is None:
            await self.live_moves.ended(args.vtpm_id, args.instance_id, args.how)

    async def _on_replaced(self, args: Replaced, link_socket: socket.socket) -> None:
        info = args.instance
        running = self.running.get(info.vtpm_id)
        if running is None and self.live_moves.expects(info.vtpm_id):
            # What came with the guest was in the dead one alone.
            link_socket.close()
            await self._end_instance(info.vtpm_id)
            await self.live_moves.ended(info.vtpm_id, args.dead_instance_id, args.how)
            return
        not_yet = running is None and info.vtpm_id not in self._states
        if not_yet or (running is not None and running.info.instance_id == info.instance_id):
            # A manager that has just begun: `attach` gives it the successor, or has given it already; and if it has
            # given the dead one, it is asked again.
            if not_yet:
                self._died_early.add(args.dead_instance_id)
            link_socket.close()
            return
        if running is None or running.info.instance_id != args.dead_instance_id:
            # Not ours to follow (a start that failed meanwhile): a vTPM without a manager must not run.
            link_socket.close()
            await self._end_instance(info.vtpm_id)
            return
        record = running.record
        if self._state(record) is LifeState.STOPPING:
            # It was being stopped, and now it is.
            link_socket.close()
            await self._end_instance(record.id)
            await self._settle_end(running, args.how)
            return
        running.link.close()
        try:
            self.images.check_successor(running.info, info)
            await self._store(
                lambda store: store.bind_instance(record.id, info.instance_id, replaces=args.dead_instance_id)
            )
        except VtpmError as error:
            _log.error("%s: its successor is not accepted: %s", record.name, error)
            link_socket.close()
            await self._end_instance(record.id)
            await self._settle_end(running, f"its successor was not accepted: {error.message}")
            return
        ended = running.ended
        successor = self._follow(record, info, link_socket)
        successor.ended = ended
        successor.reason = f"its instance died: {args.how}"
        await self._move(record, Happening.DIED, event_of(None, "instance_died", record, how=args.how, pid=info.pid))

    async def _settle_end(self, running: Running, how: str) -> None:
        """An instance is gone and none follows: note it, once."""
        record = running.record
        if self.running.get(record.id) is not running:
            return
        del self.running[record.id]
        running.link.close()
        self.door.vault.close_vtpm(record.id)
        try:
            await self._settle_record(record, how)
        except NotFoundError:
            # It has moved.
            self._states.pop(record.id, None)
        except VtpmError as error:
            # It is gone, whatever the store says; the next start, or the next manager, brings the store after it.
            _log.error("%s: its end was not noted: %s", record.name, error)
            self._states[record.id] = LifeState.STOPPED
        finally:
            running.ended.set()

    async def _settle_record(self, record: VtpmRecord, how: str) -> None:
        await self._settle_read(await self._store(lambda store: store.get_vtpm(record.id)), how)

    async def _settle_read(self, record: VtpmRecord, how: str) -> None:
        """As _settle_record, of a record that has just been read."""
        if record.instance_id is not None:
            # A move may decide about the vTPM at any moment: as it is when the instance is unbound, so it is settled.
            record = await self._store(partial(_unbound, record))
        stored = LifeState(record.lifecycle)
        if stored in _MOVABLE:
            self._states.pop(record.id, None)
            return
        if self._states.get(record.id) in _MOVABLE:
            self._states[record.id] = stored
        expected = self._state(record) is LifeState.STOPPING
        await self._move(
            record, Happening.ENDED, None if expected else event_of(None, "instance_ended", record, how=how)
        )

    def _on_link_change(self, link: InstanceLink, note: str) -> None:
        running = self.running.get(link.vtpm_id)
        if running is None or running.link is not link:
            return
        running.note_client()
        if link.facts.power is LinkPower.FAILED:
            running.reason = note or running.reason or "its TPM failed"
        elif note and running.notes.take():
            self._spawn(self.audit.append(event_of(None, "note", running.record, note=note)))
        lockout = link.facts.lockout
        if lockout is not None and lockout.since != running.locked_since and running.notes.take():
            running.locked_since = lockout.since
            self._spawn(self._note_lockout(running.record, describe.lockout(lockout)))
        if not running.following:
            running.following = True
            self._spawn(self._follow_power(running))

    async def _note_lockout(self, record: VtpmRecord, lockout: Lockout) -> None:
        """Note a lockout once, though each manager in turn is told of it."""
        event = event_of(None, LOCKED_OUT, record, **asdict(lockout))
        await self._store(partial(_append_lockout, record.id, event))
        await self.audit.came()

    def _on_misbehaviour(self, link: InstanceLink) -> None:
        running = self.running.get(link.vtpm_id)
        if running is not None and running.link is link:
            self._spawn(self._end_misbehaving(running))
        elif running is None and self.live_moves.expects(link.vtpm_id):
            self._spawn(self._end_instance(link.vtpm_id))

    async def _end_misbehaving(self, running: Running) -> None:
        record = running.record
        try:
            await self.audit.append(event_of(None, "misbehaved", record, complaints=running.link.complaints))
        finally:
            # It goes even when the store takes no word of it.
            await self._end_instance(record.id)
            await self._settle_end(running, "it sent what no vtpmd sends")

    async def _follow_power(self, running: Running) -> None:
        """Bring the life cycle after the TPM's power, one step at a time however often an instance changes it."""
        record = running.record
        try:
            while self.running.get(record.id) is running:
                power, state = running.link.facts.power, self._state(record)
                if power is LinkPower.FAILED and state is LifeState.RUNNING:
                    happening, event = Happening.ENGINE_FAILED, event_of(None, "tpm_failed", record, why=running.reason)
                elif power is LinkPower.ON and state is LifeState.FAILED:
                    running.reason = ""
                    happening, event = Happening.RESET, event_of(None, "guest_reset", record)
                else:
                    return
                if not running.notes.take():
                    # It changes its power without end; siblings share the store that each change is written to.
                    await asyncio.sleep(POWER_PAUSE_S)
                await self._move_quietly(record, happening, event)
        finally:
            running.following = False

    # -- small things -----------------------------------------------------------------------------------------------
    async def _find(self, name: str, caller: Caller) -> VtpmRecord:
        valid_name(name)
        record = await self._store(lambda store: store.find_vtpm(name))
        require_owner(caller, record)
        return record

    def _state(self, record: VtpmRecord) -> LifeState:
        return self._states.get(record.id, LifeState(record.lifecycle))

    async def _move(self, record: VtpmRecord, happening: Happening, event: Event | None = None) -> None:
        following = after(record.name, self._state(record), happening)
        before = self._states.get(record.id)
        self._states[record.id] = following
        try:
            await self._store(lambda store: store.set_lifecycle(record.id, following, event=event))
        except VtpmError:
            if happening in (Happening.START, Happening.STOP) and before is not None:
                # Nothing was begun: the caller may try again when the store takes it.
                self._states[record.id] = before
            elif happening in (Happening.START, Happening.STOP):
                del self._states[record.id]
            raise
        if event is not None:
            await self.audit.came()

    async def _move_quietly(self, record: VtpmRecord, happening: Happening, event: Event) -> None:
        try:
            await self._move(record, happening, event)
        except VtpmError as error:
            _log.warning("%s: %s", record.name, error)

    def _describe(self, record: VtpmRecord) -> Vtpm:
        return describe.vtpm(record, self._state(record), self.running.get(record.id))

    def _lock(self, vtpm_id: VtpmId) -> asyncio.Lock:
        return self._locks.setdefault(vtpm_id, asyncio.Lock())

    async def key(self, record: VtpmRecord) -> bytes:
        """Return a vTPM's own key, from the keeper. Raises as KeeperClient.unwrap_key."""
        if record.wrapped_key is None:
            raise StateError(f"vTPM {record.name} has no key")
        return (await self._keeper_threads.run(self._keeper.unwrap_key, record.id, record.wrapped_key)).key

    async def _store(self, operation: Callable[[Store], T]) -> T:
        return await self.door.run(operation)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background work failed: %s", error, exc_info=None if isinstance(error, VtpmError) else error)


def _unbound(record: VtpmRecord, store: Store) -> VtpmRecord:
    """Unbind a vTPM's instance, and return the vTPM as it was then."""
    current = store.get_vtpm(record.id)
    if current.instance_id is not None and current.instance_id == record.instance_id:
        store.unbind_instance(record.id, current.instance_id)
    return current


def _append_lockout(vtpm_id: VtpmId, event: Event, store: Store) -> None:
    last = store.last_event(vtpm_id, LOCKED_OUT)
    if last is None or json.loads(last.detail)["since"] != json.loads(event.detail)["since"]:
        store.append_event(event)


def _one_socket(fds: Sequence[int]) -> socket.socket:
    if len(fds) != 1:
        close_fds(fds)
        raise UnavailableError(f"the launcher gave {len(fds)} descriptors for an instance, not one")
    return socket.socket(fileno=fds[0])
