"""Through both ends of the bridge a manager has the launcher and its links as if they were beside it."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.bridge.world import LIMIT_S, Text, attached, received, run, sent, world
from vtpm.bridge import manager_side
from vtpm.errors import UnavailableError
from vtpm.wire.launcher_port import WINDOW_BYTES

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) - before == set()


def test_requests_and_answers_pass_when_they_are_as_large_as_they_may_be() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            texts = [secrets.token_hex(30_000), "short", "x" * 60_000]
            answers = await asyncio.gather(*(client.call("say", Text(text), timeout_s=LIMIT_S) for text in texts))
            assert [answer.text for answer, _ in answers] == texts
            client.close()

    run(test)


def test_links_carry_both_ways_when_several_are_open() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            names = [f"web{number}" for number in range(5)]
            links = {name: await attached(client, name) for name in names}
            payloads = {name: secrets.token_bytes(300_000) for name in names}

            async def both_ways(name: str) -> None:
                instance = made.launcher.instances[name]
                await asyncio.gather(
                    sent(links[name], payloads[name]),
                    sent(instance, payloads[name][::-1]),
                    check(links[name], payloads[name][::-1]),
                    check(instance, payloads[name]),
                )

            async def check(end: socket.socket, wanted: bytes) -> None:
                assert await received(end, len(wanted)) == wanted

            await asyncio.gather(*map(both_ways, names))
            for link in links.values():
                link.close()
            client.close()

    run(test)


def test_event_brings_its_link_when_an_instance_was_replaced() -> None:
    async def test() -> None:
        events: asyncio.Queue[tuple[Any, tuple[int, ...]]] = asyncio.Queue()
        async with world() as made:
            client = await made.manager(lambda _event, args, fds: events.put_nowait((args, fds)))
            await client.call("say", Text("hello"), timeout_s=LIMIT_S)
            made.launcher.server.broadcast_event("replaced", Text("web1"), (made.launcher.parked("web1").fileno(),))
            args, (fd,) = await events.get()
            assert args.text == "web1"
            with socket.socket(fileno=fd) as link:
                link.setblocking(False)
                await sent(made.launcher.instances["web1"], b"ready")
                assert await received(link, 5) == b"ready"
            client.close()

    run(test)


def test_other_links_go_on_when_nobody_reads_one() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            idle, busy = await attached(client, "idle"), await attached(client, "busy")
            flood = asyncio.ensure_future(sent(made.launcher.instances["idle"], bytes(64 * WINDOW_BYTES)))
            for _ in range(50):
                await sent(made.launcher.instances["busy"], b"save")
                assert await received(busy, 4) == b"save"
            # Between the two sockets only so much is on its way; the writer is held up, not the bridge.
            assert not flood.done()
            assert len(await received(idle, 64 * WINDOW_BYTES)) == 64 * WINDOW_BYTES
            await flood
            for link in (idle, busy):
                link.close()
            client.close()

    run(test)


def test_link_ends_after_its_last_bytes_when_the_instance_died() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            link = await attached(client, "web1")
            made.launcher.parked("web1").close()
            await sent(made.launcher.instances["web1"], b"last words")
            made.launcher.end("web1")
            assert await received(link, 100) == b"last words"
            link.close()
            client.close()

    run(test)


def test_next_manager_has_the_same_link_when_one_has_died() -> None:
    async def test() -> None:
        async with world() as made:
            first = await made.manager()
            link = await attached(first, "web1")
            await sent(made.launcher.instances["web1"], b"to the first")
            assert await received(link, 12) == b"to the first"
            first.close()
            link.close()
            second = await made.manager()
            again = await attached(second, "web1")
            await sent(again, b"hello")
            assert await received(made.launcher.instances["web1"], 5) == b"hello"
            await sent(made.launcher.instances["web1"], b"to the second")
            assert await received(again, 13) == b"to the second"
            again.close()
            second.close()

    run(test)


def test_manager_that_comes_while_another_is_there_is_let_in_when_that_has_gone() -> None:
    async def test() -> None:
        async with world() as made:
            first = await made.manager()
            await first.call("say", Text("first"), timeout_s=LIMIT_S)
            second = await made.manager()
            asked = asyncio.ensure_future(second.call("say", Text("second"), timeout_s=LIMIT_S))
            await first.call("say", Text("still first"), timeout_s=LIMIT_S)
            assert not asked.done()
            first.close()
            assert (await asked)[0].text == "second"
            second.close()

    run(test)


def test_manager_sees_the_launcher_go_and_come_when_it_restarts() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            link = await attached(client, "web1")
            await made.launcher.stop()
            await client.closed
            assert await received(link, 1) == b""
            link.close()
            with pytest.raises(UnavailableError):
                await client.connect(LIMIT_S)
            made.launcher.start()
            client = await made.manager()
            assert (await client.call("say", Text("back"), timeout_s=LIMIT_S))[0].text == "back"
            client.close()

    run(test)


def test_waiting_managers_are_refused_when_the_launcher_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_side, "PATIENCE_S", 0.05)

    async def test() -> None:
        async with world() as made:
            first = await made.manager()
            await first.call("say", Text("first"), timeout_s=LIMIT_S)
            waiting = await made.manager()
            first.close()
            await made.launcher.stop()
            await waiting.closed
            with pytest.raises(UnavailableError, match="Connection refused"):
                await waiting.connect(LIMIT_S)

    run(test)


def test_user_who_may_not_use_the_launcher_is_refused_when_it_connects() -> None:
    async def test() -> None:
        async with world() as made:
            made.allows = False
            client = await made.manager()
            assert await client.closed == "the other side closed it"
            made.allows = True
            client = await made.manager()
            await client.call("say", Text("hello"), timeout_s=LIMIT_S)
            client.close()

    run(test)


def test_session_begins_anew_when_the_managers_machine_was_reset() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            link = await attached(client, "web1")
            # The port stays open on the host, and what the machine was writing is cut off.
            await made.end("manager")
            link.close()
            os.write(made.ends[-1].fileno(), b"\xc0half a frame")
            made.begin_manager_side(made.ends.pop())
            client = await made.manager()
            link = await attached(client, "web1")
            await sent(link, b"hello again")
            assert await received(made.launcher.instances["web1"], 11) == b"hello again"
            link.close()
            client.close()

    run(test)


def test_session_begins_anew_when_the_bridge_on_the_host_was_restarted() -> None:
    async def test() -> None:
        async with world() as made:
            client = await made.manager()
            link = await attached(client, "web1")
            # The launcher, and with it the instance, lives on.
            await made.end("launcher")
            await client.closed
            link.close()
            await made.end("manager")
            made.connect_port()
            client = await made.manager()
            link = await attached(client, "web1")
            await sent(made.launcher.instances["web1"], b"here still")
            assert await received(link, 10) == b"here still"
            link.close()
            client.close()

    run(test)
