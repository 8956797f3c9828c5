"""Carries the messages of `service` over SOCK_SEQPACKET unix sockets, descriptors beside them; no meaning of its own.

A blocking client, and for asyncio a server and a client. May be imported by host services and their clients.

Who owns a descriptor: what is passed to `call`, returned by a handler or broadcast stays the caller's and is sent
as a duplicate; what is received belongs to whoever it is handed to (handler, caller of `call`, on_event). All others
are closed.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from vtpm.errors import ProtocolError, VtpmError
from vtpm.wire import service
from vtpm.wire.packet_stream import (
    MAX_FDS,
    PacketStream,
    Peer,
    check_fds,
    close_fds,
    connect_service,
    is_alive,
    peer_of,
    receive_packet,
    send_packet,
    unavailable,
)
from vtpm.wire.service import Interface, Reply, Request, RequestError
from vtpm.wire.service_lock import ServiceLock

__all__ = [
    "MAX_FDS",
    "AsyncPacketClient",
    "AsyncPacketServer",
    "Handler",
    "PacketClient",
    "Peer",
    "ServiceLock",
    "close_fds",
]

MAX_CLIENTS = 64
MAX_OUTSTANDING = 64
"""Bound on the requests of one client that are being worked on."""

_ACCEPT_PAUSE_S = 1.0
_log = logging.getLogger(__name__)

Handler = Callable[[str, Any, tuple[int, ...], Peer], Awaitable[tuple[Any, Sequence[int]]]]
"""Takes an operation, its arguments, descriptors (now the handler's) and the peer; returns result and descriptors."""

OnEvent = Callable[[str, Any, tuple[int, ...]], None]
"""Takes an event, its arguments and descriptors (now its own); must not block."""


class PacketClient:
    """Blocking client; calls of several threads go one after the other.

    Args:
        interface: the service's.
        path: its socket.
    """

    def __init__(self, interface: Interface, path: Path) -> None:
        self._interface = interface
        self._path = path
        self._connection: socket.socket | None = None
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def connect(self, timeout_s: float) -> None:
        """Connect now rather than at the first call, in place of a connection that there was.

        Raises:
            UnavailableError: nobody answers. AccessDeniedError: the socket's mode forbids it.
        """
        self.close()
        self._connection = connect_service(self._interface, self._path, timeout_s)

    def close(self) -> None:
        """Close the connection; the next call makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, op: str, args: object, *, fds: Sequence[int] = (), timeout_s: float) -> tuple[Any, tuple[int, ...]]:
        """Run one operation; connects when there is no connection or the last one broke.

        Args:
            op: operation's name.
            args: of the operation's class.
            fds: descriptors to send duplicates of, at most MAX_FDS.
            timeout_s: limit of the whole call.
        Returns:
            Result of the operation's class, and descriptors that are now the caller's.
        Raises:
            UnavailableError: the service is absent, went away or took too long; whether it did the work is not known.
            ProtocolError: the arguments or the answer are malformed.
            VtpmError: what the service answered, as the class that its code names.
        """
        request_id = next(self._ids)
        packet = service.encode_request(self._interface, request_id, op, args)
        check_fds(fds)
        with self._lock:
            deadline = time.monotonic() + timeout_s
            try:
                reply, received = self._exchange(packet, request_id, fds, deadline)
            except TimeoutError:
                self.close()
                raise unavailable(self._interface, f"did not answer {op!r} within {timeout_s:g} s") from None
            except OSError as error:
                self.close()
                raise unavailable(self._interface, f"went away during {op!r}: {error.strerror or error}") from error
            except VtpmError:
                self.close()
                raise
        return _result(self._interface, op, reply, received)

    def _exchange(
        self, packet: bytes, request_id: int, fds: Sequence[int], deadline: float
    ) -> tuple[Reply, tuple[int, ...]]:
        if self._connection is not None and not is_alive(self._connection):
            self.close()
        if self._connection is None:
            self.connect(deadline - time.monotonic())
        connection = self._connection
        assert connection is not None  # noqa: S101 - connect raises or sets it
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        send_packet(connection, packet, fds)
        while True:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            answer, received = receive_packet(connection)
            if not answer:
                raise ConnectionResetError(0, "it closed the connection")
            try:
                message = service.decode_from_service(self._interface, answer)
                if isinstance(message, Reply):
                    if message.id != request_id:
                        raise ProtocolError(f"{self._interface.name} answered a request that was not made")
                    return message, received
            except ProtocolError:
                close_fds(received)
                raise
            # Whoever wants events uses the asyncio client.
            close_fds(received)


def _result(interface: Interface, op: str, reply: Reply, fds: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    try:
        if reply.error is not None:
            raise reply.error
        return service.decode_result(interface, op, reply.ok), fds
    except VtpmError:
        close_fds(fds)
        raise


class AsyncPacketServer:
    """Serves an interface to several clients under asyncio; requests of one client are worked on concurrently.

    Args:
        interface: what is served.
        handle: see Handler; a VtpmError that it raises is the reply. It goes on when its client goes away.
        allows: says whether a uid may connect.
        max_clients: further ones are refused.
        max_outstanding: bound on one client's unfinished requests; it then waits in its send.
    """

    def __init__(
        self,
        interface: Interface,
        handle: Handler,
        allows: Callable[[int], bool],
        *,
        max_clients: int = MAX_CLIENTS,
        max_outstanding: int = MAX_OUTSTANDING,
    ) -> None:
        self._interface = interface
        self._handle = handle
        self._allows = allows
        self._max_clients = max_clients
        self._max_outstanding = max_outstanding
        self._listener: socket.socket | None = None
        self._clients: set[PacketStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, listener: socket.socket) -> None:
        """Accept clients from now on, in the running loop; the listener becomes the server's."""
        listener.setblocking(False)
        self._listener = listener
        self._listen()

    def broadcast_event(self, event: str, args: object, fds: Sequence[int] = ()) -> None:
        """Send an event to every client that is connected; one that reads nothing is cut off.

        Raises:
            ProtocolError: the arguments are not as declared, or there are too many descriptors.
        """
        packet = service.encode_event(self._interface, event, args)
        check_fds(fds)
        for stream in tuple(self._clients):
            stream.send(packet, fds)

    async def close(self) -> None:
        """Stop listening, cut the clients off, cancel what is being worked on."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for stream in tuple(self._clients):
            stream.close("the service ends")
        # One turn of the loop, in which each task begins: from then on a handler has the descriptors.
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the listener stays readable, so it is looked at again only after a while.
            _log.error("%s cannot accept a client: %s", self._interface.name, error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_PAUSE_S, self._listen)
            return
        peer = peer_of(connection)
        if not self._allows(peer.uid):
            refusal = f"uid {peer.uid} may not use it"
        elif len(self._clients) >= self._max_clients:
            refusal = f"it has {self._max_clients} clients"
        else:
            self._welcome(connection, peer)
            return
        _log.warning("%s refuses pid %d: %s", self._interface.name, peer.pid, refusal)
        connection.close()

    def _welcome(self, connection: socket.socket, peer: Peer) -> None:
        outstanding = 0

        def take(packet: bytes, fds: tuple[int, ...]) -> None:
            nonlocal outstanding
            request = self._decoded(stream, packet, peer)
            if request is None:
                close_fds(fds)
                return
            task = asyncio.get_running_loop().create_task(self._work(stream, request, fds, peer))
            self._tasks.add(task)
            task.add_done_callback(functools.partial(done, request))
            outstanding += 1
            if outstanding >= self._max_outstanding:
                stream.pause()

        def done(request: Request, task: asyncio.Task[None]) -> None:
            nonlocal outstanding
            self._tasks.discard(task)
            outstanding -= 1
            stream.resume()
            failure = None if task.cancelled() else task.exception()
            if failure is not None:
                stream.send(service.encode_error(request.id, self._defect(request.op, failure)))

        def end(reason: str) -> None:
            _log.info("%s: client pid %d is gone: %s", self._interface.name, peer.pid, reason)
            self._clients.discard(stream)

        stream = PacketStream(connection, take, end)
        self._clients.add(stream)

    def _decoded(self, stream: PacketStream, packet: bytes, peer: Peer) -> Request | None:
        try:
            return service.decode_request(self._interface, packet)
        except RequestError as error:
            _log.warning("%s: malformed request of pid %d: %s", self._interface.name, peer.pid, error.message)
            if error.request_id is None:
                stream.close("it sent a packet that is no request")
            else:
                stream.send(service.encode_error(error.request_id, error))
            return None

    async def _work(self, stream: PacketStream, request: Request, fds: tuple[int, ...], peer: Peer) -> None:
        try:
            # Awaited here and not as a task of its own: between the handler's return and the sending no other code
            # may run that closes a descriptor, whose number something else could then have.
            result, sent = await self._handle(request.op, request.args, fds, peer)
            answer = service.encode_result(self._interface, request.id, request.op, result)
            check_fds(sent)
        except VtpmError as error:
            _log.info("%s: %r of pid %d failed: %s", self._interface.name, request.op, peer.pid, error.code)
            answer, sent = service.encode_error(request.id, error), ()
        stream.send(answer, sent)

    def _defect(self, op: str, failure: BaseException) -> VtpmError:
        """Turn a handler's defect into a reply; the log gets its place, not its text, which may hold data."""
        where = "".join(traceback.format_tb(failure.__traceback__))
        _log.error("%s: defect in %r: %s\n%s", self._interface.name, op, type(failure).__name__, where)
        return VtpmError(f"{self._interface.name} has a defect in {op!r}", next_step="Its log says where")


class AsyncPacketClient:
    """One connection to a service under asyncio; for another connection make another client.

    Args:
        interface: the service's.
        path: its socket.
        on_event: see OnEvent; without one, events are passed over.
    """

    def __init__(self, interface: Interface, path: Path, on_event: OnEvent | None = None) -> None:
        self._interface = interface
        self._path = path
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Reply, tuple[int, ...]]]] = {}
        self._slots = asyncio.Semaphore(MAX_OUTSTANDING)
        self._stream: PacketStream | None = None
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, when the connection has ended."""

    async def connect(self, timeout_s: float) -> None:
        """Connect.

        Raises:
            UnavailableError: nobody answers. AccessDeniedError: the socket's mode forbids it.
        """
        connection = await asyncio.to_thread(connect_service, self._interface, self._path, timeout_s)
        self._stream = PacketStream(connection, self._take, self._end)

    async def call(
        self, op: str, args: object, *, fds: Sequence[int] = (), timeout_s: float
    ) -> tuple[Any, tuple[int, ...]]:
        """Run one operation; as PacketClient.call, but many may be under way."""
        request_id = next(self._ids)
        packet = service.encode_request(self._interface, request_id, op, args)
        check_fds(fds)
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                if self._stream is None or not self._stream.is_open:
                    raise unavailable(self._interface, f"is not connected, so {op!r} was not sent")
                waiting = asyncio.get_running_loop().create_future()
                self._waiting[request_id] = waiting
                self._stream.send(packet, fds)
                reply, received = await waiting
        except TimeoutError:
            raise unavailable(self._interface, f"did not answer {op!r} within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(request_id, None)
        return _result(self._interface, op, reply, received)

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        if self._stream is not None:
            self._stream.close("the client closed it")

    def _take(self, packet: bytes, fds: tuple[int, ...]) -> None:
        assert self._stream is not None  # noqa: S101 - it calls this
        try:
            message = service.decode_from_service(self._interface, packet)
        except ProtocolError as error:
            close_fds(fds)
            _log.warning("%s sent a malformed message: %s", self._interface.name, error.message)
            self._stream.close(f"it sent a malformed message: {error.message}")
            return
        if isinstance(message, Reply):
            waiting = self._waiting.pop(message.id, None)
            if waiting is None or waiting.done():
                # The reply to a call that timed out or was cancelled.
                close_fds(fds)
            else:
                waiting.set_result((message, fds))
        elif self._on_event is not None:
            self._on_event(message.event, message.args, fds)
        else:
            close_fds(fds)

    def _end(self, reason: str) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(unavailable(self._interface, f"went away during a call: {reason}"))
        self._waiting.clear()
        if not self.closed.done():
            self.closed.set_result(reason)
