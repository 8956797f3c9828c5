"""What is said to whom, and what comes of an answer, whatever the other side does."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.peers.hosts import VTPM, Host, Made, listening, made, new_host, run, serving, url_of
from vtpm import errors
from vtpm.errors import (
    AccessDeniedError,
    AttestationError,
    ConflictError,
    ProtocolError,
    StateError,
    UnavailableError,
    VtpmError,
)
from vtpm.peers import client as module
from vtpm.peers.answers import MAX_ANSWER_BYTES, encode_messages
from vtpm.peers.book import Peer, new_peer
from vtpm.peers.client import PeerClient
from vtpm.peers.identity import CERTIFICATE_FILE, KEY_FILE, trust

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Hostile:
    """A server with a certificate that says what a test lets it say; keeps what it heard.

    Args:
        context: a server's, that takes the client's certificate or not.
        talk: answers the first request.
    """

    def __init__(self, context: ssl.SSLContext, talk: Talk) -> None:
        self._context = context
        self._talk = talk
        self.heard = b""
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                self.heard = await reader.readuntil(b"hello")
                await self._talk(reader, writer)
        finally:
            writer.transport.abort()

    async def __aenter__(self) -> Hostile:
        listener = listening()
        self.url = url_of(listener)
        self._server = await asyncio.start_server(self._serve, sock=listener, ssl=self._context)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()


def saying(*parts: bytes) -> Talk:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    return talk


def without_end(part: bytes, first: bytes = b"") -> Talk:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)

    return talk


async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *lines, "", "")).encode()


def plain(body: bytes) -> bytes:
    return head(f"Content-Length: {len(body)}") + body


@pytest.fixture
def a(tmp_path: Path) -> Host:
    return new_host(tmp_path, "a")


@pytest.fixture
def b(tmp_path: Path) -> Host:
    return new_host(tmp_path, "b")


def context_of(server: Host, client: Host) -> ssl.SSLContext:
    context = server.identity.server_context()
    trust(context, client.identity.certificate)
    return context


def shown(one: Made, folder: Path) -> ssl.SSLContext:
    return one.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), folder)


async def said(client: Host, peer: Peer) -> list[bytes]:
    return await PeerClient(client.identity).exchange(peer, VTPM, b"hello")


# -- to whom ---------------------------------------------------------------------------------------------------------
def test_nothing_is_said_when_the_server_shows_another_certificate(a: Host, b: Host, tmp_path: Path) -> None:
    """Another key, also under the right name."""
    contexts = [new_host(tmp_path, "c").identity.server_context(), shown(made(b.name), tmp_path)]

    async def tries() -> None:
        for context in contexts:
            context.verify_mode = ssl.CERT_NONE
            async with Hostile(context, saying(plain(encode_messages([b"yes"])))) as server:
                with pytest.raises(AccessDeniedError, match=r"peer b at \S+ shows another") as refused:
                    await said(a, b.at(server.url))
                assert server.heard == b""
                assert "add it again" in refused.value.next_step

    run(tries())


def test_answer_is_refused_when_another_shows_what_the_peers_key_has_signed(a: Host, tmp_path: Path) -> None:
    """The keys at both ends are in what the platforms prove, so it is this very one or none."""
    authority = made("c", ca=True)

    async def tries() -> None:
        async with Hostile(shown(made("d", authority), tmp_path), saying(plain(encode_messages([b"yes"])))) as server:
            with pytest.raises(AccessDeniedError, match="shows another certificate"):
                await said(a, new_peer("c", server.url, authority.pem))
        async with Hostile(shown(authority, tmp_path), saying(plain(encode_messages([b"yes"])))) as server:
            assert await said(a, new_peer("c", server.url, authority.pem)) == [b"yes"]

    run(tries())


@pytest.mark.parametrize("age", [timedelta(days=400), timedelta(days=-2)], ids=["over", "to come"])
def test_clocks_are_named_when_the_certificate_is_out_of_its_time(a: Host, tmp_path: Path, age: timedelta) -> None:
    one = made("c", age=age)

    async def tries() -> None:
        async with Hostile(shown(one, tmp_path), silence) as server:
            with pytest.raises(AccessDeniedError, match="out of its time") as refused:
                await said(a, new_peer("c", server.url, one.pem))
            assert "clocks" in refused.value.next_step
            assert server.heard == b""

    run(tries())


def test_nothing_is_said_when_the_server_has_no_newer_tls(a: Host, b: Host) -> None:
    context = context_of(b, a)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    async def tries() -> None:
        async with Hostile(context, silence) as server:
            with pytest.raises(VtpmError, match="peer b at"):
                await said(a, b.at(server.url))
            assert server.heard == b""

    run(tries())


def test_operator_is_told_what_to_do_when_the_peer_does_not_know_this_host(a: Host, b: Host) -> None:
    async def tries() -> None:
        async with serving(b) as served:
            with pytest.raises((AccessDeniedError, UnavailableError)) as refused:
                await a.say(b, served.url)
            assert "Add this host there" in refused.value.next_step

    run(tries())
    assert b.heard == []


def test_environment_changes_nothing_when_it_names_proxies_and_certificates(
    a: Host, b: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tries() -> None:
        with listening() as proxy:
            proxy.setblocking(False)
            for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
                monkeypatch.setenv(name, url_of(proxy).replace("https", "http"))
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
            monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
            b.knows(a)
            async with serving(b) as served:
                assert await a.say(b, served.url) == [b"hello"]
            with pytest.raises(BlockingIOError):
                proxy.accept()

    run(tries())
    assert not (tmp_path / "keys").exists()


def test_peer_is_unavailable_when_nobody_listens(a: Host, b: Host) -> None:
    with listening() as listener:
        url = url_of(listener)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        run(said(a, b.at(url)))


def test_own_files_are_named_when_they_changed_under_the_program(a: Host, b: Host) -> None:
    (a.folder / KEY_FILE).write_bytes((b.folder / KEY_FILE).read_bytes())
    with pytest.raises(StateError, match="do not open any more"):
        run(said(a, b.at("https://127.0.0.1:1")))
    (a.folder / CERTIFICATE_FILE).unlink()
    with pytest.raises(StateError, match="do not open any more"):
        run(said(a, b.at("https://127.0.0.1:1")))


# -- what it answers -------------------------------------------------------------------------------------------------
GOOD = plain(encode_messages([b"yes"]))
GARBAGE: dict[str, tuple[bytes, type[VtpmError]]] = {
    "nothing": (b"", UnavailableError),
    "no HTTP": (b"\x00\xff" * 50 + b"\r\n\r\n", UnavailableError),
    "an answer cut off": (GOOD[:-1], UnavailableError),
    "a header cut off": (GOOD[:30], UnavailableError),
    "two lengths": (head("Content-Length: 8", "Content-Length: 7") + b"\x00\x00\x00\x00\x03yes", UnavailableError),
    "an error of HTTP": (head("Content-Length: 0", status="500 Internal Server Error"), ProtocolError),
    "another place": (head("Content-Length: 0", "Location: http://127.0.0.1:1/", status="302 Found"), ProtocolError),
    "no content": (head(status="204 No Content"), ProtocolError),
    "no bytes": (plain(b""), ProtocolError),
    "neither messages nor an error": (plain(b"\x02"), ProtocolError),
    "compressed": (head("Content-Encoding: gzip", "Content-Length: 3") + b"\x1f\x8b\x08", ProtocolError),
    "too much by its length": (
        head(f"Content-Length: {2 * MAX_ANSWER_BYTES}") + bytes(MAX_ANSWER_BYTES + 1),
        ProtocolError,
    ),
    "a header without end": (head()[:-2] + b"X: " + b"y" * (1 << 20), UnavailableError),
}


@pytest.mark.parametrize(("data", "kind"), GARBAGE.values(), ids=GARBAGE)
def test_answer_is_refused_when_it_is_garbage(a: Host, b: Host, data: bytes, kind: type[VtpmError]) -> None:
    async def tries() -> None:
        async with Hostile(context_of(b, a), saying(data)) as server:
            with pytest.raises(kind, match="peer b"):
                await said(a, b.at(server.url))

    run(tries())


def test_answer_is_refused_when_an_error_of_http_carries_messages(a: Host, b: Host) -> None:
    async def tries() -> None:
        data = GOOD.replace(b"200 OK", b"500 Oh")
        async with Hostile(context_of(b, a), saying(data)) as server:
            with pytest.raises(ProtocolError, match="answers with HTTP 500"):
                await said(a, b.at(server.url))

    run(tries())


def test_answer_is_refused_when_it_has_no_end(a: Host, b: Host) -> None:
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"

    async def tries() -> None:
        async with Hostile(context_of(b, a), without_end(chunk, head("Transfer-Encoding: chunked"))) as server:
            with pytest.raises(ProtocolError, match=f"over {MAX_ANSWER_BYTES} bytes"):
                await said(a, b.at(server.url))

    run(tries())


def test_peer_is_unavailable_when_it_never_answers(a: Host, b: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.2)

    async def tries() -> None:
        async with Hostile(context_of(b, a), silence) as server:
            with pytest.raises(UnavailableError, match="did not answer in time"):
                await said(a, b.at(server.url))

    run(tries())


def test_peer_is_unavailable_when_it_never_shakes_hands(a: Host, b: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.2)

    async def tries() -> None:
        with listening() as listener, pytest.raises(UnavailableError, match="did not answer in time"):
            await said(a, b.at(url_of(listener)))

    run(tries())


@pytest.mark.parametrize(
    "talk",
    [without_end(head(status="100 Continue")), without_end(b"0", head("Transfer-Encoding: chunked"))],
    ids=["interim answers", "one chunk's length"],
)
def test_peer_is_unavailable_when_it_answers_without_end(
    a: Host, b: Host, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of each read is never reached."""
    monkeypatch.setattr(module, "EXCHANGE_S", 0.5)

    async def tries() -> None:
        async with Hostile(context_of(b, a), talk) as server:
            with pytest.raises(UnavailableError, match="peer b at"):
                await said(a, b.at(server.url))

    run(tries())


@contextlib.asynccontextmanager
async def spoiling(context: ssl.SSLContext, last: bytes | None) -> AsyncIterator[str]:
    """Shake hands, then say these bytes under TLS, as somebody on the way may; or with None, an alert of TLS's own."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(1 << 16))
            except ssl.SSLError:
                break
        writer.write(outgoing.read() + (last or b""))
        with contextlib.suppress(OSError):
            await reader.read()
        writer.transport.abort()
        ended.set()

    ended = asyncio.Event()
    listener = listening()
    server = await asyncio.start_server(serve, sock=listener)
    try:
        yield url_of(listener)
        await ended.wait()
    finally:
        server.close()
        await server.wait_closed()


def test_peer_is_unavailable_when_somebody_spoils_the_connection(a: Host, b: Host) -> None:
    async def tries() -> None:
        for last in (b"\x17\x03\x03\x00\x20" + bytes(32), b"garbage that is no TLS", b"\x15\x03\x03\x00\x02\x02\x28"):
            async with spoiling(context_of(b, a), last) as url:
                with pytest.raises(UnavailableError, match="broke the connection off"):
                    await said(a, b.at(url))

    run(tries())


def test_access_is_denied_when_the_peer_says_over_tls_that_it_does_not_take_the_certificate(a: Host, b: Host) -> None:
    async def tries() -> None:
        # It trusts nobody.
        async with spoiling(b.identity.server_context(), None) as url:
            with pytest.raises(AccessDeniedError, match="does not take this host's certificate"):
                await said(a, b.at(url))

    run(tries())


# -- what it reports -------------------------------------------------------------------------------------------------
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VtpmError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_comes_back_as_what_it_is_with_whose_it_is(a: Host, b: Host, kind: type[VtpmError]) -> None:
    async def refuse(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        raise kind("it is not to be", next_step="Look there")

    async def tries() -> None:
        b.knows(a)
        async with serving(b, refuse) as served:
            with pytest.raises(kind) as reported:
                await a.say(b, served.url)
        assert type(reported.value) is kind
        assert (reported.value.message, reported.value.next_step) == ("peer b answers: it is not to be", "Look there")

    run(tries())


def test_error_says_nothing_to_a_terminal_when_a_peer_would(a: Host, b: Host) -> None:
    async def refuse(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        raise AttestationError("no\x1b[2J\nvtpm: all is well", next_step="\u202etxt.exe\x00")

    async def tries() -> str:
        b.knows(a)
        async with serving(b, refuse) as served:
            with pytest.raises(AttestationError) as reported:
                await a.say(b, served.url)
        return str(reported.value)

    assert run(tries()) == "peer b answers: no?[2J?vtpm: all is well. ?txt.exe?"


def test_conversation_goes_on_when_an_error_was_reported(a: Host, b: Host) -> None:
    async def once(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        if not b.heard:
            await b.handle(peer, vtpm_id, message)
            raise ConflictError("not yet")
        return []

    async def tries() -> None:
        b.knows(a)
        async with serving(b, once) as served:
            with pytest.raises(ConflictError, match="not yet"):
                await a.say(b, served.url)
            assert await a.say(b, served.url) == []

    run(tries())
