"""vTPMs that arrive with their guests, at their destination: instances that wait for one, and what makes one run.

An operator has an instance wait, and starts the guest's emulator on it. What the guest brings is loaded there, inert,
and runs once the source has released it. For GuestMoves and MigrationService.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import vtpm.manager.describe as describe
from vtpm.errors import (
    ConflictError,
    NotFoundError,
    StateError,
    UsageError,
    VtpmError,
)
from vtpm.manager.access import Caller
from vtpm.manager.conversations import Conversations, Parties
from vtpm.manager.instance_link import InstanceLink
from vtpm.manager.ordered import Ordered
from vtpm.manager.running import Running, event_of
from vtpm.manager.service import ManagerService
from vtpm.migration.mover import Place
from vtpm.migration.payload import Payload
from vtpm.migration.steps import Send
from vtpm.tpm.types import InstanceId, Make, StateKind, VtpmId
from vtpm.vault.holding import KnownVtpm, Right
from vtpm.vault.records import DomainKind, VtpmRecord, valid_name
from vtpm.vault.rules import INERT
from vtpm.vault.store import Store
from vtpm.wire.api import LifeState, Vtpm
from vtpm.wire.api_migrations import ReceiveVtpm
from vtpm.wire.launcher import InstanceInfo
from vtpm.wire.migration import Direction, Mode, State, decode_message

MAX_WAITING = 256
"""Instances that wait for a vTPM at once."""
ASK_S = 1.0
"""How long the source is left alone that did not release a vTPM which its guest wants."""
_log = logging.getLogger("vtpm.manager")


@dataclass
class _Waiting:
    """An instance that waits for a vTPM, or has it inert.

    Args:
        record: what is expected, and as it is in the store once it has arrived.
        arrived: whether it has.
        asking: asks the source for its release, since the guest goes on here.
    """

    record: VtpmRecord
    info: InstanceInfo
    link: InstanceLink
    arrived: bool = False
    asking: asyncio.Task[None] | None = None


class Arrivals:
    """See the module. All of one vTPM goes one after the other.

    Args:
        vtpms: where they run once they are held.
        talk: with peers.
        parties: whom this host knows.
    """

    def __init__(self, vtpms: ManagerService, talk: Conversations, parties: Parties) -> None:
        self._vtpms = vtpms
        self._talk = talk
        self._parties = parties
        self._waiting: dict[VtpmId, _Waiting] = {}
        self._starting: dict[VtpmId, str] = {}
        self._work = Ordered()

    # -- what operators ask ------------------------------------------------------------------------------------------
    async def receive(self, name: str, wanted: ReceiveVtpm, caller: Caller) -> Vtpm:
        """Have an instance wait for a vTPM that is to arrive with its guest.

        Raises:
            ConflictError: there is a vTPM of this name or uuid, or it is expected already.
            VtpmError: the instance was not started.
        """
        caller.require_admin("receive vTPMs")
        vtpm_id = VtpmId(wanted.uuid)
        kind = DomainKind.of(wanted.domain, Make.LIBTPMS)
        if wanted.tpm_version not in kind.tpm_versions:
            raise UsageError(f"vTPMs of the domain {wanted.domain} are TPM {' or '.join(kind.tpm_versions)}")
        owner_uid, owner_gid = wanted.owner or (caller.uid, caller.gid)
        record = VtpmRecord(
            id=vtpm_id,
            name=valid_name(name),
            owner_uid=owner_uid,
            owner_gid=owner_gid,
            vm_uuid=wanted.vm_uuid,
            tpm_version=wanted.tpm_version,
            domain=kind,
            created_at=datetime.now(UTC),
            lifecycle=INERT,
        )
        self._check_not_expected(record)
        if len(self._waiting) + len(self._starting) >= MAX_WAITING:
            raise ConflictError(
                f"{MAX_WAITING} instances wait for vTPMs already", next_step="See vtpm migrate --status"
            )
        self._starting[vtpm_id] = name
        try:
            await self._vtpms.door.run(lambda store: _check_vacant(store, record))
            info, link = await self._vtpms.start_inert(record)
            self._waiting[vtpm_id] = _Waiting(record, info, link)
        finally:
            del self._starting[vtpm_id]
        await self._vtpms.audit.append(event_of(caller.uid, "expected", record, measurement=info.measurement))
        return describe.vtpm(record, LifeState.INERT, Running(record, info, link))

    def _check_not_expected(self, record: VtpmRecord) -> None:
        expected = {one.record.id: one.record.name for one in self._waiting.values()} | self._starting
        if record.id in expected or record.name in expected.values():
            raise ConflictError(
                f"vTPM {record.name} is expected already",
                next_step=f"Give it up first: vtpm migrate {record.name} --discard",
            )

    def expected(self) -> Sequence[VtpmRecord]:
        """Return what is expected here and has not arrived."""
        return [one.record for one in self._waiting.values() if not one.arrived]

    async def give_up(self, name: str, caller: Caller) -> VtpmRecord | None:
        """End the instance that waits for a vTPM of this name; returns what was expected, None: nothing was."""
        for record in self.expected():
            if record.name == name:
                async with self._work.lock(record.id):
                    waiting = self._waiting.get(record.id)
                    if waiting is None or waiting.arrived:
                        raise ConflictError(
                            f"vTPM {name} arrives at this moment", next_step="See vtpm migrate --status"
                        )
                    await self._end(waiting)
                await self._vtpms.audit.append(event_of(caller.uid, "expected_no_more", record))
                return record
        return None

    def images(self) -> list[tuple[str, str, str]]:
        """Return name, kind and measurement of each vTPM whose instance is here, and which does not run yet."""
        return [(one.record.name, one.record.domain.value, one.info.measurement) for one in self._waiting.values()]

    # -- what the mover and the launcher ask -------------------------------------------------------------------------
    def expects(self, vtpm_id: VtpmId) -> bool:
        """See LiveMoves."""
        return vtpm_id in self._waiting or vtpm_id in self._starting

    def place(self, payload: Payload, mode: Mode) -> Place:
        """Return where a vTPM that arrives is to live, since its instance waits here. Called in the mover's threads.

        Raises:
            ConflictError: it comes without its guest, or with it and nobody waits; or as another than was expected.
            StateError: the instance's engine is older than its state.
        """
        vtpm, waiting = payload.vtpm, self._waiting.get(payload.vtpm.vtpm_id)
        if mode is Mode.STOPPED:
            raise ConflictError(f"vTPM {vtpm.name} is expected with its guest, and comes without")
        if waiting is None:
            raise ConflictError(
                f"vTPM {vtpm.name} comes with its guest, and no instance waits for it",
                next_step=f"Have one wait on the destination: vtpm receive {vtpm.name} --uuid {vtpm.vtpm_id}",
            )
        record, facts = waiting.record, waiting.link.facts
        expected = (record.name, record.tpm_version, record.domain.make)
        came = (vtpm.name, vtpm.tpm_version, payload.kind.make)
        if came != expected:
            raise ConflictError(f"a vTPM {_told(expected)} is expected, and {_told(came)} comes")
        if record.vm_uuid is not None and record.vm_uuid != vtpm.vm_uuid:
            raise ConflictError(f"vTPM {vtpm.name} is bound to the VM {vtpm.vm_uuid}, and {record.vm_uuid} is expected")
        if facts.engine_version < vtpm.engine_version:
            raise StateError(f"the state of vTPM {vtpm.name} needs a newer engine than waits for it here")
        owner = (record.owner_uid, record.owner_gid)
        return Place(record.domain, owner, waiting.info.instance_id, facts.engine_version)

    async def ended(self, vtpm_id: VtpmId, instance_id: InstanceId, how: str) -> None:
        """See LiveMoves."""
        async with self._work.lock(vtpm_id):
            waiting, running = self._waiting.get(vtpm_id), self._vtpms.running.get(vtpm_id)
            if waiting is not None and waiting.info.instance_id == instance_id:
                _log.warning("%s: the instance that waited for it is no more: %s", waiting.record.name, how)
                await self._end(waiting)
            elif running is not None and running.info.instance_id == instance_id:
                # It has begun to run meanwhile.
                await self._vtpms.settle_running(running, how)

    async def all_ended(self, how: str) -> None:
        """See LiveMoves."""
        for waiting in list(self._waiting.values()):
            await self.ended(waiting.record.id, waiting.info.instance_id, how)

    # -- what instances ask ------------------------------------------------------------------------------------------
    async def arrive(self, vtpm_id: VtpmId, sealed: bytes) -> Mapping[StateKind, bytes]:
        """See LiveMoves."""
        return await self._work.to_its_end(vtpm_id, self._arrive(vtpm_id, sealed))

    async def _arrive(self, vtpm_id: VtpmId, sealed: bytes) -> Mapping[StateKind, bytes]:
        async with self._work.lock(vtpm_id):
            waiting = self._waiting.get(vtpm_id)
            if waiting is None:
                raise ConflictError("nothing is expected here")
            message = decode_message(sealed, Direction.TO_DESTINATION)
            if not isinstance(message, State):
                raise ConflictError("what came with the guest is no state of a vTPM")
            waiting.arrived = True
            try:
                states = await self._talk.run_soon(vtpm_id, self._talk.mover.arrive, vtpm_id, message)
            except VtpmError:
                waiting.arrived = await self._may_be_here(vtpm_id)
                raise
            waiting.record = await self._vtpms.door.run(lambda store: store.get_vtpm(vtpm_id))
            await self._vtpms.audit.came()
            return states

    async def _may_be_here(self, vtpm_id: VtpmId) -> bool:
        try:
            return (await self._known(vtpm_id)).holding.right in (Right.INERT, Right.HELD)
        except VtpmError:
            # It is seen to when it is asked again, or the source is.
            return True

    def wanted(self, vtpm_id: VtpmId) -> None:
        """See LiveMoves."""
        waiting = self._waiting.get(vtpm_id)
        if waiting is None:
            # It was held before somebody could say so. An instance may ask without end: the store is not asked.
            running = self._vtpms.running.get(vtpm_id)
            if running is not None and self._vtpms.is_held(running):
                running.link.activate()
        elif waiting.arrived and (waiting.asking is None or waiting.asking.done()):
            waiting.asking = self._work.spawn(self._ask(vtpm_id))

    async def _ask(self, vtpm_id: VtpmId) -> None:
        """Ask the source for its release until it is decided: the guest waits."""
        trouble = ""
        while (waiting := self._waiting.get(vtpm_id)) is not None and waiting.arrived:
            try:
                await self._settle(vtpm_id)
                known = await self._known(vtpm_id)
                if known.holding.right is Right.INERT:
                    party = await self._parties.find(known.holding.peer)
                    sends = await self._talk.run(vtpm_id, self._wanted, vtpm_id)
                    await self._talk.converse(vtpm_id, party, sends)
                    await self._settle(vtpm_id)
            except VtpmError as error:
                if error.message != trouble:
                    trouble = error.message
                    _log.warning("vTPM %s: its guest wants it, and it is not released: %s", vtpm_id, trouble)
            if vtpm_id in self._waiting:
                await asyncio.sleep(ASK_S)

    def _wanted(self, vtpm_id: VtpmId) -> Sequence[Send]:
        return self._talk.mover.remind(vtpm_id, wanted=True)

    # -- what happens ------------------------------------------------------------------------------------------------
    def settled(self, vtpm_id: VtpmId) -> None:
        """Another right may be held of the vTPM by now."""
        waiting = self._waiting.get(vtpm_id)
        if waiting is not None and waiting.arrived:
            self._work.spawn(self._settle_surely(vtpm_id))

    async def take_up(self, record: VtpmRecord) -> None:
        """Go on with what a manager before this one has left inert in its instance."""
        try:
            info, link = await self._vtpms.attach_inert(record)
        except VtpmError as error:
            await self._vtpms.end_passing(record, error.message)
            raise
        self._waiting[record.id] = _Waiting(record, info, link, arrived=True)
        await self._settle_surely(record.id)

    async def _settle_surely(self, vtpm_id: VtpmId) -> None:
        """Bring the instance after what is held of its vTPM, however often that has to be tried."""
        while vtpm_id in self._waiting:
            try:
                await self._settle(vtpm_id)
            except VtpmError as error:
                _log.warning("vTPM %s: its instance is not brought after its move yet: %s", vtpm_id, error)
                await asyncio.sleep(ASK_S)
            else:
                return

    async def _settle(self, vtpm_id: VtpmId) -> None:
        """Bring the instance after what is held of its vTPM."""
        async with self._work.lock(vtpm_id):
            waiting = self._waiting.get(vtpm_id)
            if waiting is None or not waiting.arrived:
                return
            known = await self._known(vtpm_id)
            match known.holding.right:
                case Right.INERT:
                    return
                case Right.HELD:
                    record = await self._vtpms.door.run(lambda store: store.get_vtpm(vtpm_id))
                    await self._vtpms.begin_arrived(record, waiting.info, waiting.link)
                    del self._waiting[vtpm_id]
                    _log.info("%s: it has arrived, and goes on", record.name)
                case _:
                    _log.info("%s: it does not arrive: the move was aborted", known.name)
                    await self._end(waiting)

    async def _end(self, waiting: _Waiting) -> None:
        """End an instance, or note that it has ended. What it had inert stays so, without its guest."""
        record = waiting.record
        del self._waiting[record.id]
        waiting.link.close()
        with contextlib.suppress(NotFoundError):
            # Nothing had arrived, or it is here no more.
            await self._vtpms.end_passing(record, "it ended while its guest was on its way")

    def close(self) -> None:
        """Let go of what is under way; what is durable says how to go on."""
        self._work.close()

    # -- small things ------------------------------------------------------------------------------------------------
    async def _known(self, vtpm_id: VtpmId) -> KnownVtpm:
        return await self._vtpms.door.run(lambda store: store.holding(vtpm_id))


def _told(what: tuple[object, ...]) -> str:
    name, version, make = what
    return f"{name} (TPM {version}, {make})"


def _check_vacant(store: Store, record: VtpmRecord) -> None:
    for what in ("name", "uuid"):
        try:
            there = store.find_vtpm(record.name) if what == "name" else store.get_vtpm(record.id)
        except NotFoundError:
            continue
        raise ConflictError(
            f"vTPM {there.name} of this {what} is here already ({there.lifecycle})",
            next_step="See vtpm show and vtpm migrate --status",
        )
