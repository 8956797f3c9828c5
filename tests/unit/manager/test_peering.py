"""Two managers' migrations over real TLS on loopback, each known to the other by the certificate that was carried."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.manager.test_migrations import ROOT, Vtpms, run
from tests.unit.migration.test_mover import Host
from vtpm.errors import AccessDeniedError, ConflictError, NotFoundError, UnavailableError, UsageError
from vtpm.manager.access import Caller
from vtpm.manager.conversations import Conversations
from vtpm.manager.guest_moves import GuestMoves
from vtpm.manager.migrations import MigrationService
from vtpm.manager.peering import Peering
from vtpm.manager.service import ManagerService
from vtpm.migration.mover import Channel
from vtpm.peers.port import listen
from vtpm.vault.records import Event
from vtpm.wire.api_migrations import MigrateVtpm
from vtpm.wire.api_peers import AddPeer
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper_client import KeeperClient


class Keeper:
    """Has the key that a host's channel key is encrypted with."""

    def __init__(self, number: int) -> None:
        self.key = bytes([number]) * 32

    def channel_key(self) -> bytes:
        return self.key


class Manager:
    """Migrations and peers of one host without processes."""

    def __init__(self, folder: Path, name: str, threads: CallThreads) -> None:
        self.host = Host(folder, name)
        self.events: list[Event] = []
        own = folder / f"peers of {name}"
        own.mkdir(mode=0o700)
        self.peering = Peering(own, cast(KeeperClient, Keeper(ord(name))), self._note)
        vtpms = cast(ManagerService, Vtpms(self.host))
        talk = Conversations(self.host.mover, threads)
        guests = GuestMoves(vtpms, talk, self.peering)
        self.migrations = MigrationService(vtpms, talk, guests, self.peering, remind_s=0.05)
        self.listener = _listening()
        self.url = f"https://127.0.0.1:{self.listener.getsockname()[1]}"

    async def _note(self, event: Event) -> None:
        self.events.append(event)

    async def certificate(self) -> str:
        return (await self.peering.certificate(ROOT)).certificate

    async def know(self, other: Manager) -> None:
        await self.peering.add(AddPeer(other.host.name, other.url, await other.certificate()), ROOT)


def _listening() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return listen(f"127.0.0.1:{port}")


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[tuple[Manager, Manager]]:
    threads = CallThreads("mover", 2)
    made = Manager(tmp_path, "a", threads), Manager(tmp_path, "b", threads)
    yield made
    threads._pool.shutdown(wait=True)
    for manager in made:
        manager.host.close()
        manager.listener.close()


@contextlib.asynccontextmanager
async def serving(*managers: Manager) -> AsyncIterator[None]:
    for manager in managers:
        # As the transport will say it: by the keys of the very certificates.
        own = await manager.peering._opened()
        manager.host.channel = Channel(own.public_key, b"")
    tasks = [asyncio.create_task(one.peering.serve(one.listener, one.migrations)) for one in managers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_vtpm_moves_there_and_back_over_tls(managers: tuple[Manager, Manager]) -> None:
    a, b = managers
    record = a.host.manufactured()

    async def there_and_back() -> None:
        await a.know(b)
        await b.know(a)
        async with serving(a, b):
            assert (await a.migrations.migrate("web1", MigrateVtpm("b"), ROOT)).right == "moved"
            assert (await b.migrations.migrate("web1", MigrateVtpm(a.url), ROOT)).right == "moved"

    run(there_and_back())
    assert [manager.host.usable(record.id) for manager in managers] == [True, False]
    assert [event.kind for event in a.events] == ["peer_add_asked", "peer_added"]


def test_vtpm_stays_when_the_peer_does_not_know_this_host_shows_another_certificate_or_is_away(
    managers: tuple[Manager, Manager],
) -> None:
    a, b = managers
    record = a.host.manufactured()

    async def tries() -> None:
        await a.know(b)
        async with serving(b):
            with pytest.raises((AccessDeniedError, UnavailableError)) as refused:
                await a.migrations.migrate("web1", MigrateVtpm("b"), ROOT)
            assert "Add this host there" in refused.value.next_step
            await b.know(a)
            await a.peering.add(AddPeer("b", b.url, await a.certificate()), ROOT)
            with pytest.raises(AccessDeniedError, match="shows another certificate"):
                await a.migrations.migrate("web1", MigrateVtpm("b"), ROOT)
            await a.know(b)
            await b.peering.remove("a", ROOT)
            with pytest.raises((AccessDeniedError, UnavailableError)):
                await a.migrations.migrate("web1", MigrateVtpm("b"), ROOT)
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await a.migrations.migrate("web1", MigrateVtpm("b"), ROOT)

    run(tries())
    assert a.host.usable(record.id)
    assert b.host.kinds() == []


def test_refusal_comes_back_as_what_it_is(managers: tuple[Manager, Manager]) -> None:
    a, b = managers
    record = a.host.manufactured()
    b.host.attester.believes = False

    async def refused() -> None:
        await a.know(b)
        await b.know(a)
        async with serving(b):
            await a.migrations.migrate("web1", MigrateVtpm("b"), ROOT)

    with pytest.raises(Exception, match="not believed") as raised:
        run(refused())
    assert type(raised.value).__name__ == "AttestationError"
    assert a.host.usable(record.id)


def test_peers_are_an_administrators_to_name(managers: tuple[Manager, Manager]) -> None:
    a, _ = managers
    somebody = Caller(1000, 1000, is_admin=False)
    asked: list[Any] = [
        a.peering.certificate(somebody),
        a.peering.list(somebody),
        a.peering.add(AddPeer("b", "https://b:1", ""), somebody),
        a.peering.remove("b", somebody),
    ]
    for one in asked:
        with pytest.raises(AccessDeniedError):
            run(one)
    assert a.events == []


def test_book_is_kept_and_each_change_noted(managers: tuple[Manager, Manager]) -> None:
    a, b = managers

    async def changes() -> None:
        await a.know(b)
        (listed,) = await a.peering.list(ROOT)
        assert (listed.name, listed.url) == ("b", b.url)
        with pytest.raises(ConflictError, match="peer b has that URL"):
            await a.peering.add(AddPeer("c", b.url, await a.certificate()), ROOT)
        for name, url in (("../x", b.url), ("x", "http://b:1"), ("x", "https://b"), ("x", "https://u@b:1/")):
            with pytest.raises(UsageError):
                await a.peering.add(AddPeer(name, url, await b.certificate()), ROOT)
        await a.peering.remove("b", ROOT)
        with pytest.raises(NotFoundError):
            await a.peering.remove("b", ROOT)
        assert await a.peering.list(ROOT) == []

    run(changes())
    kinds = [event.kind for event in a.events]
    assert kinds == [
        *("peer_add_asked", "peer_added", "peer_add_asked", "peer_add_failed"),
        *("peer_remove_asked", "peer_removed", "peer_remove_asked", "peer_remove_failed"),
    ]
