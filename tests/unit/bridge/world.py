"""Both ends of a bridge in one loop, between a stand-in for the launcher and clients like a manager."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vtpm.bridge.launcher_side import LauncherSide
from vtpm.bridge.manager_side import ManagerSide
from vtpm.errors import UnavailableError
from vtpm.wire.packet_socket import AsyncPacketClient, AsyncPacketServer, Peer, ServiceLock, close_fds
from vtpm.wire.packet_stream import connect_service
from vtpm.wire.service import Interface, MaxLength, Operation
from vtpm.wire.unix_socket import bind_unix_socket

LIMIT_S = 5.0


@dataclass(frozen=True)
class Text:
    text: Annotated[str, MaxLength(60_000)]


STAND_IN = Interface("vtpm-test", {"attach": Operation(Text, Text), "say": Operation(Text, Text)}, {"replaced": Text})


class StandIn:
    """A launcher with instances by name, whose ends the tests have; and `say`, which gives the text back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instances: dict[str, socket.socket] = {}
        self._parked: dict[str, socket.socket] = {}
        self._lock: ServiceLock | None = None
        self.server = AsyncPacketServer(STAND_IN, self._handle, lambda _uid: True)

    def start(self) -> None:
        self._lock = ServiceLock(self.folder, "launcher")
        self.server = AsyncPacketServer(STAND_IN, self._handle, lambda _uid: True)
        self.server.serve(self._lock.bind_service_socket(self.folder / "launcher.sock", 0o600))

    async def stop(self) -> None:
        """End, with all instances."""
        await self.server.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        for end in (*self.instances.values(), *self._parked.values()):
            end.close()
        self.instances.clear()
        self._parked.clear()

    def end(self, name: str) -> None:
        """Have an instance die."""
        self.instances[name].close()

    async def _handle(self, op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, Sequence[int]]:
        close_fds(fds)
        return args, (self.parked(args.text).fileno(),) if op == "attach" else ()

    def parked(self, name: str) -> socket.socket:
        """The launcher's end of an instance's manager link, which it makes at the first time."""
        if name not in self._parked:
            self._parked[name], instance = socket.socketpair()
            instance.setblocking(False)
            self.instances[name] = instance
        return self._parked[name]


class World:
    """A stand-in and both ends of the bridge; each end can be ended and begun alone."""

    def __init__(self, folder: Path) -> None:
        self.host, self.machine = folder / "host", folder / "machine"
        self.host.mkdir()
        self.machine.mkdir()
        self.launcher = StandIn(self.host)
        self.allows = True
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.ends: list[socket.socket] = []

    def connect_port(self) -> None:
        """Begin both ends, at either side of a new port."""
        ours, theirs = socket.socketpair()
        self.begin_launcher_side(ours)
        self.begin_manager_side(theirs)

    def begin_launcher_side(self, end: socket.socket) -> None:
        async def connect() -> socket.socket:
            return connect_service(STAND_IN, self.host / "launcher.sock", LIMIT_S)

        self._tasks["launcher"] = asyncio.ensure_future(LauncherSide(end, connect).run())

    def begin_manager_side(self, end: socket.socket) -> None:
        self.ends.append(end)

        def listen() -> socket.socket:
            return bind_unix_socket(self.machine / "launcher.sock", socket.SOCK_SEQPACKET, mode=0o600)

        side = ManagerSide(end.fileno(), listen, lambda _uid: self.allows)
        self._tasks["manager"] = asyncio.ensure_future(side.run())

    async def end(self, side: str) -> None:
        """End one side, as a signal does."""
        task = self._tasks.pop(side)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def manager(self, on_event: Any = None) -> AsyncPacketClient:
        """Connect as a manager does, until it is let in."""
        while True:
            client = AsyncPacketClient(STAND_IN, self.machine / "launcher.sock", on_event)
            with contextlib.suppress(UnavailableError):
                await client.connect(LIMIT_S)
                return client
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        for side in tuple(self._tasks):
            await self.end(side)
        for end in self.ends:
            end.close()
        await self.launcher.stop()


@contextlib.asynccontextmanager
async def world(*, launcher: bool = True) -> AsyncIterator[World]:
    """A world whose port is connected."""
    with tempfile.TemporaryDirectory(prefix="vt-") as folder:
        made = World(Path(folder))
        try:
            if launcher:
                made.launcher.start()
            made.connect_port()
            yield made
        finally:
            await made.close()


async def attached(client: AsyncPacketClient, name: str) -> socket.socket:
    """The manager's end of an instance's link."""
    _, (fd,) = await client.call("attach", Text(name), timeout_s=LIMIT_S)
    link = socket.socket(fileno=fd)
    link.setblocking(False)
    return link


async def readable(end: socket.socket) -> None:
    """Wait until something has come."""
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(end, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(end)


async def received(end: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer at the end of the stream."""
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count and (more := await loop.sock_recv(end, count - len(data))):
        data += more
    return data


async def sent(end: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(end, data)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(limited())
