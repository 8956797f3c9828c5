"""Running vTPMs that leave with their guests, at their source: tickets, and what follows as a guest goes or stays.

Whoever migrates the guest moves the sealed state with it. A ticket lets one vTPM's instance hand it out, once, for the
destination that has proven itself. For GuestMoves and MigrationService.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vtpm.errors import ConflictError, UnavailableError, VtpmError
from vtpm.manager.conversations import Conversations, Parties
from vtpm.manager.ordered import Ordered
from vtpm.manager.running import Running
from vtpm.manager.service import ManagerService
from vtpm.migration.steps import Send
from vtpm.tpm.types import InstanceId, VtpmId
from vtpm.vault.holding import KnownVtpm, Right
from vtpm.wire.migration import encode_message

TICKET_S = 900.0
"""How long a guest may take until it goes: a ticket lasts no longer than what was proven is thought to hold."""
QUIET_S = 60.0
"""How long a frozen vTPM's guest may be on its way before the destination is asked; asked earlier, it would refuse."""
SETTLE_PAUSE_S = 1.0
"""How long a store that did not answer is left alone."""
_log = logging.getLogger("vtpm.manager")


@dataclass(frozen=True)
class Ticket:
    """The right of one instance to hand its vTPM's state out, once.

    Args:
        peer: for whom alone.
        actor_uid: who has asked for it.
        until_s: of the monotonic clock.
    """

    instance_id: InstanceId
    peer: str
    actor_uid: int
    until_s: float


@dataclass
class _Leaving:
    """A vTPM that is frozen under its guest, or about to be.

    Args:
        sealed: what was handed out; empty: not yet, or by a manager before this one.
        since_s: of the monotonic clock.
    """

    sealed: bytes
    since_s: float


class Departures:
    """See the module. All of one vTPM goes one after the other.

    Args:
        vtpms: whose vTPMs these are.
        talk: with peers.
        parties: whom this host knows.
    """

    def __init__(self, vtpms: ManagerService, talk: Conversations, parties: Parties) -> None:
        self._vtpms = vtpms
        self._talk = talk
        self._parties = parties
        self._tickets: dict[VtpmId, Ticket] = {}
        self._leaving: dict[VtpmId, _Leaving] = {}
        self._work = Ordered()

    # -- tickets -----------------------------------------------------------------------------------------------------
    def instance(self, vtpm_id: VtpmId) -> InstanceId:
        """Return the instance that a ticket would be of. Raises ConflictError: it has ended."""
        running = self._vtpms.running.get(vtpm_id)
        if running is None:
            raise ConflictError("the vTPM has ended meanwhile")
        return running.info.instance_id

    def grant(self, vtpm_id: VtpmId, instance_id: InstanceId, peer: str, actor_uid: int) -> None:
        """Let the vTPM leave with its guest, once, for a peer that has proven itself.

        Raises ConflictError: the instance has ended.
        """
        if self.instance(vtpm_id) != instance_id:
            raise ConflictError("the vTPM was started anew meanwhile")
        self._tickets[vtpm_id] = Ticket(instance_id, peer, actor_uid, time.monotonic() + TICKET_S)

    def ticket(self, vtpm_id: VtpmId) -> Ticket | None:
        """Return the ticket of a vTPM that may leave now; None: it has none, or none any more."""
        ticket, running = self._tickets.get(vtpm_id), self._vtpms.running.get(vtpm_id)
        if ticket is None:
            return None
        if running is None or running.info.instance_id != ticket.instance_id or time.monotonic() > ticket.until_s:
            return None
        return ticket

    def tickets(self) -> dict[VtpmId, Ticket]:
        """Return all that may be used now."""
        found = {vtpm_id: self.ticket(vtpm_id) for vtpm_id in list(self._tickets)}
        return {vtpm_id: ticket for vtpm_id, ticket in found.items() if ticket is not None}

    def withdraw(self, vtpm_id: VtpmId) -> bool:
        """Take a ticket back; returns whether there was one."""
        if self._tickets.pop(vtpm_id, None) is None:
            return False
        self._talk.mover.forget(vtpm_id)
        return True

    def is_passing(self, vtpm_id: VtpmId) -> bool:
        """Whether a guest may still be on its way, so that nobody is to be asked what has become of its vTPM."""
        leaving = self._leaving.get(vtpm_id)
        return leaving is not None and bool(leaving.sealed) and time.monotonic() < leaving.since_s + QUIET_S

    # -- what instances ask ------------------------------------------------------------------------------------------
    async def depart(self, vtpm_id: VtpmId, instance_id: InstanceId, volatile: bytes) -> bytes:
        """See LiveMoves. Once the vTPM is frozen nothing is refused for good: what is left is to take it back."""
        return await self._work.to_its_end(vtpm_id, self._depart(vtpm_id, instance_id, volatile))

    async def _depart(self, vtpm_id: VtpmId, instance_id: InstanceId, volatile: bytes) -> bytes:
        async with self._work.lock(vtpm_id):
            running = self._vtpms.running.get(vtpm_id)
            if running is None or running.info.instance_id != instance_id:
                raise ConflictError("this instance is not the one that runs the vTPM")
            known = await self._known(vtpm_id)
            leaving = self._leaving.get(vtpm_id)
            if known.holding.right is not Right.HELD or leaving is not None:
                if known.holding.right is Right.FROZEN and leaving is not None and leaving.sealed:
                    return leaving.sealed
                raise UnavailableError(f"vTPM {known.name} may be frozen: it is to be taken back first")
            ticket = self.ticket(vtpm_id)
            if ticket is None:
                raise ConflictError(
                    f"no migration of vTPM {known.name} is under way",
                    next_step="Let it leave first: vtpm migrate NAME --to PEER --live",
                )
            record = await self._vtpms.door.run(lambda store: store.get_vtpm(vtpm_id))
            # Before the first word of it in the store, for what happens meanwhile goes by it.
            self._vtpms.freeze(running)
            self._leaving[vtpm_id] = leaving = _Leaving(b"", time.monotonic())
            try:
                sends = await self._talk.run_soon(vtpm_id, self._talk.mover.freeze, record, ticket.actor_uid, volatile)
                leaving.sealed = encode_message(sends[0].message)
            except VtpmError as error:
                self.withdraw(vtpm_id)
                await self._go_on_if_held(vtpm_id, error)
                raise
            self._tickets.pop(vtpm_id, None)
            await self._vtpms.audit.came()
            return leaving.sealed

    async def _go_on_if_held(self, vtpm_id: VtpmId, why: VtpmError) -> None:
        """Have the vTPM go on after a departure that failed. Raises UnavailableError: it may be frozen all the same."""
        try:
            await self._bring_after(vtpm_id)
        except VtpmError as error:
            _log.error("vTPM %s: whether it is frozen is not known: %s", vtpm_id, error)
        if vtpm_id in self._leaving:
            self._work.spawn(self._settle(vtpm_id))
            raise UnavailableError(f"its departure failed, and it is to be taken back: {why.message}") from why

    async def take_back(self, vtpm_id: VtpmId) -> None:
        """See LiveMoves. Refused for good only when another host has it."""
        await self._work.to_its_end(vtpm_id, self._take_back(vtpm_id))

    async def _take_back(self, vtpm_id: VtpmId) -> None:
        async with self._work.lock(vtpm_id):
            try:
                known = await self._taken_back(vtpm_id)
            except VtpmError as error:
                raise UnavailableError(f"whether it stays is not known yet: {error.message}") from error
            if known.holding.right is not Right.HELD:
                raise ConflictError(f"vTPM {known.name} is {known.holding.right.value} on this host")

    async def _taken_back(self, vtpm_id: VtpmId) -> KnownVtpm:
        known = await self._known(vtpm_id)
        if known.holding.right is Right.FROZEN:
            sends = await self._talk.run_soon(vtpm_id, self._talk.mover.abort, vtpm_id, None)
            _log.info("%s: its guest goes on here, and so it does", known.name)
            self._work.spawn(self._tell(known, sends))
            known = await self._known(vtpm_id)
        await self._bring_after(vtpm_id)
        return known

    async def _tell(self, known: KnownVtpm, sends: Sequence[Send]) -> None:
        peer = known.holding.peer
        try:
            await self._talk.converse(known.vtpm_id, await self._parties.find(peer), sends)
        except VtpmError as error:
            # It asks, if it has anything, and hears then that this attempt is over.
            _log.info("%s: %s has not been told that it stays: %s", known.name, peer, error)

    # -- what happens ------------------------------------------------------------------------------------------------
    def settled(self, vtpm_id: VtpmId) -> None:
        """Another right may be held of the vTPM by now."""
        if vtpm_id in self._leaving:
            self._work.spawn(self._settle(vtpm_id))

    async def take_up(self, vtpm_id: VtpmId) -> None:
        """Go on with what a manager before this one has left frozen under its guest."""
        self._leaving[vtpm_id] = _Leaving(b"", time.monotonic())
        await self._settle(vtpm_id)

    async def _settle(self, vtpm_id: VtpmId) -> None:
        """Bring the instance after what is held of its vTPM, however often that has to be tried."""
        while vtpm_id in self._leaving:
            try:
                async with self._work.lock(vtpm_id):
                    await self._bring_after(vtpm_id)
                return
            except VtpmError as error:
                _log.warning("vTPM %s: its instance is not brought after its move yet: %s", vtpm_id, error)
                await asyncio.sleep(SETTLE_PAUSE_S)

    async def _bring_after(self, vtpm_id: VtpmId) -> None:
        """Bring the instance after what is held of its vTPM."""
        if vtpm_id not in self._leaving:
            return
        running = self._vtpms.running.get(vtpm_id)
        known = await self._known(vtpm_id)
        match known.holding.right, running:
            case (Right.FROZEN, _):
                return
            case (Right.HELD, None):
                await self._vtpms.settle_ended(vtpm_id)
            case (Right.HELD, Running()):
                record = await self._vtpms.door.run(lambda store: store.get_vtpm(vtpm_id))
                await self._vtpms.go_on(running, record)
            case (_, Running()):
                await self._vtpms.let_go(running, f"it has moved to {known.holding.peer}")
        del self._leaving[vtpm_id]

    def close(self) -> None:
        """Let go of what is under way; what is durable says how to go on."""
        self._work.close()

    # -- small things ------------------------------------------------------------------------------------------------
    async def _known(self, vtpm_id: VtpmId) -> KnownVtpm:
        return await self._vtpms.door.run(lambda store: store.holding(vtpm_id))
