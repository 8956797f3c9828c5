"""Migrations as operators and peers ask for them: who talks to whom, when, and what is tried again until it is decided.

The decisions are migration.Mover's, and conversations.Conversations carries them to the peer; here are the vTPM's locks
and the audit log. The manager's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from uuid import UUID

from vtpm.errors import (
    AttestationError,
    ConflictError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
    UsageError,
    VtpmError,
)
from vtpm.manager.access import Caller
from vtpm.manager.conversations import Conversations, Parties, Party
from vtpm.manager.guest_moves import GuestMoves
from vtpm.manager.lifecycle import Happening
from vtpm.manager.service import ManagerService
from vtpm.migration.mover import Channel
from vtpm.tpm.types import VtpmId
from vtpm.vault.holding import KnownVtpm, Right
from vtpm.vault.records import DomainKind, VtpmRecord
from vtpm.wire.allowance import Allowance
from vtpm.wire.api import Vtpm
from vtpm.wire.api_migrations import Guest, MigrateVtpm, Migration, Phase, ReceiveVtpm
from vtpm.wire.migration import (
    Direction,
    MigrationMessage,
    Mode,
    Propose,
    decode_message,
    encode_message,
)

LINES_AT_ONCE = 50
"""Of the log about what one peer was refused."""
MESSAGES_AT_ONCE = 200
MESSAGES_PER_S = 20.0
"""Of one peer: each asks the store, on whose thread guests' saves wait."""
PROPOSALS_AT_ONCE = 20
PROPOSALS_PER_S = 1.0
"""Of one peer: each takes the platform TPM the time of a quote, and saves of all vTPMs need that TPM too."""
FOLLOW_UP_S = 150.0
"""How long a peer may take about one vTPM that is not decided."""
MAX_TROUBLES = 1024
_FOR_PEERS = (ConflictError, AttestationError, ProtocolError)
"""What a peer hears in our own words; the rest has names of files, and what is wrong with them."""
_MODES = {Guest.FOREIGN: Mode.FOREIGN, Guest.DRIVEN: Mode.DRIVEN}
_UNDECIDED = (Right.FROZEN, Right.INERT)
_log = logging.getLogger("vtpm.manager")


class _Bounds:
    """What one peer may ask: there are as many as were in the book since this manager began."""

    def __init__(self) -> None:
        self.messages = Allowance(MESSAGES_AT_ONCE, MESSAGES_PER_S)
        self.proposals = Allowance(PROPOSALS_AT_ONCE, PROPOSALS_PER_S)
        self.lines = Allowance(LINES_AT_ONCE)


class MigrationService:
    """See the module.

    Args:
        vtpms: whose vTPMs these are.
        talk: with the peers.
        guests: moves that go with them.
        parties: whom this host knows.
        remind_s: how long an attempt that is not over is left alone before the peer is asked again.
    """

    def __init__(
        self,
        vtpms: ManagerService,
        talk: Conversations,
        guests: GuestMoves,
        parties: Parties,
        remind_s: float,
    ) -> None:
        self._vtpms = vtpms
        self._talk = talk
        self._mover = talk.mover
        self._guests = guests
        self._parties = parties
        self._remind_s = remind_s
        self._bounds: dict[str, _Bounds] = {}
        self._phases: dict[VtpmId, Phase] = {}
        self._troubles: dict[VtpmId, str] = {}
        self._followed: dict[str, asyncio.Task[None]] = {}
        self._undecided = asyncio.Event()
        # What an earlier manager left is looked at first.
        self._undecided.set()

    # -- what operators ask ------------------------------------------------------------------------------------------
    async def migrate(self, name: str, wanted: MigrateVtpm, caller: Caller) -> Migration:
        """Move a stopped vTPM to a peer; or let one that runs leave with its guest.

        Raises:
            ConflictError: it cannot leave in the state that it is in, or the peer does not take it; it is as it was.
            AttestationError: the peer is not what policy asks for; it is as it was.
            UnavailableError: the peer does not answer: as it was, or frozen until it does; the message says which.
        """
        caller.require_admin("move vTPMs")
        party = await self._parties.find(wanted.to)
        if wanted.guest is not Guest.NONE:
            return await self._let_leave(name, wanted, party, caller)
        async with self._vtpms.held(name, caller, Happening.MIGRATE) as record:
            self._guests.departures.withdraw(record.id)
            try:
                await self._prove(record, party, Mode.STOPPED)
                # As it is by now: nobody starts it from here on.
                record = await self._vtpms.door.run(lambda store: store.get_vtpm(record.id))
                if wanted.domain is not None:
                    record = replace(record, domain=DomainKind.of(wanted.domain, record.domain.make))
                self._phases[record.id] = Phase.SENDING
                sends = await self._talk.run(record.id, self._mover.freeze, record, caller.uid)
                reason = await self._talk.deliver(record.id, party, sends)
            finally:
                self._phases.pop(record.id, None)
                self._mover.forget(record.id)
            await self._vtpms.audit.came()
        return await self._moved(record.id, name, party.name, reason)

    async def _let_leave(self, name: str, wanted: MigrateVtpm, party: Party, caller: Caller) -> Migration:
        if wanted.domain is not None:
            raise UsageError(
                "what a vTPM with its guest is to live in is said where it is expected",
                next_step="See vtpm receive --help there",
            )
        # Not for as long as the peer takes: it may be stopped meanwhile, and then has no ticket.
        async with self._vtpms.held(name, caller, Happening.LEAVE) as record:
            self._guests.departures.withdraw(record.id)
            instance_id = self._guests.departures.instance(record.id)
        try:
            await self._prove(record, party, _MODES[wanted.guest])
            self._guests.departures.grant(record.id, instance_id, party.name, caller.uid)
        except VtpmError:
            self._mover.forget(record.id)
            raise
        finally:
            self._phases.pop(record.id, None)
        return self._describe(await self._known(record.id))

    async def _prove(self, record: VtpmRecord, party: Party, mode: Mode) -> None:
        """Have both hosts show each other what they are. Raises ConflictError: the peer does not take the vTPM."""
        self._phases[record.id] = Phase.PROVING
        sends = await self._talk.run(record.id, self._mover.propose, record, party.name, mode, party.channel)
        reason = await self._talk.converse(record.id, party, sends)
        if not self._mover.has_proof(record.id):
            raise ConflictError(f"{party.name} does not take vTPM {record.name}: {reason or 'it has made no offer'}")

    async def arrived(self, name: str, caller: Caller) -> Migration:
        """Release a vTPM whose guest has arrived at the destination and is paused there; again does no harm.

        Raises:
            ConflictError: no such move is under way, or the destination has nothing of it.
            UnavailableError: the destination does not answer; it is asked again by itself.
        """
        caller.require_admin("move vTPMs")
        known = await self._find(name)
        if known.holding.right is Right.MOVED:
            return self._describe(known)
        sends = await self._talk.run(known.vtpm_id, self._mover.arrived, known.vtpm_id)
        party = await self._parties.find(known.holding.peer)
        reason = await self._talk.deliver(known.vtpm_id, party, sends)
        await self._vtpms.audit.came()
        return await self._moved(known.vtpm_id, name, party.name, reason)

    async def _moved(self, vtpm_id: VtpmId, name: str, peer: str, reason: str) -> Migration:
        known = await self._known(vtpm_id)
        if known.holding.right is Right.MOVED:
            return self._describe(known)
        if known.holding.right is Right.FROZEN:
            self._undecided.set()
            raise UnavailableError(
                f"vTPM {name} is frozen: {peer} has not said whether it has stored it ({reason})",
                next_step="It is asked again by itself: see vtpm migrate --status, or take it back with --abort",
            )
        raise ConflictError(f"vTPM {name} has not moved: {reason or 'the move was aborted'}")

    async def receive_guest(self, name: str, wanted: ReceiveVtpm, caller: Caller) -> Vtpm:
        """Have an instance wait for a vTPM that is to arrive with its guest. See Arrivals.receive."""
        return await self._guests.arrivals.receive(name, wanted, caller)

    async def list(self, caller: Caller) -> Sequence[Migration]:
        """Return what is held of each vTPM that has moved, or is moving."""
        caller.require_admin("see migrations")
        known = await self._vtpms.door.run(lambda store: store.list_holdings())
        found = {one.vtpm_id: one for one in known}
        for vtpm_id in (self._phases.keys() | self._guests.departures.tickets().keys()) - found.keys():
            found[vtpm_id] = await self._known(vtpm_id)
        described = {vtpm_id: self._describe(one) for vtpm_id, one in found.items()}
        for record in self._guests.arrivals.expected():
            # Of those that were here before, too: what is expected is news.
            described[record.id] = _expected(record)
        return sorted(described.values(), key=lambda one: one.name)

    async def abort(self, name: str, caller: Caller) -> Migration:
        """Take a frozen vTPM back at its source, or the permission to leave with its guest."""
        caller.require_admin("abort migrations")
        known = await self._find(name)
        if known.holding.right is Right.HELD:
            if self._guests.departures.withdraw(known.vtpm_id):
                return self._describe(known)
            if known.vtpm_id in self._phases:
                raise ConflictError(
                    f"vTPM {name} is being offered to a peer, and has not left", next_step="Wait until that has ended"
                )
            raise ConflictError(f"vTPM {name} is not on its way to another host")
        peer = known.holding.peer
        sends = await self._talk.run(known.vtpm_id, self._mover.abort, known.vtpm_id, caller.uid)
        await self._vtpms.audit.came()
        try:
            await self._talk.converse(known.vtpm_id, await self._parties.find(peer), sends)
        except VtpmError as error:
            # It asks, if it has anything, and hears then that this attempt is over.
            _log.info("%s: %s has not been told of the abort: %s", name, peer, error)
        return self._describe(await self._known(known.vtpm_id))

    async def adopt(self, name: str, caller: Caller) -> Migration:
        """Take an inert vTPM for this host's own, by the operator's word that its source is lost for good."""
        caller.require_admin("adopt vTPMs")
        return await self._decide(name, self._mover.adopt, caller)

    async def discard(self, name: str, caller: Caller) -> Migration:
        """Destroy an inert vTPM, by the operator's word that it is, or is to be, its source's alone."""
        caller.require_admin("discard vTPMs")
        expected = await self._guests.arrivals.give_up(name, caller)
        if expected is not None:
            return self._describe(await self._known(expected.id))
        return await self._decide(name, self._mover.discard, caller)

    async def _decide(self, name: str, decision: Callable[[VtpmId, int], None], caller: Caller) -> Migration:
        known = await self._find(name)
        await self._talk.run(known.vtpm_id, decision, known.vtpm_id, caller.uid)
        await self._vtpms.audit.came()
        return self._describe(await self._known(known.vtpm_id))

    # -- what peers say ----------------------------------------------------------------------------------------------
    async def receive(self, peer: str, vtpm_id: VtpmId, body: bytes, channel: Channel) -> Sequence[bytes]:
        """Answer a peer's message with those that follow from it.

        Args:
            peer: whom the transport has authenticated.
        Raises:
            ConflictError, AttestationError: as Mover.receive. ProtocolError: it is no message.
            UnavailableError: this host cannot answer, for a reason that is in its log alone.
        """
        bounds = self._bounds.setdefault(peer, _Bounds())
        if not bounds.messages.take():
            raise UnavailableError(f"{peer} says too much at once", next_step="Try again in a minute")
        await self._vtpms.door.opened()
        message = _decoded(body)
        if isinstance(message, Propose):
            if not bounds.proposals.take():
                raise UnavailableError(f"{peer} proposes too many vTPMs at once", next_step="Try again in a minute")
            if message.mode is not Mode.STOPPED and not self._guests.expects(vtpm_id):
                raise ConflictError(
                    "no instance waits there for the vTPM and its guest",
                    next_step=f"Have one wait, on that host: vtpm receive NAME --uuid {vtpm_id}",
                )
        try:
            sends = await self._talk.run(vtpm_id, self._mover.receive, vtpm_id, peer, message, channel)
        except VtpmError as error:
            if bounds.lines.take():
                _log.warning("vTPM %s: refused of %s: %s", vtpm_id, peer, error.message)
            if isinstance(error, _FOR_PEERS):
                raise
            raise UnavailableError("it cannot do that now", next_step="See the log of its vtpm-managerd") from error
        return [encode_message(send.message) for send in sends if send.peer == peer]

    # -- what happens by itself --------------------------------------------------------------------------------------
    async def follow(self) -> None:
        """Ask again about what is not decided, for as long as this host runs. Ends when cancelled."""
        try:
            while True:
                await self._look_for_undecided()
        finally:
            for task in list(self._followed.values()):
                task.cancel()

    async def _look_for_undecided(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._undecided.wait(), self._remind_s)
        self._undecided.clear()
        if not self._vtpms.door.is_open:
            return
        try:
            known = await self._vtpms.door.run(lambda store: store.list_holdings())
        except VtpmError as error:
            _log.warning("migrations are not followed up: %s", error)
            return
        undecided: dict[str, list[KnownVtpm]] = {}
        for one in known:
            passing = one.vtpm_id in self._phases or self._guests.departures.is_passing(one.vtpm_id)
            if not _is_over(one) and not passing:
                undecided.setdefault(one.holding.peer, []).append(one)
        for peer in undecided.keys() - self._followed.keys():
            # A peer that takes its time, or is gone, keeps nobody else's waiting.
            task = asyncio.get_running_loop().create_task(self._follow_up_all(undecided[peer]))
            self._followed[peer] = task
            task.add_done_callback(partial(self._followed_up, peer))

    def _followed_up(self, peer: str, task: asyncio.Task[None]) -> None:
        del self._followed[peer]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("moves with %s were not followed up: %s", peer, error, exc_info=error)

    async def _follow_up_all(self, known: Sequence[KnownVtpm]) -> None:
        for one in known:
            await self._follow_up(one)

    async def _follow_up(self, known: KnownVtpm) -> None:
        try:
            party = await self._parties.find(known.holding.peer)
            sends = await self._talk.run(known.vtpm_id, self._mover.remind, known.vtpm_id)
            try:
                async with asyncio.timeout(FOLLOW_UP_S):
                    await self._talk.converse(known.vtpm_id, party, sends)
            except TimeoutError:
                raise UnavailableError(f"{party.name} takes more than {FOLLOW_UP_S:g} s") from None
        except VtpmError as error:
            if self._troubles.get(known.vtpm_id) != error.message:
                _log.warning("%s: its move is not decided: %s", known.name, error)
            self._troubles[known.vtpm_id] = error.message
            while len(self._troubles) > MAX_TROUBLES:
                del self._troubles[next(iter(self._troubles))]
        else:
            self._troubles.pop(known.vtpm_id, None)

    # -- small things -----------------------------------------------------------------------------------------------
    async def _known(self, vtpm_id: VtpmId) -> KnownVtpm:
        return await self._vtpms.door.run(lambda store: store.holding(vtpm_id))

    async def _find(self, name: str) -> KnownVtpm:
        try:
            # One of this name that is here or on its way comes before those that have gone.
            record = await self._vtpms.door.run(lambda store: store.find_vtpm(name))
        except NotFoundError:
            for one in await self._vtpms.door.run(lambda store: store.list_holdings()):
                if one.name == name:
                    return one
            raise
        return await self._known(record.id)

    def _phase(self, known: KnownVtpm, *, may_leave: bool) -> Phase:
        if known.vtpm_id in self._phases:
            return self._phases[known.vtpm_id]
        if may_leave:
            return Phase.READY
        if self._guests.departures.is_passing(known.vtpm_id):
            return Phase.SENDING
        return Phase.OVER if _is_over(known) else Phase.UNDECIDED

    def _describe(self, known: KnownVtpm) -> Migration:
        holding = known.holding
        ticket = self._guests.departures.ticket(known.vtpm_id) if holding.right is Right.HELD else None
        return Migration(
            uuid=UUID(str(known.vtpm_id)),
            name=known.name,
            right=holding.right.value,
            epoch=holding.epoch,
            peer=ticket.peer if ticket is not None else holding.peer,
            phase=self._phase(known, may_leave=ticket is not None),
            trouble="" if _is_over(known) else self._troubles.get(known.vtpm_id, ""),
        )


def _expected(record: VtpmRecord) -> Migration:
    return Migration(UUID(str(record.id)), record.name, Right.ABSENT.value, 0, "", Phase.EXPECTED, "")


def _is_over(known: KnownVtpm) -> bool:
    """Whether nobody waits for anything any more."""
    holding = known.holding
    return holding.right not in _UNDECIDED and not (holding.right is Right.MOVED and holding.migration_id)


def _decoded(body: bytes) -> MigrationMessage:
    try:
        return decode_message(body, Direction.TO_DESTINATION)
    except ProtocolError:
        return decode_message(body, Direction.TO_SOURCE)
