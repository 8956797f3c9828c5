"""What the manager says to a peer and to the operator, whatever the link between two hosts does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest

from tests.unit.migration.test_mover import Host
from tests.unit.vault.world import new_record
from vtpm.errors import (
    AccessDeniedError,
    AttestationError,
    ConflictError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
    VtpmError,
)
from vtpm.manager.access import Caller
from vtpm.manager.conversations import Conversations, Party
from vtpm.manager.guest_moves import GuestMoves
from vtpm.manager.lifecycle import Happening, after
from vtpm.manager.migrations import MESSAGES_AT_ONCE, PROPOSALS_AT_ONCE, MigrationService
from vtpm.manager.running import Running
from vtpm.manager.service import ManagerService
from vtpm.migration.mover import NO_VM
from vtpm.tpm.types import VtpmId
from vtpm.vault.holding import Holding, KnownVtpm, Right
from vtpm.vault.records import VtpmRecord
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store
from vtpm.wire.api import LifeState
from vtpm.wire.api_migrations import MigrateVtpm, Migration, Phase
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.migration import Mode, Propose, encode_message

T = TypeVar("T")
ROOT = Caller(0, 0, is_admin=True)
LIMIT_S = 20.0
Filter = Callable[[int], Awaitable[None]]


class Vtpms:
    """What the service needs of the manager: here without processes."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.door = self
        self.audit = self
        self.is_open = True
        self.running: dict[VtpmId, Running] = {}

    async def run(self, operation: Callable[[Store], T]) -> T:
        return self._host.store(operation)

    async def opened(self) -> None:
        if not self.is_open:
            raise UnavailableError("the vault is not open yet")

    async def came(self) -> None:
        pass

    def look_again(self, vtpm_id: VtpmId) -> None:
        pass

    @contextlib.asynccontextmanager
    async def held(self, name: str, caller: Caller, happening: Happening) -> AsyncIterator[VtpmRecord]:
        record = self._host.store(lambda store: store.find_vtpm(name))
        after(name, LifeState(record.lifecycle), happening)
        yield record


class Link:
    """Two hosts' services with a link between them that can fail.

    Args:
        before: awaited before the n-th exchange, counted from 1, is delivered; what it raises is seen by who asked.
        behind: awaited after it was delivered, before its answer arrives.
    """

    def __init__(self, folder: Path) -> None:
        self.hosts = {name: Host(folder, name) for name in "ab"}
        self.threads = CallThreads("mover", 2)
        self.services = {name: self._service(host) for name, host in self.hosts.items()}
        self.exchanges = 0
        self.before: dict[int, VtpmError] = {}
        self.behind: dict[int, VtpmError] = {}

    def _service(self, host: Host) -> MigrationService:
        vtpms = cast(ManagerService, Vtpms(host))
        talk, parties = Conversations(host.mover, self.threads), _Known(self, host)
        return MigrationService(vtpms, talk, GuestMoves(vtpms, talk, parties), parties, remind_s=0.01)

    def crash(self, name: str) -> None:
        """Lose what a host remembers."""
        self.hosts[name].restart()
        self.services[name] = self._service(self.hosts[name])

    async def exchange(self, sender: Host, vtpm_id: VtpmId, body: bytes) -> Sequence[bytes]:
        self.exchanges += 1
        number = self.exchanges
        if number in self.before:
            raise self.before[number]
        to = self.hosts[sender.other]
        answers = await self.services[to.name].receive(sender.name, vtpm_id, body, to.channel)
        if number in self.behind:
            raise self.behind[number]
        return answers

    async def until_over(self) -> None:
        """Let both follow up by themselves until neither waits for the other."""
        tasks = [asyncio.create_task(service.follow()) for service in self.services.values()]
        try:
            async with asyncio.timeout(LIMIT_S):
                while not await self._is_over():
                    await asyncio.sleep(0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _is_over(self) -> bool:
        found = [one for service in self.services.values() for one in await service.list(ROOT)]
        return all(one.phase is Phase.OVER for one in found)

    def usable(self, vtpm_id: VtpmId) -> list[bool]:
        return [host.usable(vtpm_id) for host in self.hosts.values()]


class _Known:
    """Each knows the other by its name alone."""

    def __init__(self, link: Link, host: Host) -> None:
        self._link = link
        self._host = host

    async def find(self, name: str) -> Party:
        if name != self._host.other:
            raise NotFoundError(f"there is no peer {name}")

        async def exchange(vtpm_id: VtpmId, body: bytes) -> Sequence[bytes]:
            return await self._link.exchange(self._host, vtpm_id, body)

        return Party(name, self._host.channel, exchange)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    made = Link(tmp_path)
    yield made
    # A call that has begun goes on to its end though whoever asked was cancelled.
    made.threads._pool.shutdown(wait=True)
    for host in made.hosts.values():
        host.close()


def run(work: Awaitable[T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(LIMIT_S):
            return await work

    return asyncio.run(limited())


def listed(link: Link, name: str) -> Sequence[Migration]:
    return run(link.services[name].list(ROOT))


def test_vtpm_moves_and_both_say_where_it_is(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    done = run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    assert (done.right, done.peer, done.epoch, done.phase) == ("moved", "b", 2, Phase.OVER)
    assert link.usable(record.id) == [False, True]
    assert [(one.right, one.peer, one.phase) for one in listed(link, "b")] == [("held", "a", Phase.OVER)]
    back = run(link.services["b"].migrate("web1", MigrateVtpm("a"), ROOT))
    assert (back.right, back.epoch) == ("moved", 3)
    assert link.usable(record.id) == [True, False]


def test_nothing_is_told_or_done_when_the_caller_is_no_administrator(link: Link) -> None:
    link.hosts["a"].manufactured()
    somebody, service = Caller(1000, 1000, is_admin=False), link.services["a"]
    for asked in (
        service.migrate("web1", MigrateVtpm("b"), somebody),
        service.list(somebody),
        service.abort("web1", somebody),
        service.adopt("web1", somebody),
    ):
        with pytest.raises(AccessDeniedError):
            run(asked)
    assert link.exchanges == 0


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("delivered", [False, True])
def test_vtpm_is_usable_at_exactly_one_host_when_the_link_breaks_at_any_message(
    link: Link, number: int, delivered: bool
) -> None:
    record = link.hosts["a"].manufactured()
    faults = link.behind if delivered else link.before
    faults[number] = UnavailableError("the link is cut")
    # Asking what has become of the state fails as well.
    faults[number + 1] = UnavailableError("the link is cut")
    with contextlib.suppress(VtpmError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    faults.clear()
    run(link.until_over())
    assert sorted(link.usable(record.id)) == [False, True]


def test_operator_hears_that_it_is_frozen_and_why_when_the_peer_is_lost_after_the_state(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    link.behind[3] = link.before[4] = UnavailableError("the link is cut")
    with pytest.raises(UnavailableError, match=r"frozen: b has not said whether it has stored it \(the link is cut"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    (here,) = listed(link, "a")
    assert (here.right, here.phase) == ("frozen", Phase.UNDECIDED)
    with pytest.raises(ConflictError, match="is frozen: cannot migrate it"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    aborted = run(link.services["a"].abort("web1", ROOT))
    assert (aborted.right, aborted.epoch) == ("held", 3)
    # It was told: nothing is left there.
    assert [one.right for one in listed(link, "b")] == ["absent"]
    assert link.usable(record.id) == [True, False]
    with pytest.raises(ConflictError, match="not on its way"):
        run(link.services["a"].abort("web1", ROOT))


def test_trouble_is_shown_until_the_peer_answers_again(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    link.behind[3] = UnavailableError("the link is cut")
    for number in range(4, 10):
        link.before[number] = UnavailableError("no route to b")
    with pytest.raises(UnavailableError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))

    async def followed() -> None:
        task = asyncio.create_task(link.services["a"].follow())
        while not (await link.services["a"].list(ROOT))[0].trouble:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(followed())
    (here,) = listed(link, "a")
    assert here.trouble == "no route to b"
    link.before.clear()
    run(link.until_over())
    assert all(not one.trouble for one in listed(link, "a"))
    assert link.usable(record.id) == [False, True]


def test_inert_vtpm_is_adopted_when_its_source_is_lost(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    link.behind[3] = link.before[4] = UnavailableError("the link is cut")
    with pytest.raises(UnavailableError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    adopted = run(link.services["b"].adopt("web1", ROOT))
    assert (adopted.right, adopted.epoch) == ("held", 2)
    with pytest.raises(ConflictError, match="waits for no release"):
        run(link.services["b"].adopt("web1", ROOT))
    link.crash("a")
    run(link.until_over())
    assert link.usable(record.id) == [False, True]


def test_vtpm_stays_when_the_peer_declines_is_not_believed_or_is_unknown(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    a, b = link.hosts.values()
    with pytest.raises(NotFoundError, match="no peer c"):
        run(link.services["a"].migrate("web1", MigrateVtpm("c"), ROOT))
    with pytest.raises(NotFoundError):
        run(link.services["a"].migrate("web9", MigrateVtpm("b"), ROOT))
    a.attester.believes = False
    with pytest.raises(AttestationError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    a.attester.believes, b.attester.believes = True, False
    with pytest.raises(AttestationError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    b.attester.believes = True
    b.store(lambda store: store.create_vtpm(new_record("other", record.id)))
    with pytest.raises(ConflictError, match="b does not take vTPM web1: the vTPM is held on this host already"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    b.store(lambda store: store.delete_vtpm(record.id))
    b.store(lambda store: store.create_vtpm(new_record()))
    with pytest.raises(ConflictError, match="has not moved: a vTPM web1 exists already"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    assert a.usable(record.id)
    assert a.record(record.id).epoch == 3


def test_garbage_is_refused_and_nothing_changes(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    for body in (b"", b"\0" * 8, b"\1\x0d" + bytes(6), b"\1\1" + bytes(6)):
        with pytest.raises(ProtocolError):
            run(link.services["a"].receive("b", record.id, body, link.hosts["a"].channel))

    async def garbage(*_: Any) -> Sequence[bytes]:
        return [b"\1\x02" + bytes(6)]

    link.exchange = garbage  # type: ignore[method-assign]
    with pytest.raises(ProtocolError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    assert link.hosts["a"].usable(record.id)


def test_peer_is_told_to_wait_when_the_vault_is_not_open(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    cast(Vtpms, link.services["b"]._vtpms).is_open = False
    with pytest.raises(UnavailableError, match="not open yet"):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    assert link.hosts["a"].usable(record.id)


def test_peer_is_told_to_come_later_when_it_proposes_without_end(link: Link) -> None:
    b, channel = link.services["b"], link.hosts["b"].channel

    def proposal() -> tuple[VtpmId, bytes]:
        vtpm_id = new_record().id
        return vtpm_id, encode_message(Propose(vtpm_id, NO_VM, 1, Mode.STOPPED, bytes(32)))

    for _ in range(PROPOSALS_AT_ONCE):
        run(b.receive("a", *proposal(), channel))
    with pytest.raises(UnavailableError, match="too many vTPMs"):
        for _ in range(PROPOSALS_AT_ONCE):
            run(b.receive("a", *proposal(), channel))
    with pytest.raises(UnavailableError, match="says too much"):
        for _ in range(MESSAGES_AT_ONCE):
            with contextlib.suppress(ProtocolError):
                run(b.receive("a", new_record().id, b"", channel))
    # Another has its own, and nothing is remembered of all those that were named.
    assert run(b.receive("c", *proposal(), channel))
    assert not b._talk._turns


def test_turn_lasts_as_long_as_its_call_when_whoever_asked_was_cancelled(link: Link) -> None:
    service, vtpm_id = link.services["a"], new_record().id
    begun, go_on, order = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        begun.set()
        go_on.wait(LIMIT_S)
        order.append("first")

    async def cancelled() -> None:
        asked = asyncio.create_task(service._talk.run(vtpm_id, first))
        await asyncio.to_thread(begun.wait, LIMIT_S)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        second = asyncio.create_task(service._talk.run(vtpm_id, order.append, "second"))
        # It has its chance to come first.
        done, _ = await asyncio.wait([second], timeout=0.3)
        assert not done
        go_on.set()
        await second

    run(cancelled())
    assert order == ["first", "second"]


def test_peer_hears_nothing_of_what_is_wrong_with_this_host_itself(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    record = link.hosts["a"].manufactured()

    def evidence(extra: bytes) -> bytes:
        raise NotFoundError("there is no platform policy /etc/vtpm/platform-policy.toml")

    monkeypatch.setattr(link.hosts["b"].attester, "evidence", evidence)
    with pytest.raises(UnavailableError, match="it cannot do that now") as refused:
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    assert "policy" not in str(refused.value)
    assert link.hosts["a"].usable(record.id)


def test_peer_that_hangs_keeps_nobody_elses_moves_waiting(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    service, asked = link.services["a"], list[str]()

    async def find(name: str) -> Party:
        asked.append(name)
        if name == "slow":
            await asyncio.Event().wait()
        raise UnavailableError(f"{name} is away")

    waiting = [
        KnownVtpm(new_record().id, f"web{number}", Holding(Right.INERT, 2, bytes(16), peer, bytes(32)))
        for number, peer in enumerate(("slow", "slow", "other"))
    ]
    monkeypatch.setattr(service, "_parties", SimpleNamespace(find=find))
    monkeypatch.setattr(SqliteStore, "list_holdings", lambda _: waiting)

    async def followed() -> None:
        task = asyncio.create_task(service.follow())
        while asked.count("other") < 3:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(followed())
    assert asked.count("slow") == 1


def test_arrival_is_discarded_by_an_administrator_alone(link: Link) -> None:
    record = link.hosts["a"].manufactured()
    link.behind[3] = link.before[4] = UnavailableError("the link is cut")
    with pytest.raises(UnavailableError):
        run(link.services["a"].migrate("web1", MigrateVtpm("b"), ROOT))
    with pytest.raises(AccessDeniedError):
        run(link.services["b"].discard("web1", Caller(1000, 1000, is_admin=False)))
    discarded = run(link.services["b"].discard("web1", ROOT))
    assert (discarded.right, discarded.phase) == ("absent", Phase.OVER)
    run(link.until_over())
    assert link.usable(record.id) == [True, False]
