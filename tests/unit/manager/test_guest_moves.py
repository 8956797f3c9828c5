"""vTPMs that move with their guests, between two hosts with real stores and without processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import pytest

from tests.unit.manager.test_migrations import LIMIT_S, ROOT, Link, Vtpms, run
from tests.unit.migration.test_mover import STATES, Host
from tests.unit.vault.world import ENGINE, new_record
from vtpm.errors import (
    AccessDeniedError,
    AttestationError,
    ConflictError,
    NotFoundError,
    StateError,
    StoreError,
    UnavailableError,
    VtpmError,
)
from vtpm.manager import arrivals, departures
from vtpm.manager.access import Caller
from vtpm.manager.guest_moves import GuestMoves
from vtpm.manager.instance_link import InstanceLink, LinkFacts
from vtpm.manager.lifecycle import Happening, after
from vtpm.manager.migrations import MigrationService
from vtpm.manager.ordered import MAX_WAITING
from vtpm.manager.running import Running
from vtpm.migration.mover import Place
from vtpm.migration.payload import Payload
from vtpm.tpm.types import MAX_SEALED_BYTES, InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.holding import Right
from vtpm.vault.records import VtpmRecord
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.wire.api import DomainName, LifeState
from vtpm.wire.api_migrations import Guest, MigrateVtpm, Phase, ReceiveVtpm
from vtpm.wire.launcher import InstanceInfo
from vtpm.wire.migration import Mode

VOLATILE = STATES[StateKind.VOLATILE]
T = TypeVar("T")


class PlayedLink:
    """The manager's end of an instance's link."""

    def __init__(self) -> None:
        self.facts = LinkFacts(engine_version=ENGINE)
        self.activated = 0
        self.wanted = False
        self.closed = False

    def activate(self) -> None:
        self.activated += 1

    def close(self) -> None:
        self.closed = True


def instance(record: VtpmRecord) -> InstanceInfo:
    return InstanceInfo(record.id, InstanceId(uuid4()), record.name, 1, "m" * 64, 9, "control", "data", ())


class GuestVtpms(Vtpms):
    """The manager's vTPMs, with instances that are only noted.

    Args:
        told: what was done to instances.
        alive: instances that the launcher has.
    """

    def __init__(self, host: Host, alive: dict[VtpmId, InstanceInfo]) -> None:
        super().__init__(host)
        self.told: list[str] = []
        self.alive = alive
        self.left: list[VtpmRecord] = []

    async def append(self, event: object) -> None:
        pass

    def runs(self, record: VtpmRecord) -> Running:
        """Have an instance of it run."""
        info = instance(record)
        self._host.store(lambda store: store.bind_instance(record.id, info.instance_id))
        self._host.store(lambda store: store.set_lifecycle(record.id, "running"))
        self.alive[record.id] = info
        return self._follow(self._host.record(record.id), info)

    def _follow(self, record: VtpmRecord, info: InstanceInfo) -> Running:
        self.running[record.id] = Running(record, info, cast(InstanceLink, PlayedLink()))
        return self.running[record.id]

    def freeze(self, running: Running) -> None:
        after(running.record.name, LifeState(self._host.record(running.record.id).lifecycle), Happening.DEPART)
        self.told.append("frozen")

    async def go_on(self, running: Running, record: VtpmRecord) -> None:
        running.record = record
        self.told.append(f"goes on in epoch {record.epoch}")

    async def begin_arrived(self, record: VtpmRecord, info: InstanceInfo, link: InstanceLink) -> None:
        self.running[record.id] = Running(record, info, link)
        self.told.append("begins")
        link.activate()

    async def let_go(self, running: Running, how: str) -> None:
        del self.running[running.record.id], self.alive[running.record.id]
        self.told.append(f"let go: {how}")

    async def start_inert(self, record: VtpmRecord) -> tuple[InstanceInfo, InstanceLink]:
        self.alive[record.id] = instance(record)
        return self.alive[record.id], cast(InstanceLink, PlayedLink())

    async def attach_inert(self, record: VtpmRecord) -> tuple[InstanceInfo, InstanceLink]:
        info = self.alive.get(record.id)
        if info is None or info.instance_id != record.instance_id:
            raise ConflictError("the instance is no more")
        return info, cast(InstanceLink, PlayedLink())

    def is_held(self, running: Running) -> bool:
        return self._host.record(running.record.id).lifecycle == "running"

    async def settle_ended(self, vtpm_id: VtpmId) -> None:
        self.told.append("stopped")

    async def settle_running(self, running: Running, how: str) -> None:
        del self.running[running.record.id]

    async def end_passing(self, record: VtpmRecord, how: str) -> None:
        self.alive.pop(record.id, None)
        self.told.append("passing instance ended")
        bound = self._host.record(record.id).instance_id
        if bound is not None:
            self._host.store(lambda store: store.unbind_instance(record.id, bound))

    def left_passing(self) -> list[VtpmRecord]:
        left, self.left = self.left, []
        return left

    async def take_up_frozen(self, record: VtpmRecord) -> None:
        self._follow(record, self.alive[record.id])

    @contextlib.asynccontextmanager
    async def held(self, name: str, caller: Caller, happening: Happening) -> AsyncIterator[VtpmRecord]:
        record = self._host.store(lambda store: store.find_vtpm(name))
        after(name, LifeState(record.lifecycle), happening)
        yield record


class Guests(Link):
    """Two hosts with guests' moves between them."""

    def __init__(self, folder: Path) -> None:
        self.alive: dict[str, dict[VtpmId, InstanceInfo]] = {"a": {}, "b": {}}
        self.vtpms: dict[str, GuestVtpms] = {}
        self.moves: dict[str, GuestMoves] = {}
        super().__init__(folder)

    def _service(self, host: Host) -> MigrationService:
        service = super()._service(host)
        vtpms = GuestVtpms(host, self.alive[host.name])
        moves = service._guests
        for part in (service, moves, moves.departures, moves.arrivals):
            part._vtpms = vtpms  # type: ignore[attr-defined]
        self.vtpms[host.name], self.moves[host.name] = vtpms, moves

        def place(payload: Payload, mode: Mode) -> Place:
            return moves.arrivals.place(payload, mode)

        host.place = place  # type: ignore[method-assign]
        return service

    def restart(self, name: str) -> None:
        """A manager ends, and another follows; instances live on."""
        self.crash(name)
        host = self.hosts[name]
        records = host.store(lambda store: store.list_vtpms())
        self.vtpms[name].left = [record for record in records if record.lifecycle in ("frozen", "inert")]

    def begin(self, guest: Guest = Guest.FOREIGN) -> VtpmRecord:
        """Have a vTPM run at a that is expected at b, and may leave."""
        record = self.hosts["a"].manufactured()
        self.vtpms["a"].runs(record)
        run(self.moves["b"].arrivals.receive("web1", ReceiveVtpm(record.id), ROOT))
        assert run(self.services["a"].migrate("web1", MigrateVtpm("b", guest=guest), ROOT)).phase is Phase.READY
        return record

    async def depart(self, vtpm_id: VtpmId) -> bytes:
        info = self.vtpms["a"].running[vtpm_id].info
        return await self.moves["a"].depart(vtpm_id, info.instance_id, VOLATILE)

    async def cross(self, vtpm_id: VtpmId) -> Mapping[StateKind, bytes]:
        """Have the guest go, and what it brings loaded."""
        return await self.moves["b"].arrive(vtpm_id, await self.depart(vtpm_id))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0)

    def right(self, name: str, vtpm_id: VtpmId) -> Right:
        return self.hosts[name].mover.holding(vtpm_id).right

    def running(self, vtpm_id: VtpmId) -> list[bool]:
        return [vtpm_id in vtpms.running for vtpms in self.vtpms.values()]


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Guests]:
    made = Guests(tmp_path)
    yield made
    made.threads._pool.shutdown(wait=True)
    for host in made.hosts.values():
        host.close()


def test_vtpm_runs_there_once_its_guest_wants_it(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        assert await link.cross(record.id) == STATES
        assert link.running(record.id) == [True, False]
        link.moves["b"].wanted(record.id)
        await link.until(lambda: link.running(record.id) == [False, True])

    run(go())
    assert link.vtpms["a"].told == ["frozen", "let go: it has moved to b"]
    running = link.vtpms["b"].running[record.id]
    assert cast(PlayedLink, running.link).activated == 1
    assert (running.record.lifecycle, running.record.epoch) == ("running", 2)
    assert running.record.instance_id == running.info.instance_id
    assert not link.moves["b"].expects(record.id)


def test_vtpm_runs_there_once_its_operator_says_that_its_guest_has_arrived(link: Guests) -> None:
    record = link.begin(Guest.DRIVEN)

    async def go() -> None:
        await link.cross(record.id)
        # A command there says nothing while its source's operator has not.
        link.moves["b"].wanted(record.id)
        await asyncio.sleep(0.05)
        assert link.running(record.id) == [True, False]
        assert (await link.services["a"].arrived("web1", ROOT)).phase is Phase.OVER
        await link.until(lambda: link.running(record.id) == [False, True])
        # Said again, because the answer was lost.
        assert (await link.services["a"].arrived("web1", ROOT)).right == "moved"

    run(go())
    with pytest.raises(AccessDeniedError):
        run(link.services["a"].arrived("web1", Caller(1000, 1000, is_admin=False)))


def test_arrival_is_not_said_of_a_move_that_is_not_driven_or_not_under_way(link: Guests) -> None:
    record = link.begin(Guest.FOREIGN)
    with pytest.raises(VtpmError):
        run(link.services["a"].arrived("web1", ROOT))
    run(link.cross(record.id))
    with pytest.raises(ConflictError, match="no migration that is driven"):
        run(link.services["a"].arrived("web1", ROOT))
    assert link.running(record.id) == [True, False]


def test_vtpm_leaves_with_no_guest_when_it_has_no_ticket(link: Guests) -> None:
    record = link.hosts["a"].manufactured()
    link.vtpms["a"].runs(record)
    with pytest.raises(ConflictError, match="no migration of vTPM web1 is under way"):
        run(link.depart(record.id))
    assert link.vtpms["a"].told == []
    assert link.right("a", record.id) is Right.HELD


def test_ticket_is_of_one_instance_and_ends_with_its_time(link: Guests) -> None:
    record = link.begin()
    ticket = link.moves["a"].departures.ticket(record.id)
    assert ticket is not None
    link.moves["a"].departures._tickets[record.id] = dataclasses.replace(ticket, until_s=0)
    with pytest.raises(ConflictError, match="no migration of vTPM web1"):
        run(link.depart(record.id))
    run(link.services["a"].migrate("web1", MigrateVtpm("b", guest=Guest.FOREIGN), ROOT))
    info = link.vtpms["a"].running[record.id].info
    # Its instance has died, and a successor runs.
    link.vtpms["a"].running[record.id].info = dataclasses.replace(info, instance_id=InstanceId(uuid4()))
    with pytest.raises(ConflictError, match="not the one that runs"):
        run(link.moves["a"].depart(record.id, info.instance_id, VOLATILE))
    with pytest.raises(ConflictError, match="no migration of vTPM web1"):
        run(link.depart(record.id))
    assert link.right("a", record.id) is Right.HELD
    assert link.moves["a"].departures.tickets() == {}


def test_ticket_is_withdrawn_by_an_abort_and_used_once(link: Guests) -> None:
    record = link.begin()
    assert run(link.services["a"].abort("web1", ROOT)).right == "held"
    with pytest.raises(ConflictError, match="no migration"):
        run(link.depart(record.id))
    run(link.services["a"].migrate("web1", MigrateVtpm("b", guest=Guest.FOREIGN), ROOT))

    async def twice() -> None:
        sealed = await link.depart(record.id)
        # The answer was lost on its way to the instance.
        assert await link.depart(record.id) == sealed
        await link.moves["a"].take_back(record.id)
        with pytest.raises(ConflictError, match="no migration"):
            await link.depart(record.id)

    run(twice())


def test_guest_goes_on_at_its_source_and_what_was_sent_is_worthless(link: Guests) -> None:
    record = link.begin()

    async def go() -> bytes:
        sealed = await link.depart(record.id)
        await link.moves["b"].arrive(record.id, sealed)
        await link.moves["a"].take_back(record.id)
        await link.until(lambda: "passing instance ended" in link.vtpms["b"].told)
        return sealed

    sealed = run(go())
    assert link.vtpms["a"].told == ["frozen", "goes on in epoch 3"]
    assert link.vtpms["a"].running[record.id].record.epoch == 3
    assert [link.right(name, record.id) for name in "ab"] == [Right.HELD, Right.ABSENT]
    run(link.moves["b"].arrivals.receive("web1", ReceiveVtpm(record.id), ROOT))
    with pytest.raises(VtpmError):
        run(link.moves["b"].arrive(record.id, sealed))
    assert link.right("b", record.id) is Right.ABSENT


def test_vtpm_stays_when_it_was_never_to_leave(link: Guests) -> None:
    record = link.hosts["a"].manufactured()
    link.vtpms["a"].runs(record)
    run(link.moves["a"].take_back(record.id))
    assert link.hosts["a"].record(record.id).epoch == 1


def test_vtpm_does_not_stay_when_it_has_moved(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        await link.cross(record.id)
        link.moves["b"].wanted(record.id)
        await link.until(lambda: link.running(record.id) == [False, True])
        with pytest.raises(ConflictError, match="is moved on this host"):
            await link.moves["a"].take_back(record.id)

    run(go())


def test_operator_takes_it_back_while_its_guest_is_on_its_way(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        await link.cross(record.id)
        assert (await link.services["a"].abort("web1", ROOT)).right == "held"
        await link.until(lambda: "goes on in epoch 3" in link.vtpms["a"].told)
        await link.moves["a"].take_back(record.id)
        # Nobody there has it, however much its guest wants it.
        link.moves["b"].wanted(record.id)
        await link.until(lambda: not link.moves["b"].expects(record.id))

    run(go())
    assert link.running(record.id) == [True, False]


@pytest.mark.parametrize("fails_after", [False, True], ids=["nothing recorded", "recorded"])
def test_nothing_is_refused_for_good_while_it_may_be_frozen(
    link: Guests, monkeypatch: pytest.MonkeyPatch, fails_after: bool
) -> None:
    record = link.begin()
    record_move = SqliteStore.record_move

    def fails(self: SqliteStore, *args: Any, **words: Any) -> None:
        if fails_after:
            record_move(self, *args, **words)
        raise StoreError("the store has not answered")

    monkeypatch.setattr(SqliteStore, "record_move", fails)

    async def go() -> None:
        with pytest.raises((StoreError, UnavailableError)):
            await link.depart(record.id)
        monkeypatch.undo()
        # Where it is known by now that nothing was recorded, its TPM may go on at once.
        with pytest.raises(UnavailableError if fails_after else ConflictError):
            await link.depart(record.id)
        await link.moves["a"].take_back(record.id)

    run(go())
    assert link.right("a", record.id) is Right.HELD
    assert link.vtpms["a"].told == ["frozen", f"goes on in epoch {3 if fails_after else 1}"]


def test_vtpm_goes_on_at_once_when_its_departure_is_refused_before_anything_is_recorded(
    link: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = link.begin()

    def refuses(*_: object, **__: object) -> None:
        raise ConflictError("no")

    monkeypatch.setattr(SqliteStore, "record_move", refuses)
    with pytest.raises(ConflictError, match="no"):
        run(link.depart(record.id))
    monkeypatch.undo()
    assert link.vtpms["a"].told == ["frozen", "goes on in epoch 1"]
    with pytest.raises(ConflictError, match="no migration"):
        run(link.depart(record.id))


def test_departure_goes_to_its_end_and_is_taken_back_after_it_when_its_instance_has_given_it_up(
    link: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = link.begin()
    begun, go_on = threading.Event(), threading.Event()
    freeze = link.hosts["a"].mover.freeze

    def slow(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(LIMIT_S)
        return freeze(*args)

    monkeypatch.setattr(link.hosts["a"].mover, "freeze", slow)

    async def go() -> None:
        asked = asyncio.create_task(link.depart(record.id))
        await asyncio.to_thread(begun.wait, LIMIT_S)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        back = asyncio.create_task(link.moves["a"].take_back(record.id))
        done, _ = await asyncio.wait([back], timeout=0.2)
        assert not done, "it went on while it was being frozen"
        go_on.set()
        await back

    run(go())
    assert link.right("a", record.id) is Right.HELD
    assert link.vtpms["a"].told == ["frozen", "goes on in epoch 3"]


def test_guest_goes_on_at_its_source_when_the_manager_there_has_ended_meanwhile(link: Guests) -> None:
    record = link.begin()
    run(link.depart(record.id))
    link.restart("a")

    async def go() -> None:
        await link.moves["a"].take_up()
        with pytest.raises(UnavailableError):
            await link.depart(record.id)
        await link.moves["a"].take_back(record.id)

    run(go())
    assert link.right("a", record.id) is Right.HELD
    assert link.vtpms["a"].told == ["goes on in epoch 3"]


@pytest.mark.parametrize("dies", ["a", "b", "ab"])
def test_guest_goes_on_there_when_managers_have_ended_while_it_was_on_its_way(link: Guests, dies: str) -> None:
    record = link.begin()
    run(link.cross(record.id))
    for name in dies:
        link.restart(name)

    async def go() -> None:
        for name in dies:
            await link.moves[name].take_up()
        link.moves["b"].wanted(record.id)
        await link.until(lambda: link.running(record.id) == [False, True])

    run(go())
    assert cast(PlayedLink, link.vtpms["b"].running[record.id].link).activated == 1


def test_command_waits_no_more_when_its_vtpm_was_released_to_a_manager_that_has_ended(link: Guests) -> None:
    record = link.begin()
    run(link.cross(record.id))
    # Held in the store, and its instance was not told.
    sends = link.hosts["b"].mover.remind(record.id, wanted=True)
    (release,) = link.hosts["a"].mover.receive(record.id, "b", sends[0].message, link.hosts["a"].channel)
    link.hosts["b"].mover.receive(record.id, "a", release.message, link.hosts["b"].channel)
    link.restart("b")
    running = link.vtpms["b"]._follow(link.hosts["b"].record(record.id), link.alive["b"][record.id])

    # It has asked, of a manager that was not ready for it.
    cast(PlayedLink, running.link).wanted = True

    async def go() -> None:
        await link.moves["b"].take_up()
        await link.until(lambda: bool(cast(PlayedLink, running.link).activated))

    run(go())


def test_guest_is_waited_for_when_the_source_cannot_be_asked(link: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "ASK_S", 0.01)
    record = link.begin()

    async def go() -> None:
        await link.cross(record.id)
        for number in range(link.exchanges + 1, link.exchanges + 4):
            link.before[number] = UnavailableError("no route to a")
        link.moves["b"].wanted(record.id)
        link.moves["b"].wanted(record.id)
        await link.until(lambda: link.running(record.id) == [False, True])

    run(go())


def test_nobody_is_asked_what_has_become_of_a_vtpm_whose_guest_may_be_on_its_way(
    link: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = link.begin()
    exchanges = link.exchanges

    async def followed() -> None:
        await link.depart(record.id)
        (here,) = await link.services["a"].list(ROOT)
        assert (here.right, here.phase) == ("frozen", Phase.SENDING)
        task = asyncio.create_task(link.services["a"].follow())
        await asyncio.sleep(0.1)
        assert link.exchanges == exchanges
        # Long after, the destination has nothing of it, and it stays.
        monkeypatch.setattr(departures, "QUIET_S", 0.0)
        await link.until(lambda: "goes on in epoch 3" in link.vtpms["a"].told)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(followed())
    assert link.right("a", record.id) is Right.HELD


def test_inert_vtpm_stays_without_its_guest_when_its_instance_dies(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        await link.cross(record.id)
        info = link.alive["b"][record.id]
        await link.moves["b"].ended(record.id, InstanceId(uuid4()), "another's end")
        assert link.moves["b"].expects(record.id)
        await link.moves["b"].ended(record.id, info.instance_id, "killed")
        assert not link.moves["b"].expects(record.id)
        inert = link.hosts["b"].record(record.id)
        assert (inert.lifecycle, inert.instance_id) == ("inert", None)
        await link.moves["a"].take_back(record.id)
        await link.until(lambda: link.right("b", record.id) is Right.ABSENT)

    run(go())
    assert link.right("a", record.id) is Right.HELD


def test_instance_is_ended_that_was_to_go_on_and_is_another_than_was_bound(link: Guests) -> None:
    record = link.begin()
    run(link.cross(record.id))
    link.alive["b"][record.id] = instance(record)
    link.restart("b")
    run(link.moves["b"].take_up())
    assert link.vtpms["b"].told == ["passing instance ended"]
    assert not link.moves["b"].expects(record.id)


def test_nothing_is_expected_by_nobodys_word_or_twice_or_where_it_is_already(link: Guests) -> None:
    there = link.moves["b"].arrivals
    record = link.hosts["b"].manufactured()
    with pytest.raises(AccessDeniedError):
        run(there.receive("web2", ReceiveVtpm(uuid4()), Caller(1000, 1000, is_admin=False)))
    with pytest.raises(ConflictError, match="of this name is here"):
        run(there.receive("web1", ReceiveVtpm(uuid4()), ROOT))
    with pytest.raises(ConflictError, match="of this uuid is here"):
        run(there.receive("web2", ReceiveVtpm(record.id), ROOT))
    expected = uuid4()
    described = run(there.receive("web2", ReceiveVtpm(expected, owner=(7, 8)), ROOT))
    assert (described.state, described.owner.uid, described.control_socket) == (LifeState.INERT, 7, "control")
    for name, uuid in (("web2", uuid4()), ("web3", expected)):
        with pytest.raises(ConflictError, match="expected already"):
            run(there.receive(name, ReceiveVtpm(uuid), ROOT))
    (listed,) = (one for one in run(link.services["b"].list(ROOT)) if one.name == "web2")
    assert (listed.uuid, listed.phase) == (expected, Phase.EXPECTED)
    assert there.images() == [("web2", "process", "m" * 64)]
    run(link.services["b"].discard("web2", ROOT))
    assert link.vtpms["b"].told == ["passing instance ended"]
    with pytest.raises(NotFoundError):
        run(link.services["b"].discard("web2", ROOT))


def test_instances_do_not_wait_without_bound(link: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MAX_WAITING", 2)
    there = link.moves["b"].arrivals
    for name in ("one", "two"):
        run(there.receive(name, ReceiveVtpm(uuid4()), ROOT))
    with pytest.raises(ConflictError, match="2 instances wait"):
        run(there.receive("three", ReceiveVtpm(uuid4()), ROOT))


def _expected_as(link: Guests, record: VtpmRecord, name: str = "web1", **words: Any) -> Awaitable[object]:
    return link.moves["b"].arrivals.receive(name, ReceiveVtpm(record.id, **words), ROOT)


@pytest.mark.parametrize(
    ("name", "words", "engine", "why"),
    [
        ("web2", {}, ENGINE, r"a vTPM web2 \(TPM 2.0, libtpms\) is expected, and web1 \(TPM 2.0, libtpms\) comes"),
        ("web1", {"tpm_version": TpmVersion.V1_2}, ENGINE, "is expected, and web1"),
        ("web1", {"vm_uuid": uuid4()}, ENGINE, "is bound to the VM"),
        ("web1", {}, ENGINE - 1, "needs a newer engine"),
    ],
)
def test_vtpm_stays_with_its_guest_when_another_is_expected(
    link: Guests, name: str, words: dict[str, Any], engine: int, why: str
) -> None:
    record = link.hosts["a"].manufactured()
    link.vtpms["a"].runs(record)
    run(_expected_as(link, record, name, **words))
    cast(PlayedLink, link.moves["b"].arrivals._waiting[record.id].link).facts.engine_version = engine
    run(link.services["a"].migrate("web1", MigrateVtpm("b", guest=Guest.FOREIGN), ROOT))
    with pytest.raises(VtpmError, match=why):
        run(link.cross(record.id))
    assert link.right("b", record.id) is Right.ABSENT
    run(link.moves["a"].take_back(record.id))
    assert link.running(record.id) == [True, False]


def test_vtpm_comes_neither_without_its_guest_where_it_is_expected_nor_with_it_where_it_is_not(link: Guests) -> None:
    record = link.hosts["a"].manufactured()
    with pytest.raises(VtpmError, match="cannot let it leave with its guest"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b", guest=Guest.FOREIGN), ROOT))
    run(_expected_as(link, record))
    with pytest.raises(ConflictError, match="expected with its guest, and comes without"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    run(link.services["b"].discard("web1", ROOT))
    link.vtpms["a"].runs(link.hosts["a"].record(record.id))
    with pytest.raises(ConflictError, match="no instance waits there"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b", guest=Guest.FOREIGN), ROOT))
    with pytest.raises(VtpmError, match="said where it is expected"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b", domain=DomainName.QEMU, guest=Guest.FOREIGN), ROOT))


def test_no_ticket_is_given_when_the_peer_is_not_believed(link: Guests) -> None:
    record = link.hosts["a"].manufactured()
    link.vtpms["a"].runs(record)
    run(_expected_as(link, record))
    link.hosts["a"].attester.believes = False
    with pytest.raises(AttestationError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b", guest=Guest.FOREIGN), ROOT))
    assert link.moves["a"].departures.tickets() == {}
    with pytest.raises(ConflictError):
        run(link.depart(record.id))


def test_what_an_instance_brings_is_refused_when_it_is_no_state_or_nothing_is_expected(link: Guests) -> None:
    record = link.begin()
    with pytest.raises(VtpmError):
        run(link.moves["b"].arrive(record.id, b"no state"))
    with pytest.raises(ConflictError, match="nothing is expected"):
        run(link.moves["b"].arrive(new_record().id, b""))
    # One that has not brought anything wants nothing.
    link.moves["b"].wanted(record.id)
    assert link.moves["b"].arrivals._waiting[record.id].asking is None
    assert run(link.cross(record.id)) == STATES


def test_vtpm_is_not_lost_to_its_guest_when_the_store_fails_as_it_is_taken_back(
    link: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures, "SETTLE_PAUSE_S", 0.01)
    record = link.begin()
    vtpms = link.vtpms["a"]
    go_on, failures = vtpms.go_on, [StateError("damaged"), StoreError("full"), NotFoundError("none")]

    async def fails(running: Running, record: VtpmRecord) -> None:
        if failures:
            raise failures.pop()
        await go_on(running, record)

    monkeypatch.setattr(vtpms, "go_on", fails)

    async def go() -> None:
        await link.depart(record.id)
        with pytest.raises(UnavailableError, match="whether it stays is not known yet"):
            await link.moves["a"].take_back(record.id)
        # It was aborted, so what was handed out is worth nothing: it is not handed out again.
        with pytest.raises(UnavailableError, match="taken back first"):
            await link.depart(record.id)
        # By itself, too, for an instance may not ask again.
        link.moves["a"].departures.settled(record.id)
        await link.until(lambda: vtpms.told == ["frozen", "goes on in epoch 3"])
        await link.moves["a"].take_back(record.id)

    run(go())


def test_departure_is_refused_for_good_only_when_its_vtpm_goes_on(
    link: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = link.begin()

    def no_key(_: object) -> None:
        raise StateError("the root key is locked")

    async def fails(*_: object) -> None:
        raise StateError("the root key is locked")

    monkeypatch.setattr(link.hosts["a"], "key", no_key)
    monkeypatch.setattr(link.vtpms["a"], "go_on", fails)

    async def go() -> None:
        with pytest.raises(UnavailableError, match="to be taken back"):
            await link.depart(record.id)
        monkeypatch.undo()
        await link.moves["a"].take_back(record.id)
        with pytest.raises(ConflictError, match="no migration"):
            await link.depart(record.id)

    run(go())
    assert link.vtpms["a"].told == ["frozen", "goes on in epoch 1"]


def test_nothing_is_frozen_that_no_guest_can_take(link: Guests) -> None:
    record = link.begin()
    info = link.vtpms["a"].running[record.id].info
    with pytest.raises(VtpmError, match="1048576"):
        run(link.moves["a"].depart(record.id, info.instance_id, bytes(MAX_SEALED_BYTES)))
    assert link.right("a", record.id) is Right.HELD


def test_vtpm_is_stopped_when_its_instance_has_ended_before_the_move_was_aborted(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        await link.depart(record.id)
        del link.vtpms["a"].running[record.id]
        await link.services["a"].abort("web1", ROOT)
        await link.until(lambda: "stopped" in link.vtpms["a"].told)

    run(go())


def test_second_state_for_an_inert_vtpm_changes_nothing(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        sealed = bytearray(await link.depart(record.id))
        await link.moves["b"].arrive(record.id, bytes(sealed))
        sealed[-1] ^= 1
        with pytest.raises(VtpmError):
            await link.moves["b"].arrive(record.id, bytes(sealed))
        # It is inert, and nothing that is merely expected.
        assert await link.moves["b"].arrivals.give_up("web1", ROOT) is None
        link.moves["b"].wanted(record.id)
        await link.until(lambda: link.running(record.id) == [False, True])

    run(go())


def test_state_that_is_to_come_with_its_guest_is_not_taken_from_its_peer(link: Guests) -> None:
    record = link.begin(Guest.DRIVEN)

    async def go() -> None:
        sealed = await link.depart(record.id)
        with pytest.raises(ConflictError, match="is to come with its guest"):
            await link.services["b"].receive("a", record.id, sealed, link.hosts["b"].channel)
        assert link.right("b", record.id) is Right.ABSENT
        await link.moves["b"].arrive(record.id, sealed)

    run(go())


def test_instance_that_dies_as_its_vtpm_begins_is_noted(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        await link.cross(record.id)
        info = link.alive["b"][record.id]
        link.moves["b"].wanted(record.id)
        await link.until(lambda: link.running(record.id) == [False, True])
        # The word of its end was on its way meanwhile.
        await link.moves["b"].ended(record.id, info.instance_id, "killed")

    run(go())
    assert link.running(record.id) == [False, False]


def test_nothing_waits_any_more_when_the_launcher_is_gone(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        await link.cross(record.id)
        await link.moves["b"].all_ended("the launcher is gone")

    run(go())
    assert not link.moves["b"].expects(record.id)
    assert link.hosts["b"].record(record.id).instance_id is None


def test_operator_s_word_is_about_the_vtpm_that_is_here_when_another_of_its_name_has_moved(link: Guests) -> None:
    first = link.begin()

    async def go() -> None:
        await link.cross(first.id)
        link.moves["b"].wanted(first.id)
        await link.until(lambda: link.running(first.id) == [False, True])

    run(go())
    second = link.hosts["a"].manufactured()
    link.vtpms["a"].runs(second)
    with pytest.raises(ConflictError, match="not on its way"):
        run(link.services["a"].abort("web1", ROOT))
    with pytest.raises(ConflictError, match="no migration that is driven"):
        run(link.services["a"].arrived("web1", ROOT))


def test_departures_that_were_given_up_do_not_pile_up(link: Guests) -> None:
    record = link.begin()

    async def go() -> None:
        async with link.moves["a"].departures._work.lock(record.id):
            asked = [asyncio.create_task(link.depart(record.id)) for _ in range(MAX_WAITING)]
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="too much is asked"):
                await link.depart(record.id)
        assert len({await one for one in asked}) == 1

    run(go())
