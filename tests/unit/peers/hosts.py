"""Hosts with real keys and books in temporary folders, their servers on loopback, and strangers of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from vtpm.peers.book import Book, Peer, new_peer
from vtpm.peers.client import PeerClient
from vtpm.peers.identity import HostIdentity, open_identity
from vtpm.peers.server import PATH, Handler, PeerServer
from vtpm.secret import Secret

LIMIT_S = 20.0
VTPM = UUID("0f7a4f7e-2a57-4b0e-9c3e-0123456789ab")
TARGET = f"{PATH}{VTPM}"
SECRET = Secret(b"k" * 32)
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run, in bounded time, and see that nothing failed unseen."""
    unseen: list[object] = []

    async def bounded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        async with asyncio.timeout(LIMIT_S):
            return await work

    result = asyncio.run(bounded())
    assert unseen == []
    return result


@dataclass
class Host:
    """One host: who it is, whom it knows, what it was told."""

    name: str
    folder: Path
    identity: HostIdentity
    book: Book
    heard: list[tuple[str, UUID, bytes]] = field(default_factory=list)

    async def handle(self, peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        """Answer what was said."""
        self.heard.append((peer.name, vtpm_id, message))
        return [message]

    def knows(self, other: Host, url: str = "") -> None:
        """Put another into the book."""
        self.book.add(new_peer(other.name, url or f"https://{other.name}:7", other.identity.certificate))

    async def say(self, other: Host, url: str, message: bytes = b"hello") -> list[bytes]:
        """Send a message as the program does."""
        return await PeerClient(self.identity).exchange(other.at(url), VTPM, message)

    def at(self, url: str) -> Peer:
        """Return what others have of it in their books."""
        return new_peer(self.name, url, self.identity.certificate)


def new_host(folder: Path, name: str) -> Host:
    own = folder / name
    own.mkdir(mode=0o700)
    return Host(name, own, open_identity(own, name, SECRET), Book(own))


def acquainted(folder: Path) -> tuple[Host, Host]:
    """Return two hosts of which the first lets the second in."""
    a, b = new_host(folder, "a"), new_host(folder, "b")
    a.knows(b)
    return a, b


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def url_of(listener: socket.socket) -> str:
    return f"https://127.0.0.1:{listener.getsockname()[1]}"


@dataclass
class Served:
    """A server that runs, and where."""

    server: PeerServer
    url: str
    port: int

    async def idle(self) -> None:
        """Wait until each connection that there is by now has ended."""
        if self.server._tasks:
            await asyncio.wait(self.server._tasks)


@contextlib.asynccontextmanager
async def serving(host: Host, handler: Handler | None = None, *, send_buffer: int = 0) -> AsyncIterator[Served]:
    """Serve a host's peers; nothing that they do may end it."""
    listener = listening()
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = PeerServer(listener, host.identity, host.book, handler or host.handle)
    task = asyncio.create_task(server.serve())
    try:
        yield Served(server, url_of(listener), listener.getsockname()[1])
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not server._tasks
    assert not server._strangers
    assert not server._connections.total()


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(port: int, context: ssl.SSLContext | None = None, **options: Any) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, **options)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the other side ends the connection, in whatever way."""
    got = b""
    try:
        while some := await reader.read(1 << 16):
            got += some
    except OSError:
        pass
    return got


async def tried(port: int, context: ssl.SSLContext | None, data: bytes, *, whole: bool = False) -> bytes:
    """Connect, send, and return what comes back first, or all of it; nothing when the connection ends."""
    try:
        async with connected(port, context) as (reader, writer):
            writer.write(data)
            return await rest(reader) if whole else await reader.read(1 << 16)
    except OSError:
        return b""


def request(*headers: str, body: bytes = b"hello", method: str = "POST", target: str = TARGET) -> bytes:
    """Return a request; without headers it is a good one."""
    lines = headers or (f"Content-Length: {len(body)}",)
    return "\r\n".join((f"{method} {target} HTTP/1.1", "Host: a", *lines, "", "")).encode() + body


@dataclass(frozen=True)
class Made:
    """A certificate and key of somebody who does not go by the rules."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def load_into(self, context: ssl.SSLContext, folder: Path) -> ssl.SSLContext:
        """Let a context show this certificate."""
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = folder / "stranger.pem"
        path.write_bytes(key + self.pem.encode())
        context.load_cert_chain(path)
        return context

    def client_context(self, folder: Path) -> ssl.SSLContext:
        """Return a context for a client that shows this certificate, and looks at nothing itself."""
        return self.load_into(careless(), folder)


def careless() -> ssl.SSLContext:
    """Return a client's context that looks at nothing, and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def made(name: str, issuer: Made | None = None, *, ca: bool = False, age: timedelta = timedelta(days=1)) -> Made:
    """Return a certificate that is a year old at most, by itself or by an issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.now(UTC) - age
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(key if issuer is None else issuer.key, hashes.SHA256())
    )
    return Made(certificate, key)
