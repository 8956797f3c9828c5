"""Each end of the bridge survives another end that breaks the rules, and a session with one that keeps them follows."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bridge.world import LIMIT_S, STAND_IN, Text, readable, received, run, sent, world
from vtpm.bridge import launcher_side
from vtpm.bridge import port as bridge_port
from vtpm.bridge.launcher_side import LauncherSide
from vtpm.bridge.links import MAX_LINKS, Links
from vtpm.bridge.manager_side import ManagerSide
from vtpm.bridge.port import connected
from vtpm.errors import AccessDeniedError, ProtocolError, UnavailableError, VtpmError
from vtpm.wire import service
from vtpm.wire.framing import BadFrame, encode_frame
from vtpm.wire.launcher_port import (
    CHUNK_BYTES,
    MAX_BODY_BYTES,
    Close,
    Data,
    Direction,
    Ended,
    Hello,
    Message,
    Packet,
    Ready,
    Taken,
    decode_message,
    encode_message,
)
from vtpm.wire.packet_stream import connect_service
from vtpm.wire.port_stream import PortStream
from vtpm.wire.unix_socket import bind_unix_socket

pytestmark = pytest.mark.timeout(30)
SESSION = bytes(8)


class Peer:
    """The other end, by hand."""

    def __init__(self, end: socket.socket, sends: Direction) -> None:
        self.end = end
        self._stream = PortStream(end.fileno(), MAX_BODY_BYTES)
        self._sends = sends
        (self._takes,) = set(Direction) - {sends}
        self._came: list[Message] = []

    async def send(self, *messages: Message) -> None:
        for message in messages:
            await sent(self.end, encode_frame(encode_message(message, self._sends)))

    async def next(self) -> Message:
        """The next message; every frame must be one."""
        while not self._came:
            await readable(self.end)
            bodies = self._stream.receive()
            assert bodies is not None, "the other end has closed the port"
            for body in bodies:
                assert not isinstance(body, BadFrame)
                self._came.append(decode_message(body, self._takes))
        return self._came.pop(0)


@contextlib.asynccontextmanager
async def machine_by_hand() -> AsyncIterator[tuple[Peer, Any, asyncio.Task[None]]]:
    """A launcher's side in a session with a machine that is played by hand."""
    async with world() as made:

        async def connect() -> socket.socket:
            return connect_service(STAND_IN, made.host / "launcher.sock", LIMIT_S)

        ours, theirs = socket.socketpair()
        side = asyncio.ensure_future(LauncherSide(theirs, connect).run())
        peer = Peer(ours, Direction.TO_LAUNCHER)
        assert await peer.next() == Ended()
        await peer.send(Hello(SESSION))
        assert await peer.next() == Ready(SESSION)
        try:
            yield peer, made, side
        finally:
            ours.close()
            await side


@contextlib.asynccontextmanager
async def host_by_hand() -> AsyncIterator[tuple[Peer, Any]]:
    """A manager's side before its session with a host that is played by hand, and its launcher's socket."""
    with tempfile.TemporaryDirectory(prefix="vt-") as folder:
        place = Path(folder) / "launcher.sock"
        ours, theirs = socket.socketpair()
        with ours, theirs:
            side = ManagerSide(
                theirs.fileno(),
                lambda: bind_unix_socket(place, socket.SOCK_SEQPACKET, mode=0o600),
                lambda _uid: True,
            )
            task = asyncio.ensure_future(side.run())
            try:
                yield Peer(ours, Direction.TO_MANAGER), lambda: connect_service(STAND_IN, place, LIMIT_S)
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


def _request(op: str, text: str) -> bytes:
    return service.encode_request(STAND_IN, 1, op, Text(text))


async def _attach(peer: Peer, name: str) -> int:
    await peer.send(Packet(0, 0, _request("attach", name)))
    answer = await peer.next()
    assert isinstance(answer, Packet)
    assert answer.links == 1
    return answer.first


@pytest.mark.parametrize(
    "bad",
    [
        encode_frame(b"nonsense"),
        encode_frame(encode_message(Close(1), Direction.TO_LAUNCHER))[:-3] + b"\xc0",
        encode_frame(encode_message(Ended(), Direction.TO_MANAGER)),
        encode_frame(encode_message(Packet(1, 1, _request("say", "hello")), Direction.TO_LAUNCHER)),
        encode_frame(encode_message(Data(7, b"x"), Direction.TO_LAUNCHER)),
        encode_frame(encode_message(Taken(1, 1), Direction.TO_LAUNCHER)),
    ],
    ids=["nonsense", "damaged", "direction", "links", "no link", "not sent"],
)
def test_session_is_over_and_another_begins_when_the_machine_breaks_the_rules(bad: bytes) -> None:
    async def test() -> None:
        async with machine_by_hand() as (peer, _, _):
            assert await _attach(peer, "web1") == 1
            await sent(peer.end, bad)
            assert await peer.next() == Ended()
            await peer.send(Hello(SESSION))
            assert await peer.next() == Ready(SESSION)
            assert await _attach(peer, "web1") == 1

    run(test)


def test_session_is_over_when_the_machine_sends_more_on_a_link_than_may_wait() -> None:
    async def test() -> None:
        async with machine_by_hand() as (peer, made, _):
            link = await _attach(peer, "web1")
            # Nobody reads it, so once the socket is full nothing is taken.
            for _ in range(200):
                await peer.send(Data(link, bytes(CHUNK_BYTES)))
            while isinstance(message := await peer.next(), Taken):
                pass
            assert message == Ended()
            assert made.launcher.instances["web1"].fileno() >= 0

    run(test)


def test_launchers_side_lets_the_machine_go_when_it_sends_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_port, "MAX_WAITING_BYTES", 10_000)

    async def test() -> None:
        async with machine_by_hand() as (peer, _, side):
            try:
                while not side.done():
                    await peer.send(Hello(SESSION))
                    await asyncio.sleep(0)
            except OSError:
                await side

    run(test)


def test_launcher_is_tried_again_when_it_was_not_there_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_side, "RETRY_S", 0.01)
    failures: list[VtpmError] = [UnavailableError("not there"), AccessDeniedError("not for you")]

    async def test() -> None:
        async with world() as made:

            async def connect() -> socket.socket:
                if failures:
                    raise failures.pop()
                return connect_service(STAND_IN, made.host / "launcher.sock", LIMIT_S)

            ours, theirs = socket.socketpair()
            side = asyncio.ensure_future(LauncherSide(theirs, connect).run())
            with ours:
                peer = Peer(ours, Direction.TO_LAUNCHER)
                await peer.send(Hello(SESSION))
                assert [await peer.next(), await peer.next()] == [Ended(), Ready(SESSION)]
                assert not failures
            await side

    run(test)


def test_session_is_over_when_a_client_cannot_be_accepted() -> None:
    async def test() -> None:
        async with host_by_hand() as (peer, connect):
            hello = await peer.next()
            assert isinstance(hello, Hello)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            await peer.send(Ready(hello.session))
            waiting = await _until_let_in(connect)
            with waiting:
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
                try:
                    assert isinstance(await peer.next(), Hello)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    run(test)


def test_managers_side_ends_when_it_cannot_make_the_launchers_socket() -> None:
    def listen() -> socket.socket:
        raise UnavailableError("the socket cannot be made: no space left")

    async def test() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            side = asyncio.ensure_future(ManagerSide(theirs.fileno(), listen, lambda _uid: True).run())
            peer = Peer(ours, Direction.TO_MANAGER)
            hello = await peer.next()
            assert isinstance(hello, Hello)
            await peer.send(Ready(hello.session))
            with pytest.raises(UnavailableError, match="no space left"):
                await side

    run(test)


def test_messages_of_an_earlier_session_are_dropped_when_a_machine_has_begun_anew() -> None:
    async def test() -> None:
        async with host_by_hand() as (peer, _):
            first = await peer.next()
            assert isinstance(first, Hello)
            # In a session, each of the links would be answered by Close.
            await peer.send(Packet(1, 1, b"{}"), Data(1, b"x"), Ready(bytes(8)), Packet(1, 2, b"{}"), Ended())
            second = await peer.next()
            assert isinstance(second, Hello)
            assert second.session != first.session

    run(test)


@pytest.mark.parametrize(
    "bad",
    [Packet(2, 1, b"{}"), Packet(1, 0, b"{}"), Data(1, b"x"), Close(1), Ready(bytes(8))],
    ids=["number", "number of none", "data", "close", "ready"],
)
def test_client_is_let_go_when_the_host_breaks_the_rules(bad: Message) -> None:
    async def test() -> None:
        async with host_by_hand() as (peer, connect):
            hello = await peer.next()
            assert isinstance(hello, Hello)
            await peer.send(Ready(hello.session))
            client = await _until_let_in(connect)
            with client:
                client.setblocking(False)
                await sent(client, b"{}")
                assert await peer.next() == Packet(0, 0, b"{}")
                await peer.send(bad)
                if isinstance(bad, Ready):
                    # Of another session; it counts for nothing.
                    await sent(client, b"{}")
                    assert await peer.next() == Packet(0, 0, b"{}")
                    return
                assert await received(client, 1) == b""
            assert isinstance(await peer.next(), Hello)

    run(test)


async def _until_let_in(connect: Any) -> socket.socket:
    while True:
        with contextlib.suppress(Exception):
            made: socket.socket = connect()
            return made
        await asyncio.sleep(0.01)


def test_links_of_an_event_are_closed_when_no_manager_is_there_to_take_them() -> None:
    async def test() -> None:
        async with host_by_hand() as (peer, _):
            hello = await peer.next()
            assert isinstance(hello, Hello)
            await peer.send(Ready(hello.session), Packet(1, 2, b"{}"))
            assert [await peer.next(), await peer.next()] == [Close(1), Close(2)]

    run(test)


def test_link_is_refused_when_as_many_as_there_may_be_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtpm.bridge.links.MAX_LINKS", 2)

    async def test() -> None:
        links = Links(lambda _message: None, lambda: False)
        pairs = [socket.socketpair() for _ in range(3)]
        for ours, _ in pairs[:2]:
            links.open(ours)
        with pytest.raises(ProtocolError, match="2 manager links are open"):
            links.open(pairs[2][0])
        assert len(links) == 2
        links.close()
        assert len(links) == 0
        for ours, theirs in pairs:
            assert ours.fileno() == -1
            theirs.close()

    run(test)
    assert MAX_LINKS > 1500


def test_each_link_has_its_turn_when_some_of_them_fill_the_port_again_and_again() -> None:
    async def test() -> None:
        came: list[Message] = []
        turns: set[int] = set()
        links = Links(came.append, lambda: len(came) >= 2)
        pairs = [socket.socketpair() for _ in range(6)]
        for ours, theirs in pairs:
            theirs.setblocking(False)
            theirs.send(bytes(4 * CHUNK_BYTES))
            links.open(ours)
        for _ in range(len(pairs) // 2):
            while len(came) < 2:
                await asyncio.sleep(0)
            # A round more, as a port takes to have room, in which all see that there is none.
            await asyncio.sleep(0)
            turns.update(message.link for message in came if isinstance(message, Data))
            came.clear()
            links.resume()
        links.close()
        assert len(turns) == len(pairs)
        for _, theirs in pairs:
            theirs.close()

    run(test)


def test_port_is_waited_for_when_the_hosts_end_is_not_open() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with ours:
            theirs.close()
            waiting = asyncio.ensure_future(connected(ours.fileno()))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await connected(ours.fileno())

    run(test)
