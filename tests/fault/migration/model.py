"""Explores every schedule of two hosts that move a vTPM to each other: the machines are those that ship.

The network is the worst there is: whatever was ever sent may arrive at any time, any number of times, or never. Either
host may crash between any two actions of a step: durable record, each message. What is bounded is how many proposals,
offers and writes there are, which makes the world finite; within that every reachable state is visited.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from vtpm.errors import StateError, VtpmError
from vtpm.migration.destination import Destination, Incoming
from vtpm.migration.source import Outgoing, Source
from vtpm.migration.steps import Send, Step, carry_out
from vtpm.migration.transcript import proposal_digest
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire import migration as wire

HOSTS = ("a", "b")
VTPM, VM = UUID(int=1), UUID(int=2)
_FROM_SOURCE = (wire.Propose, wire.Prove, wire.State, wire.Ask, wire.Release, wire.Aborted)
_CLOSING_TURNS = 8


class Violation(AssertionError):
    """A schedule that ends where no schedule may."""


class Guard:
    """Stands for platform TPM and cryptography, both perfect: what was not made for this attempt is refused."""

    def offer(self, peer: str, proposal: wire.Propose, migration_id: bytes, nonce: bytes) -> wire.Offer:
        digest = proposal_digest(proposal)
        return wire.Offer(migration_id, digest, nonce, b"key" + migration_id, b"quote" + digest + migration_id)

    def examine(self, peer: str, proposal: wire.Propose, offer: wire.Offer, proof: wire.Prove | None = None) -> None:
        if offer.evidence != b"quote" + proposal_digest(proposal) + offer.migration_id:
            raise StateError("the evidence is of something else")
        if proof is not None and proof.evidence != b"proof" + offer.nonce:
            raise StateError("the source's evidence is of something else")

    def prove(self, proposal: wire.Propose, offer: wire.Offer) -> wire.Prove:
        return wire.Prove(offer.migration_id, bytes(32), b"proof" + offer.nonce)

    def seal(self, offer: wire.Offer, transcript: bytes, state: bytes) -> bytes:
        return offer.key + transcript + state

    def unseal(self, offer: wire.Offer, proof: wire.Prove, transcript: bytes, sealed: bytes) -> bytes:
        prefix = offer.key + transcript
        if not sealed.startswith(prefix):
            raise StateError("the state was sealed for something else")
        return sealed[len(prefix) :]


SOURCE, DESTINATION = Source(Guard()), Destination(Guard())


class Host(NamedTuple):
    """One host: what is durable (holding, state), and what is not."""

    holding: Holding
    state: bytes | None = None
    outgoing: Outgoing | None = None
    incoming: Incoming | None = None


class Packet(NamedTuple):
    """A message that was sent once."""

    to: int
    sender: int
    message: wire.MigrationMessage


class World(NamedTuple):
    """All there is. written: how many writes were answered, wherever."""

    hosts: tuple[Host, Host]
    packets: frozenset[Packet] = frozenset()
    proposals: int = 0
    offers: int = 0
    written: int = 0


@dataclass(frozen=True)
class Bounds:
    """How far to go."""

    proposals: int
    offers: int
    writes: int


class _Crash(Exception):
    pass


@dataclass
class _Happening:
    """Carries one step out, up to a crash before its n-th action; None: without one."""

    world: World
    at: int
    crash_before: int | None
    actions: int = 0

    def _act(self) -> None:
        if self.actions == self.crash_before:
            raise _Crash
        self.actions += 1

    def record(self, before: Holding, after: Holding, state: bytes | None) -> None:
        self._act()
        host = self.world.hosts[self.at]
        kept = None if after.right in (Right.MOVED, Right.ABSENT) else host.state if state is None else state
        self._set(host._replace(holding=after, state=kept))

    def send(self, send: Send) -> None:
        self._act()
        packet = Packet(HOSTS.index(send.peer), self.at, send.message)
        self.world = self.world._replace(packets=self.world.packets | {packet})

    def end(self, **sessions: Any) -> World:
        self._set(self.world.hosts[self.at]._replace(**sessions))
        return self.world

    def _set(self, host: Host) -> None:
        hosts = list(self.world.hosts)
        hosts[self.at] = host
        self.world = self.world._replace(hosts=(hosts[0], hosts[1]))


def start() -> World:
    """The first host has the vTPM; the second has never heard of it."""
    return World((Host(Holding(Right.HELD, 1), b"0"), Host(NOWHERE)))


def _happen(world: World, at: int, session: str, decide: Callable[[Host], Step[Any]]) -> Iterator[World]:
    """Yield the worlds to which one step may lead: carried out, or cut by a crash before any of its actions."""
    host = world.hosts[at]
    try:
        step = decide(host)
    except VtpmError:
        return
    crash_before: int | None = None
    while True:
        happening = _Happening(world, at, crash_before)
        try:
            carry_out(host.holding, step, happening, happening.send)
        except _Crash:
            yield happening.end(outgoing=None, incoming=None)
        else:
            if crash_before is not None:
                return
            yield happening.end(**{session: step.session})
        crash_before = 0 if crash_before is None else crash_before + 1


def moves(world: World, mode: wire.Mode, bounds: Bounds) -> Iterator[World]:
    """Yield all worlds that may follow."""
    for at, host in enumerate(world.hosts):
        other = HOSTS[1 - at]
        if host.holding.may_run and world.written < bounds.writes:
            written = world.written + 1
            yield _Happening(world._replace(written=written), at, None).end(state=b"%d" % written)
        if world.proposals < bounds.proposals:
            nonce = bytes([world.proposals + 1]) * wire.NONCE_BYTES
            yield from _happen(
                world._replace(proposals=world.proposals + 1),
                at,
                "outgoing",
                lambda h, peer=other, n=nonce: SOURCE.propose(h.holding, peer, VTPM, VM, mode, n),
            )
        yield from _happen(world, at, "outgoing", lambda h: SOURCE.freeze(h.holding, h.outgoing, h.state or b""))
        yield from _happen(world, at, "outgoing", lambda h: SOURCE.arrived(h.holding, h.outgoing))
        yield from _happen(world, at, "outgoing", lambda h: SOURCE.abort(h.holding))
        yield from _happen(world, at, "outgoing", lambda h: SOURCE.remind(h.holding, h.outgoing))
        for wanted in (False, True):
            yield from _happen(
                world, at, "incoming", lambda h, w=wanted: DESTINATION.remind(h.holding, h.incoming, wanted=w)
            )
        yield _Happening(world, at, None).end(outgoing=None, incoming=None)
    for packet in world.packets:
        yield from deliver(world, packet, bounds)


def deliver(world: World, packet: Packet, bounds: Bounds) -> Iterator[World]:
    """Yield the worlds to which the arrival of one message may lead."""
    peer, message = HOSTS[packet.sender], packet.message
    if isinstance(message, _FROM_SOURCE):
        if isinstance(message, wire.Propose):
            if world.offers == bounds.offers:
                return
            world = world._replace(offers=world.offers + 1)
        fresh = bytes([100 + world.offers]) * (wire.ID_BYTES + wire.NONCE_BYTES)
        yield from _happen(
            world,
            packet.to,
            "incoming",
            lambda h: DESTINATION.receive(h.holding, h.incoming, peer, message, fresh),
        )
    else:
        yield from _happen(world, packet.to, "outgoing", lambda h: SOURCE.receive(h.holding, h.outgoing, peer, message))


def check(world: World) -> None:
    """Raise Violation: two may run it, nobody can any more, or what was written is not what would run."""
    rights = [host.holding.right for host in world.hosts]
    if rights.count(Right.HELD) > 1:
        raise Violation(f"two hosts may run it: {world}")
    keepers = [host for host in world.hosts if host.holding.right in (Right.HELD, Right.FROZEN)]
    if not keepers:
        keepers = [
            there
            for here, there in (world.hosts, world.hosts[::-1])
            if here.holding.right is Right.MOVED
            and there.holding.right is Right.INERT
            and here.holding.migration_id == there.holding.migration_id
        ]
    if not keepers:
        raise Violation(f"it is lost: {world}")
    if not any(host.state == b"%d" % world.written for host in keepers):
        raise Violation(f"a write is lost: {world}")
    for host in world.hosts:
        if host.holding.right is Right.HELD and host.state != b"%d" % world.written:
            raise Violation(f"an old state may run: {world}")
    living = (Right.HELD, Right.FROZEN, Right.INERT)
    epochs = [host.holding.epoch for host in world.hosts if host.holding.right in living]
    if len(set(epochs)) != len(epochs):
        raise Violation(f"two hosts have it under one epoch: {world}")


def close(world: World, mode: wire.Mode) -> World:
    """Return what becomes of a world in which both hosts are back, and nothing is lost or comes late any more."""
    unbounded = Bounds(0, 0, 0)
    world = world._replace(packets=frozenset())
    for turn in range(_CLOSING_TURNS):
        for at in range(len(HOSTS)):
            frozen = world.hosts[at].holding
            world = _first(_happen(world, at, "outgoing", lambda h: SOURCE.remind(h.holding, h.outgoing)), world)
            world = _first(_happen(world, at, "incoming", lambda h: DESTINATION.remind(h.holding, h.incoming)), world)
            if frozen.right is Right.FROZEN and turn > 0:
                # Whoever drives finds out: the guest is there, or is not.
                there = world.hosts[1 - at].holding
                if mode is wire.Mode.FOREIGN and there.right is Right.INERT:
                    wanted = lambda h: DESTINATION.remind(h.holding, h.incoming, wanted=True)  # noqa: E731
                    world = _first(_happen(world, 1 - at, "incoming", wanted), world)
                elif mode is wire.Mode.DRIVEN and there.right is Right.INERT:
                    seen = lambda h: SOURCE.arrived(h.holding, h.outgoing)  # noqa: E731
                    world = _first(_happen(world, at, "outgoing", seen), world)
            while world.packets:
                packet = min(world.packets, key=repr)
                world = world._replace(packets=world.packets - {packet})
                world = _first(deliver(world, packet, unbounded), world)
    rights = sorted(host.holding.right.value for host in world.hosts)
    if rights not in (["absent", "held"], ["held", "moved"]):
        raise Violation(f"it does not come to rest: {rights}: {world}")
    if any(host.holding.right is Right.MOVED and host.holding.migration_id for host in world.hosts):
        raise Violation(f"a release is said for ever: {world}")
    check(world)
    return world


def _first(worlds: Iterator[World], otherwise: World) -> World:
    return next(worlds, otherwise)


@dataclass
class Explored:
    """What was gone through."""

    states: int = 0
    steps: int = 0
    moved: int = 0
    back: int = 0
    deepest: int = 0
    schedules: int = 0


def explore(mode: wire.Mode, bounds: Bounds, count_depth: int) -> Explored:
    """Visit every world that can be reached, check each, and let each come to rest.

    Args:
        count_depth: schedules of at most so many steps are counted; each lies within what was visited.
    Raises:
        Violation: with the world in which it showed.
    """
    found = Explored()
    first = start()
    numbers = {first: 0}
    depth = [0]
    follow: list[list[int]] = []
    waiting = deque([first])
    check(first)
    while waiting:
        world = waiting.popleft()
        at = numbers[world]
        after: list[int] = []
        for next_world in moves(world, mode, bounds):
            found.steps += 1
            number = numbers.get(next_world)
            if number is None:
                check(next_world)
                number = numbers[next_world] = len(numbers)
                depth.append(depth[at] + 1)
                waiting.append(next_world)
            if number != at:
                after.append(number)
        follow.append(after)
        end = close(world, mode)
        found.moved += end.hosts[1].holding.right is Right.HELD
        found.back += end.hosts[0].holding.epoch > 2 and end.hosts[0].holding.right is Right.HELD
    found.states = len(numbers)
    found.deepest = max(depth)
    counts = [1] * len(follow)
    for _ in range(count_depth):
        counts = [1 + sum(counts[number] for number in after) for after in follow]
    found.schedules = counts[0]
    return found
