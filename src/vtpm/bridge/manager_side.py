"""The bridge's end in the manager's machine: to the manager it is the launcher. Under asyncio.

One client at a time, and one session on the port for each: a manager that died leaves nothing in the way of the next.
While no launcher is connected at the other end, nobody listens here, as where a launcher is not running.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from contextlib import ExitStack

from vtpm.bridge.links import Links
from vtpm.bridge.port import Port, connected
from vtpm.errors import ProtocolError, VtpmError
from vtpm.wire.launcher_port import SESSION_BYTES, Close, Data, Direction, Ended, Hello, Message, Packet, Ready, Taken
from vtpm.wire.packet_stream import PacketStream, close_fds, peer_of

PATIENCE_S = 2.0
"""How long clients wait while the other end connects to the launcher; then they are refused."""
_log = logging.getLogger("vtpm.bridge")


class ManagerSide:
    """See the module.

    Args:
        port_fd: the virtio-serial port; stays the caller's.
        listen: makes the launcher's socket, listening, in place of one that was closed.
        allows: says whether a uid may be its client.
    """

    def __init__(self, port_fd: int, listen: Callable[[], socket.socket], allows: Callable[[int], bool]) -> None:
        self._port_fd = port_fd
        self._listen = listen
        self._allows = allows
        self._loop = asyncio.get_running_loop()
        self._port: Port | None = None
        self._hung_up = asyncio.Event()
        self._failure: VtpmError | None = None
        self._session = b""
        self._is_ready = False
        self._listener: socket.socket | None = None
        self._refusing: asyncio.TimerHandle | None = None
        self._client: PacketStream | None = None
        self._links = Links(self._send, self._is_congested)

    async def run(self) -> None:
        """Serve until it is cancelled. Raises VtpmError: the launcher's socket cannot be made."""
        try:
            while True:
                await connected(self._port_fd)
                self._hung_up.clear()
                self._port = Port(
                    self._port_fd,
                    Direction.TO_LAUNCHER,
                    self._on_message,
                    self._on_damage,
                    self._on_room,
                    self._on_gone,
                )
                self._begin()
                await self._hung_up.wait()
                if self._failure is not None:
                    raise self._failure
        finally:
            self._stop()
            if self._port is not None:
                self._port.close()

    # -- sessions ---------------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        """Ask for a session, in place of whatever there was."""
        self._drop()
        self._session = secrets.token_bytes(SESSION_BYTES)
        self._send(Hello(self._session))
        self._refusing = self._loop.call_later(PATIENCE_S, self._lose_patience)

    def _drop(self) -> None:
        """Let go of client and links. Who waits to be the next client goes on waiting."""
        self._is_ready = False
        if self._refusing is not None:
            self._refusing.cancel()
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
        self._links.close()
        self._links = Links(self._send, self._is_congested)
        client, self._client = self._client, None
        if client is not None:
            client.close("the launcher is connected no more")

    def _lose_patience(self) -> None:
        _log.warning("there is no launcher at the other end of the port")
        self._refuse()

    def _refuse(self) -> None:
        """Have clients refused: there is no launcher."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _stop(self) -> None:
        self._drop()
        self._refuse()

    def _on_gone(self) -> None:
        self._stop()
        self._port = None
        self._hung_up.set()

    def _on_damage(self, why: str) -> None:
        # Before a session begins this is what a former one left.
        if self._is_ready:
            _log.error("the session is over: %s", why)
            self._begin()

    def _on_message(self, message: Message) -> None:
        try:
            match message:
                case Ready(session=session):
                    if session == self._session and not self._is_ready:
                        self._serve()
                case Ended():
                    if self._is_ready:
                        self._stop()
                    self._begin()
                case Packet() if self._is_ready:
                    self._take_packet(message)
                case Data() | Taken() | Close() if self._is_ready:
                    self._links.follow(message)
        except ProtocolError as error:
            self._on_damage(error.message)
        except VtpmError as error:
            self._failure = error
            self._hung_up.set()

    def _serve(self) -> None:
        self._is_ready = True
        if self._refusing is not None:
            self._refusing.cancel()
        if self._listener is None:
            self._listener = self._listen()
            self._listener.setblocking(False)
            _log.info("the launcher is connected")
        self._loop.add_reader(self._listener, self._accept, self._listener)

    # -- the client -------------------------------------------------------------------------------------------------
    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors: those of this session's links are let go.
            self._on_damage(f"a client cannot be accepted: {error.strerror}")
            return
        uid = peer_of(connection).uid
        if not self._allows(uid):
            _log.warning("uid %d may not use the launcher", uid)
            connection.close()
            return
        # The next one waits for a session of its own.
        self._loop.remove_reader(listener)
        client = PacketStream(connection, self._take_request, self._on_client_gone)
        self._client = client

    def _take_request(self, data: bytes, fds: tuple[int, ...]) -> None:
        # The launcher takes no descriptors.
        close_fds(fds)
        self._send(Packet(0, 0, data))
        if self._is_congested() and self._client is not None:
            self._client.pause()

    def _on_client_gone(self, reason: str) -> None:
        if self._client is not None:
            self._client = None
            self._begin()

    def _take_packet(self, packet: Packet) -> None:
        if packet.first != (self._links.following if packet.links else 0):
            raise ProtocolError(f"links from {packet.first} on, where {self._links.following} follows")
        if self._client is None:
            # An event before the client has come, which asks for all when it does.
            self._links.skip(packet.links)
            return
        with ExitStack() as theirs:
            fds = []
            for _ in range(packet.links):
                try:
                    our_end, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                except OSError as error:
                    raise ProtocolError(f"a manager link cannot be made: {error.strerror}") from error
                fds.append(theirs.enter_context(their_end).fileno())
                self._links.open(our_end)
            self._client.send(packet.data, fds)

    # -- the port ---------------------------------------------------------------------------------------------------
    def _send(self, message: Message) -> None:
        if self._port is not None:
            self._port.send(message)

    def _is_congested(self) -> bool:
        return self._port is not None and self._port.congested

    def _on_room(self) -> None:
        if self._client is not None:
            self._client.resume()
        self._links.resume()
