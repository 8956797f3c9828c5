"""Takes messages of peers: HTTP/1.1 over TLS 1.3, from those alone that show the certificate of a peer in the book.

One exchange is POST /v1/migrations/UUID with a message as its body. Whoever connects has seconds to show a certificate,
and a peer has seconds to say what it wants; neither holds up anybody else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, cast
from uuid import UUID

import h11

from vtpm.errors import ProtocolError, VtpmError
from vtpm.peers.answers import MAX_MESSAGE_BYTES, encode_error, encode_messages
from vtpm.peers.book import Book, Peer
from vtpm.peers.identity import HostIdentity, trust
from vtpm.wire.allowance import Allowance

PATH = "/v1/migrations/"
CONTENT_TYPE = "application/octet-stream"
HANDSHAKE_S = 5.0
REQUEST_S = 15.0
"""How long a request may take to come whole, and an answer to be taken."""
IDLE_S = 60.0
"""How long a connection may wait for its next request."""
MAX_HANDSHAKES = 128
MAX_HANDSHAKES_OF_ONE = 32
"""Of one address: strangers are told apart by nothing else, and a peer may begin with all its connections at once."""
MAX_CONNECTIONS_OF_ONE = 32
"""Of one peer: each vTPM that it moves has one, and many may move at once."""
LINES_AT_ONCE = 20
LINES_PER_S = 0.2
"""Of strangers, and as many of peers: whoever connects without end does not fill the log."""
_MAX_HEADER_BYTES = 8 * 1024
_READ_BYTES = 64 * 1024
_TARGET = re.compile(rf"{PATH}([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})".encode())
_log = logging.getLogger(__name__)


class Handler(Protocol):
    """Answers a peer's message."""

    def __call__(self, peer: Peer, vtpm_id: UUID, message: bytes) -> Awaitable[Sequence[bytes]]:
        """Return the messages that follow. Raises VtpmError: the peer hears it."""


class PeerServer:
    """See the module.

    Args:
        listener: see `listen`; closed with the server.
        identity: this host's.
        book: read anew for each connection and each request.
        handler: see Handler.
    """

    def __init__(self, listener: socket.socket, identity: HostIdentity, book: Book, handler: Handler) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._identity = identity
        self._book = book
        self._handler = handler
        self._present: tuple[frozenset[str], ssl.SSLContext] | None = None
        self._presenting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        # Those who have not shown yet who they are, the oldest first, and from where they come.
        self._strangers: dict[asyncio.Task[None], str] = {}
        self._connections: Counter[str] = Counter()
        self._lines_of_strangers = Allowance(LINES_AT_ONCE, LINES_PER_S)
        self._lines_of_peers = Allowance(LINES_AT_ONCE, LINES_PER_S)

    async def serve(self) -> None:
        """Serve until cancelled; then every connection is closed."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(self._listener)
                except OSError as error:
                    # Of this connection, or for want of descriptors: others go on, and this is tried again.
                    _log.warning("a connection was not taken: %s", error)
                    await asyncio.sleep(1)
                    continue
                self._admit(connection, str(address[0]))
                # What waits to be accepted is accepted without a pause, and would hold up all else.
                await asyncio.sleep(0)
        finally:
            self._listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _admit(self, connection: socket.socket, address: str) -> None:
        """Let the newest try, if need be in the place of the oldest: a peer is done in milliseconds."""
        origin = _origin(address)
        of_one = [task for task, other in self._strangers.items() if other == origin]
        if len(of_one) >= MAX_HANDSHAKES_OF_ONE:
            self._displace(of_one[0])
        elif len(self._strangers) >= MAX_HANDSHAKES:
            self._displace(next(iter(self._strangers)))
        task = asyncio.get_running_loop().create_task(self._connected(connection, address))
        self._strangers[task] = origin
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._strangers.pop(task, None)
            connection.close()

        task.add_done_callback(ended)

    def _displace(self, task: asyncio.Task[None]) -> None:
        del self._strangers[task]
        task.cancel()

    async def _connected(self, connection: socket.socket, address: str) -> None:
        writer = None
        try:
            reader, writer = await self._handshake(connection)
            peer = await self._who(writer)
            self._strangers.pop(cast(asyncio.Task[None], asyncio.current_task()), None)
            await self._serve_peer(peer, reader, writer)
        except (OSError, VtpmError) as error:
            if self._lines_of_strangers.take():
                _log.info("%s is not let in: %s", address, error)
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _handshake(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        context = await self._present_context()
        reader = asyncio.StreamReader(limit=_READ_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=context, ssl_handshake_timeout=HANDSHAKE_S, ssl_shutdown_timeout=1
        )
        transport.set_write_buffer_limits(_READ_BYTES)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _present_context(self) -> ssl.SSLContext:
        """Return a context that takes the certificates in the book."""
        # Of two threads at once, one might give out what the other had not filled yet.
        async with self._presenting:
            self._present = await asyncio.to_thread(self._context_of_book, self._present)
            return self._present[1]

    def _context_of_book(
        self, known: tuple[frozenset[str], ssl.SSLContext] | None
    ) -> tuple[frozenset[str], ssl.SSLContext]:
        certificates = frozenset(peer.certificate for peer in self._book.list())
        if known is not None and known[0] == certificates:
            return known
        context = self._identity.server_context()
        for certificate in certificates:
            trust(context, certificate)
        return certificates, context

    async def _who(self, writer: asyncio.StreamWriter) -> Peer:
        """Return the peer whose very certificate was shown. Raises ProtocolError: it is nobody's."""
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        peer = None if shown is None else await asyncio.to_thread(self._book.of_certificate, shown)
        if peer is None:
            raise ProtocolError("it shows a certificate of no peer")
        return peer

    async def _serve_peer(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections[peer.name] += 1
        try:
            if self._connections[peer.name] > MAX_CONNECTIONS_OF_ONE:
                raise ProtocolError(f"it has more than {MAX_CONNECTIONS_OF_ONE} connections")
            await self._requests(reader, writer)
        except (OSError, TimeoutError, h11.ProtocolError, VtpmError) as error:
            if self._lines_of_peers.take():
                _log.info("peer %s: %s", peer.name, str(error) or type(error).__name__)
        finally:
            self._connections[peer.name] -= 1

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEADER_BYTES)
        while True:
            async with asyncio.timeout(IDLE_S):
                first = await _event(http, reader)
            if not isinstance(first, h11.Request):
                return
            async with asyncio.timeout(REQUEST_S):
                vtpm_id = _asked(first)
                message = await _body(http, reader)
            # Again: it may have been removed from the book while its connection waited.
            peer = await self._who(writer)
            try:
                answer = encode_messages(await self._handler(peer, vtpm_id, message))
            except VtpmError as error:
                answer = encode_error(error)
            async with asyncio.timeout(REQUEST_S):
                await _answer(http, writer, answer)
            if http.our_state is h11.MUST_CLOSE:
                writer.close()
                async with asyncio.timeout(REQUEST_S):
                    await writer.wait_closed()
                return
            http.start_next_cycle()


def _origin(address: str) -> str:
    """Return what one stranger has to choose addresses from: of IPv6, a network of 64 bits."""
    one = ipaddress.ip_address(address.partition("%")[0])
    return address if isinstance(one, ipaddress.IPv4Address) else str(ipaddress.ip_network((one, 64), strict=False))


def _asked(request: h11.Request) -> UUID:
    """Return which vTPM a request is about. Raises ProtocolError: it is not of our form, or its body out of bounds."""
    target = _TARGET.fullmatch(request.target)
    headers = dict(request.headers)
    size = headers.get(b"content-length", b"")
    if request.method != b"POST" or target is None:
        raise ProtocolError("it asks for something that is not served here")
    if b"transfer-encoding" in headers or b"expect" in headers or not size.isdigit() or len(size) > 8:
        raise ProtocolError("its request has no plain length")
    if not 0 < int(size) <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"its message has {int(size)} bytes, 1 to {MAX_MESSAGE_BYTES} go")
    return UUID(target[1].decode())


async def _event(http: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(await reader.read(_READ_BYTES))
    return event


async def _body(http: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    """Return a body of the length that was announced: h11 raises when the connection ends before."""
    body = bytearray()
    while isinstance(event := await _event(http, reader), h11.Data):
        body += event.data
    return bytes(body)


async def _answer(http: h11.Connection, writer: asyncio.StreamWriter, answer: bytes) -> None:
    headers = [("Content-Type", CONTENT_TYPE), ("Content-Length", str(len(answer)))]
    for event in (h11.Response(status_code=200, headers=headers), h11.Data(data=answer), h11.EndOfMessage()):
        data = http.send(event) or b""
        # In pieces: one that went to the transport whole would be waited for by nobody.
        for start in range(0, len(data), _READ_BYTES):
            writer.write(data[start : start + _READ_BYTES])
            await writer.drain()
