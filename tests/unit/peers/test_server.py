"""Who is let in, what is taken of them, and that nobody who is not keeps out those who are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.peers.hosts import (
    TARGET,
    VTPM,
    Host,
    acquainted,
    careless,
    connected,
    made,
    new_host,
    request,
    rest,
    run,
    serving,
    tried,
)
from vtpm.errors import UnavailableError
from vtpm.peers import server as module
from vtpm.peers.answers import MAX_MESSAGE_BYTES, encode_messages
from vtpm.peers.book import Peer, new_peer
from vtpm.peers.server import PeerServer

GOOD = request()
BIG = b"x" * (MAX_MESSAGE_BYTES + 1)


def context_of(client: Host, host: Host) -> ssl.SSLContext:
    return client.identity.client_context(host.identity.certificate)


async def answered(reader: asyncio.StreamReader) -> bytes:
    """Return the body of one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    return await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))


# -- who is let in ---------------------------------------------------------------------------------------------------
def test_messages_are_answered_when_a_peer_sends_them(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def talk() -> None:
        async with serving(a) as served:
            assert await b.say(a, served.url, b"one") == [b"one"]
            assert await b.say(a, served.url, BIG[1:]) == [BIG[1:]]

    run(talk())
    assert a.heard == [("b", VTPM, b"one"), ("b", VTPM, BIG[1:])]


def test_stranger_is_not_heard_when_it_shows_no_certificate_of_a_peer(tmp_path: Path) -> None:
    """Neither an unknown one, nor a peer's name on another key, nor one that a peer's key has signed."""
    a, b = acquainted(tmp_path)
    authority = made("c", ca=True)
    a.book.add(new_peer("c", "https://c:7", authority.pem))
    stranger = new_host(tmp_path, "stranger")
    contexts = [
        careless(),
        context_of(stranger, a),
        made("stranger").client_context(tmp_path),
        made("b").client_context(tmp_path),
        made("c").client_context(tmp_path),
        made("c2", authority).client_context(tmp_path),
    ]

    async def tries() -> None:
        async with serving(a) as served:
            for context in contexts:
                assert await tried(served.port, context, GOOD) == b""
            assert a.heard == []
            assert await tried(
                served.port, authority.client_context(tmp_path), request("Connection: close", "Content-Length: 5")
            )
            assert await b.say(a, served.url) == [b"hello"]

    run(tries())
    assert [name for name, _, _ in a.heard] == ["c", "b"]


def test_stranger_of_a_peers_signing_is_not_let_in_when_nothing_is_asked_yet(tmp_path: Path) -> None:
    a = new_host(tmp_path, "a")
    authority = made("c", ca=True)
    a.book.add(new_peer("c", "https://c:7", authority.pem))

    async def tries() -> None:
        async with serving(a) as served:
            assert await tried(served.port, made("d", authority).client_context(tmp_path), b"") == b""

    run(tries())


def test_two_peers_are_told_apart_when_their_certificates_have_one_name(tmp_path: Path) -> None:
    a = new_host(tmp_path, "a")
    twins = [made("localhost"), made("localhost")]
    for number, twin in enumerate(twins):
        a.book.add(new_peer(f"twin{number}", f"https://h:{number + 1}", twin.pem))

    async def both() -> None:
        async with serving(a) as served:
            for twin in twins:
                message = request("Connection: close", "Content-Length: 5")
                assert await tried(served.port, twin.client_context(tmp_path), message)

    run(both())
    assert [name for name, _, _ in a.heard] == ["twin0", "twin1"]


def test_peer_is_heard_no_more_when_it_was_removed_even_on_a_connection_that_is_open(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def removed() -> None:
        async with serving(a) as served, connected(served.port, context_of(b, a)) as (reader, writer):
            writer.write(GOOD)
            assert await answered(reader) == encode_messages([b"hello"])
            a.book.remove("b")
            writer.write(GOOD)
            assert await rest(reader) == b""
            assert await tried(served.port, context_of(b, a), GOOD) == b""

    run(removed())
    assert len(a.heard) == 1


def test_removed_peer_fails_in_the_handshake_when_it_was_let_in_before(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def removed() -> None:
        async with serving(a) as served:
            assert await b.say(a, served.url) == [b"hello"]
            before = await served.server._present_context()
            a.book.remove("b")
            after = await served.server._present_context()
            assert (before.cert_store_stats()["x509"], after.cert_store_stats()["x509"]) == (1, 0)

    run(removed())


def test_peer_is_let_in_when_it_was_added_while_the_server_runs(tmp_path: Path) -> None:
    a, b = new_host(tmp_path, "a"), new_host(tmp_path, "b")

    async def added() -> None:
        async with serving(a) as served:
            with pytest.raises(Exception, match="peer a at"):
                await b.say(a, served.url)
            a.knows(b)
            assert await b.say(a, served.url) == [b"hello"]

    run(added())


def test_nobody_is_let_in_when_a_file_of_the_book_is_damaged(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)
    c = new_host(tmp_path, "c")
    a.knows(c)

    async def damaged() -> None:
        async with serving(a) as served, connected(served.port, context_of(b, a)) as (reader, writer):
            writer.write(GOOD)
            await answered(reader)
            (a.folder / "c.json").write_text("{}")
            writer.write(GOOD)
            assert await rest(reader) == b""
            assert await tried(served.port, context_of(b, a), GOOD) == b""

    run(damaged())
    assert len(a.heard) == 1


def test_older_tls_is_refused_when_a_peer_offers_nothing_newer(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)
    context = context_of(b, a)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    async def old() -> None:
        async with serving(a) as served:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                async with connected(served.port, context):
                    pass

    run(old())


def test_no_session_is_given_out_for_another_connection(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def talk() -> None:
        async with serving(a) as served, connected(served.port, context_of(b, a)) as (reader, writer):
            writer.write(GOOD)
            await answered(reader)
            tls = writer.get_extra_info("ssl_object")
            assert tls.version() == "TLSv1.3"
            assert tls.session is None or not tls.session.has_ticket

    run(talk())


# -- what is taken of a peer -----------------------------------------------------------------------------------------
MALFORMED = {
    "another method": request(method="GET"),
    "a tunnel": request(method="CONNECT", target="b:1"),
    "another path": request(target="/v1/vtpms"),
    "something behind the path": request(target=f"{TARGET}/../x"),
    "a query": request(target=f"{TARGET}?x=1"),
    "another form of the uuid": request(target=TARGET.upper().replace("/V1/MIGRATIONS", "/v1/migrations")),
    "no length": request("X: y"),
    "an empty message": request(body=b""),
    "a message too long": request(body=BIG),
    "a length of many digits": request("Content-Length: 000000005"),
    "a signed length": request("Content-Length: +5"),
    "a length in other digits": f"POST {TARGET} HTTP/1.1\r\nHost: a\r\nContent-Length: ٥\r\n\r\nhello".encode(),
    "two lengths": request("Content-Length: 5", "Content-Length: 4"),
    "chunks": request("Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
    "chunks and a length": request("Content-Length: 5", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
    "another encoding": request("Content-Length: 5", "Transfer-Encoding: gzip"),
    "an expectation": request("Content-Length: 5", "Expect: 100-continue"),
    "no host": f"POST {TARGET} HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello".encode(),
    "no HTTP": b"\x00\x01\x02\x03" * 100 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header too long": f"POST {TARGET} HTTP/1.1\r\nX: ".encode() + b"y" * (12 << 10),
    "a header that is folded": request("Content-Length: 5", "X: y", "\x00z: 1"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_request_is_not_heard_and_its_connection_ends_when_it_is_malformed(tmp_path: Path, data: bytes) -> None:
    a, b = acquainted(tmp_path)

    async def tries() -> None:
        async with serving(a) as served:
            assert await tried(served.port, context_of(b, a), data) == b""

    run(tries())
    assert a.heard == []


@pytest.mark.parametrize("data", [GOOD[:-1], GOOD[:40], b""], ids=["body", "header", "nothing"])
def test_request_is_not_heard_when_it_ends_early(tmp_path: Path, data: bytes) -> None:
    a, b = acquainted(tmp_path)

    async def cut() -> None:
        async with serving(a) as served:
            async with connected(served.port, context_of(b, a)) as (_, writer):
                writer.write(data)
                await writer.drain()
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            await served.idle()

    run(cut())
    assert a.heard == []


def test_requests_are_answered_one_after_the_other_when_they_come_at_once(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)
    at_once, most = 0, 0

    async def handle(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.to_thread(len, message)
        at_once -= 1
        return [message]

    async def pipelined() -> bytes:
        async with serving(a, handle) as served:
            bodies = [b"%d" % number for number in range(5)]
            data = b"".join(request(body=body) for body in bodies[:-1])
            last = request("Content-Length: 1", "Connection: close", body=bodies[-1])
            return await tried(served.port, context_of(b, a), data + last, whole=True)

    got = run(pipelined())
    assert [answer.partition(b"\r\n\r\n")[2] for answer in got.split(b"HTTP/1.1 200 ")[1:]] == [
        encode_messages([b"%d" % number]) for number in range(5)
    ]
    assert most == 1


def test_answer_is_given_when_the_request_proposes_another_protocol(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def upgrade() -> bytes:
        async with serving(a) as served:
            data = request("Content-Length: 5", "Connection: upgrade, close", "Upgrade: h2c")
            return await tried(served.port, context_of(b, a), data)

    assert run(upgrade()).startswith(b"HTTP/1.1 200 ")


def test_peer_hears_of_it_when_the_answer_is_out_of_bounds(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def too_many(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        return [message] * 9

    async def talk() -> None:
        async with serving(a, too_many) as served:
            await b.say(a, served.url)

    with pytest.raises(Exception, match="peer a answers: an answer has too many messages"):
        run(talk())


# -- time and numbers ------------------------------------------------------------------------------------------------
def test_stranger_is_cut_off_when_it_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)
    a = new_host(tmp_path, "a")

    async def silent() -> None:
        async with serving(a) as served:
            assert await tried(served.port, None, b"") == b""
            assert await tried(served.port, None, b"\x16\x03\x01\x02\x00\x01") == b""

    run(silent())


@pytest.mark.parametrize(
    ("limit", "data"), [("IDLE_S", b""), ("IDLE_S", GOOD[:40]), ("REQUEST_S", GOOD[:-1])], ids=["all", "header", "body"]
)
def test_peer_is_cut_off_when_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, data: bytes
) -> None:
    monkeypatch.setattr(module, limit, 0.2)
    a, b = acquainted(tmp_path)

    async def slow() -> None:
        async with serving(a) as served:
            assert await tried(served.port, context_of(b, a), data) == b""

    run(slow())
    assert a.heard == []


def test_peer_is_cut_off_when_it_does_not_take_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_S", 0.3)
    a, b = acquainted(tmp_path)

    async def much(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        return [BIG[1:]]

    async def stuck() -> None:
        async with serving(a, much, send_buffer=4096) as served:
            small = socket.socket()
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.connect(("127.0.0.1", served.port))
            small.setblocking(False)
            reader, writer = await asyncio.open_connection(
                sock=small, ssl=context_of(b, a), server_hostname="", limit=1024
            )
            writer.write(GOOD)
            await served.idle()
            assert len(await rest(reader)) < MAX_MESSAGE_BYTES
            writer.transport.abort()

    run(stuck())


def test_peer_is_served_when_strangers_hold_every_place(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def flood() -> None:
        async with serving(a) as served, contextlib.AsyncExitStack() as stack:
            for source in range(2, 14):
                for _ in range(12):
                    await stack.enter_async_context(connected(served.port, local_addr=(f"127.0.0.{source}", 0)))
            assert await b.say(a, served.url) == [b"hello"]
            assert len(served.server._strangers) <= module.MAX_HANDSHAKES
            assert len(served.server._tasks) <= module.MAX_HANDSHAKES + 1

    run(flood())


def test_those_of_one_address_displace_one_another_when_they_are_many(tmp_path: Path) -> None:
    """Whoever floods from one address leaves those from others alone, and keeps no peer out that is there too."""
    a, b = acquainted(tmp_path)

    async def flood() -> None:
        async with serving(a) as served, contextlib.AsyncExitStack() as stack:
            early, _ = await stack.enter_async_context(connected(served.port, local_addr=("127.0.0.2", 0)))
            mine = [await stack.enter_async_context(connected(served.port)) for _ in range(100)]
            for reader, _ in mine[: -module.MAX_HANDSHAKES_OF_ONE]:
                assert await rest(reader) == b""
            assert len(served.server._strangers) == module.MAX_HANDSHAKES_OF_ONE + 1
            assert not early.at_eof()
            assert await b.say(a, served.url) == [b"hello"]

    run(flood())


def test_strangers_count_by_network_when_they_can_choose_among_its_addresses() -> None:
    assert module._origin("192.0.2.7") == "192.0.2.7"
    assert module._origin("2001:db8::1") == module._origin("2001:db8::ffff:1")
    assert module._origin("2001:db8::1") != module._origin("2001:db8:0:1::1")
    assert module._origin("fe80::1%eth0") == module._origin("fe80::2")


def test_peer_is_served_when_another_holds_all_the_connections_that_it_may(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)
    c = new_host(tmp_path, "c")
    a.knows(c)

    async def idle() -> None:
        async with serving(a) as served, contextlib.AsyncExitStack() as stack:
            for _ in range(module.MAX_CONNECTIONS_OF_ONE):
                reader, writer = await stack.enter_async_context(connected(served.port, context_of(b, a)))
                writer.write(GOOD)
                await answered(reader)
            assert await tried(served.port, context_of(b, a), GOOD) == b""
            assert await c.say(a, served.url) == [b"hello"]

    run(idle())
    assert len(a.heard) == module.MAX_CONNECTIONS_OF_ONE + 1


def test_each_is_answered_when_one_peer_moves_many_at_once(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)
    together = asyncio.Barrier(20)

    async def all_there(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
        await together.wait()
        return [message]

    async def at_once() -> list[list[bytes]]:
        async with serving(a, all_there) as served:
            return await asyncio.gather(*(b.say(a, served.url, b"%d" % number) for number in range(20)))

    assert run(at_once()) == [[b"%d" % number] for number in range(20)]


def test_one_context_is_made_when_the_first_connections_come_at_once(tmp_path: Path) -> None:
    """Each must trust whoever is in the book, not what another was about to fill."""
    a, _ = acquainted(tmp_path)

    async def at_once() -> list[ssl.SSLContext]:
        with socket.socket() as listener:
            server = PeerServer(listener, a.identity, a.book, a.handle)
            return await asyncio.gather(*(server._present_context() for _ in range(5)))

    contexts = run(at_once())
    assert len({id(context) for context in contexts}) == 1
    assert contexts[0].cert_store_stats()["x509"] == 1


def test_log_is_not_filled_when_strangers_and_peers_come_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LINES_AT_ONCE", 3)
    a, b = acquainted(tmp_path)
    caplog.set_level(logging.INFO, module.__name__)

    async def flood() -> None:
        async with serving(a) as served:
            for _ in range(10):
                assert await tried(served.port, None, b"no TLS at all\r\n\r\n") in (
                    b"",
                    b"\x15\x03\x01\x00\x02\x02\x46",
                )
                assert await tried(served.port, context_of(b, a), b"no HTTP\r\n\r\n") == b""

    run(flood())
    lines = [record.getMessage() for record in caplog.records]
    assert sum("127.0.0.1 is not let in" in line for line in lines) == 3
    assert sum("peer b: " in line for line in lines) == 3


def test_every_connection_ends_when_the_server_does(tmp_path: Path) -> None:
    a, b = acquainted(tmp_path)

    async def ends() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with serving(a) as served:
                peer, writer = await stack.enter_async_context(connected(served.port, context_of(b, a)))
                stranger, _ = await stack.enter_async_context(connected(served.port))
                writer.write(GOOD)
                await answered(peer)
            assert await rest(peer) == await rest(stranger) == b""
            with pytest.raises(UnavailableError, match="cannot be reached"):
                await b.say(a, served.url)

    run(ends())
