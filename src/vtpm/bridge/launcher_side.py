"""The bridge's end beside the launcher: to the launcher it is the manager. Under asyncio.

One machine at a time has the port. Each of its sessions has a connection to the launcher of its own, so that no answer
to one manager comes to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable

from vtpm.bridge.links import Links
from vtpm.bridge.port import Port
from vtpm.errors import AccessDeniedError, ProtocolError, UnavailableError
from vtpm.wire.launcher_port import Close, Data, Direction, Ended, Hello, Message, Packet, Ready, Taken
from vtpm.wire.packet_stream import PacketStream

RETRY_S = 0.5
_log = logging.getLogger("vtpm.bridge")


class LauncherSide:
    """One connection of the manager's machine, from the first byte to the last.

    Args:
        machine: the port's end on the host, a stream socket; this object's from now on.
        connect: makes a connection to the launcher; raises UnavailableError while there is none, and
            AccessDeniedError while this user may not use it.
    """

    def __init__(self, machine: socket.socket, connect: Callable[[], Awaitable[socket.socket]]) -> None:
        self._machine = machine
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._opening: asyncio.Task[None] | None = None
        self._launcher: PacketStream | None = None
        self._port = Port(
            machine.fileno(), Direction.TO_MANAGER, self._on_message, self._on_damage, self._on_room, self._on_gone
        )
        self._links = Links(self._port.send, lambda: self._port.congested)

    async def run(self) -> None:
        """Serve until the machine has closed the port."""
        try:
            # Whoever is there already begins anew.
            self._port.send(Ended())
            await self._gone
        finally:
            self._drop()
            self._port.close()
            self._machine.close()

    # -- sessions ---------------------------------------------------------------------------------------------------
    def _drop(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        self._links.close()
        self._links = Links(self._port.send, lambda: self._port.congested)
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close("the manager is connected no more")

    def _end_session(self, why: str) -> None:
        _log.error("the session is over: %s", why)
        self._drop()
        self._port.send(Ended())

    async def _open(self, session: bytes) -> None:
        said = False
        while True:
            try:
                connection = await self._connect()
                break
            except (UnavailableError, AccessDeniedError) as error:
                if not said:
                    _log.warning("the manager waits: %s", error.message)
                said = True
                await asyncio.sleep(RETRY_S)
        self._opening = None
        self._launcher = PacketStream(connection, self._take_packet, self._on_launcher_gone)
        _log.info("the manager is connected")
        self._port.send(Ready(session))

    def _on_gone(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)

    def _on_damage(self, why: str) -> None:
        # Outside a session this is what a former one left.
        if self._launcher is not None:
            self._end_session(why)

    def _on_launcher_gone(self, reason: str) -> None:
        if self._launcher is not None:
            self._launcher = None
            self._end_session(f"the launcher is gone: {reason}")

    def _on_message(self, message: Message) -> None:
        try:
            match message:
                case Hello(session=session):
                    self._drop()
                    self._opening = self._loop.create_task(self._open(session))
                case Packet(links=links, first=first, data=data) if self._launcher is not None:
                    if links or first:
                        raise ProtocolError("a manager's packet has links")
                    self._launcher.send(data)
                case Data() | Taken() | Close() if self._launcher is not None:
                    self._links.follow(message)
        except ProtocolError as error:
            self._on_damage(error.message)

    # -- the launcher -----------------------------------------------------------------------------------------------
    def _take_packet(self, data: bytes, fds: tuple[int, ...]) -> None:
        with contextlib.ExitStack() as ends:
            opened = [ends.enter_context(socket.socket(fileno=fd)) for fd in fds]
            self._port.send(Packet(self._links.following if opened else 0, len(opened), data))
            try:
                for end in opened:
                    self._links.open(end)
            except ProtocolError as error:
                self._end_session(error.message)
                return
            ends.pop_all()
        if self._port.congested and self._launcher is not None:
            self._launcher.pause()

    def _on_room(self) -> None:
        if self._launcher is not None:
            self._launcher.resume()
        self._links.resume()
