"""Packets, descriptors and peers over real sockets, with the peers that an interface must survive."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.wire_service.messages import SERVICE, Nothing, Text
from vtpm.errors import (
    AccessDeniedError,
    ConflictError,
    ProtocolError,
    UnavailableError,
    UsageError,
    VtpmError,
)
from vtpm.wire import packet_socket, packet_stream, service
from vtpm.wire.packet_socket import (
    MAX_FDS,
    AsyncPacketClient,
    AsyncPacketServer,
    PacketClient,
    Peer,
    ServiceLock,
    close_fds,
)

pytestmark = pytest.mark.timeout(20)
LIMIT_S = 5.0
NOBODY = 65534


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Yield a run directory, and see that the test leaves no descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    yield tmp_path
    assert set(os.listdir("/proc/self/fd")) - before == set()


class Service:
    """A test service: `say` echoes text and descriptors, or does what the text names."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = 0
        self.peers: list[Peer] = []
        self.ended = asyncio.Event()

    async def handle(self, op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, Sequence[int]]:
        self.peers.append(peer)
        self.entered += 1
        try:
            if op == "end":
                await self.gate.wait()
                return Nothing(), ()
            if args.text == "conflict":
                raise ConflictError("web1 runs", next_step="Stop it")
            if args.text == "defect":
                raise RuntimeError("with a secret in it")
            if args.text == "too large":
                return Text("\x00" * 20_000), ()
            if args.text == "too many":
                return Text(""), (0,) * (MAX_FDS + 1)
            if fds:
                self.keep = [os.dup(fd) for fd in fds]
                asyncio.get_running_loop().call_soon(close_fds, self.keep)
            return args, self.keep if fds else ()
        finally:
            close_fds(fds)
            self.ended.set()


@contextlib.asynccontextmanager
async def serving(
    run_dir: Path, allows: Callable[[int], bool] = lambda _uid: True, **bounds: int
) -> AsyncIterator[tuple[Service, AsyncPacketServer, Path]]:
    lock = ServiceLock(run_dir, "test")
    path = run_dir / "test.sock"
    tested = Service()
    server = AsyncPacketServer(SERVICE, tested.handle, allows, **bounds)
    server.serve(lock.bind_service_socket(path, 0o666))
    try:
        yield tested, server, path
    finally:
        await server.close()
        lock.release()


@contextlib.contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(LIMIT_S)
        connection.connect(str(path))
        yield connection


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S * 2):
            await test()

    asyncio.run(limited())


@contextlib.contextmanager
def fake_service(run_dir: Path, behaviour: Callable[[socket.socket], None], times: int = 1) -> Iterator[Path]:
    """Run a service that behaves as told to each connection in turn, in a thread."""
    path = run_dir / "fake.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(LIMIT_S)

        def work() -> None:
            for _ in range(times):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(LIMIT_S)
                    behaviour(connection)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield path
        finally:
            thread.join(LIMIT_S * 2)
            assert not thread.is_alive()


def echo(connection: socket.socket) -> None:
    request = service.decode_request(SERVICE, connection.recv(65536))
    connection.send(service.encode_result(SERVICE, request.id, request.op, request.args))


def test_second_lock_is_refused_with_the_pid_when_one_is_held(run_dir: Path) -> None:
    lock = ServiceLock(run_dir, "keeper")
    with pytest.raises(ConflictError, match=f"pid is {os.getpid()}"):
        ServiceLock(run_dir, "keeper")
    ServiceLock(run_dir, "launcher").release()
    lock.release()
    ServiceLock(run_dir, "keeper").release()
    with pytest.raises(UnavailableError, match="lock"):
        ServiceLock(run_dir / "absent", "keeper")


def test_lock_is_free_when_its_holder_was_killed(run_dir: Path) -> None:
    code = (
        "import sys, pathlib; from vtpm.wire.packet_socket import ServiceLock;"
        "lock = ServiceLock(pathlib.Path(sys.argv[1]), 'keeper'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(ConflictError, match=f"pid is {holder.pid}"):
                ServiceLock(run_dir, "keeper")
        finally:
            holder.kill()
            holder.wait(LIMIT_S)
        ServiceLock(run_dir, "keeper").release()


def test_socket_takes_the_place_when_the_old_one_is_stale(run_dir: Path) -> None:
    lock = ServiceLock(run_dir, "test")
    path = run_dir / "test.sock"
    for mode in (0o600, 0o660):
        with lock.bind_service_socket(path, mode) as listener:
            assert stat.S_IMODE(path.stat().st_mode) == mode
            with raw(path):
                listener.accept()[0].close()
    assert [entry.name for entry in run_dir.iterdir() if entry.suffix != ".lock"] == ["test.sock"]
    (run_dir / "file").write_text("kept")
    with pytest.raises(ConflictError, match="no socket"):
        lock.bind_service_socket(run_dir / "file", 0o600)
    assert (run_dir / "file").read_text() == "kept"
    with pytest.raises(UsageError, match="too long"):
        lock.bind_service_socket(run_dir / ("x" * 120), 0o600)
    with pytest.raises(UnavailableError, match="cannot be made"):
        lock.bind_service_socket(run_dir / "absent" / "x", 0o600)
    lock.release()


def test_calls_descriptors_and_errors_come_back_when_all_is_well(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (tested, _server, path):
            blocking = PacketClient(SERVICE, path)
            client = AsyncPacketClient(SERVICE, path)
            await client.connect(LIMIT_S)
            reading, writing = os.pipe()
            for call in (
                client.call,
                lambda *a, **k: asyncio.to_thread(blocking.call, *a, **k),
            ):
                result, fds = await call("say", Text("hi"), fds=[writing] * MAX_FDS, timeout_s=LIMIT_S)
                assert result == Text("hi")
                assert len(fds) == MAX_FDS
                assert not os.get_inheritable(fds[0])
                os.write(fds[-1], b"x")
                assert os.read(reading, 1) == b"x"
                close_fds(fds)
                for text, error, words in (
                    ("conflict", ConflictError, "web1 runs"),
                    ("defect", VtpmError, "defect in 'say'"),
                    ("too large", ProtocolError, "larger"),
                    ("too many", ProtocolError, "too many"),
                ):
                    with pytest.raises(error, match=words) as caught:
                        await call("say", Text(text), timeout_s=LIMIT_S)
                    assert "secret" not in str(caught.value)
                with pytest.raises(ProtocolError, match="too many"):
                    await call("say", Text(""), fds=[writing] * (MAX_FDS + 1), timeout_s=LIMIT_S)
            assert set(tested.peers) == {Peer(os.getpid(), os.getuid(), os.getgid())}
            close_fds((reading, writing))
            client.close()
            blocking.close()

    run(test)


def test_handlers_of_one_client_run_concurrently_when_one_waits(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir, max_outstanding=3) as (tested, _server, path):
            client = AsyncPacketClient(SERVICE, path)
            await client.connect(LIMIT_S)
            waiting = [asyncio.create_task(client.call("end", Nothing(), timeout_s=LIMIT_S)) for _ in range(2)]
            assert await client.call("say", Text("x"), timeout_s=LIMIT_S) == (Text("x"), ())
            # The third waits too; a fourth stays in the socket until one is done.
            waiting += [asyncio.create_task(client.call("end", Nothing(), timeout_s=LIMIT_S)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="within"):
                await client.call("say", Text("y"), timeout_s=0.1)
            assert tested.entered == 4
            tested.gate.set()
            assert await asyncio.gather(*waiting) == [(Nothing(), ())] * 4
            # The late reply to the call that timed out was dropped, and the connection goes on.
            assert await client.call("say", Text("z"), timeout_s=LIMIT_S) == (Text("z"), ())
            client.close()

    run(test)


def test_events_reach_every_client_when_broadcast(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (_tested, server, path):
            got: asyncio.Queue[tuple[str, Any, int]] = asyncio.Queue()

            def on_event(event: str, args: Any, fds: tuple[int, ...]) -> None:
                close_fds(fds)
                got.put_nowait((event, args, len(fds)))

            clients = [AsyncPacketClient(SERVICE, path, handler) for handler in (on_event, on_event, None)]
            blocking = PacketClient(SERVICE, path)
            await asyncio.to_thread(blocking.connect, LIMIT_S)
            for client in clients:
                await client.connect(LIMIT_S)
                await client.call("say", Text(""), timeout_s=LIMIT_S)
            server.broadcast_event("said", Text("hello"), fds=[0, 0])
            assert [await got.get() for _ in range(2)] == [("said", Text("hello"), 2)] * 2
            # A client that does not ask for events passes over them.
            assert (await asyncio.to_thread(blocking.call, "say", Text("a"), timeout_s=LIMIT_S))[0] == Text("a")
            assert (await clients[2].call("say", Text("b"), timeout_s=LIMIT_S))[0] == Text("b")
            with pytest.raises(ProtocolError, match="no event"):
                server.broadcast_event("sung", Text(""))
            blocking.close()
            for client in clients:
                client.close()

    run(test)


def test_client_is_cut_off_when_it_reads_nothing(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (_tested, server, path):
            healthy = AsyncPacketClient(SERVICE, path)
            await healthy.connect(LIMIT_S)
            with raw(path) as lazy:
                lazy.send(service.encode_request(SERVICE, 1, "say", Text("x")))
                assert await asyncio.to_thread(lazy.recv, 65536)
                sent = 0
                while len(server._clients) == 2:
                    server.broadcast_event("said", Text("x" * 20_000), fds=[0])
                    sent += 1
                    await asyncio.sleep(0)
                    assert sent < 10_000
                assert sent > packet_stream.MAX_QUEUED_PACKETS
            assert (await healthy.call("say", Text("b"), timeout_s=LIMIT_S))[0] == Text("b")
            healthy.close()

    run(test)


def test_queued_packets_arrive_in_order_when_the_peer_reads_late(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (_tested, server, path):
            with raw(path) as late:
                late.send(service.encode_request(SERVICE, 1, "say", Text("x")))
                assert await asyncio.to_thread(late.recv, 65536)
                for number in range(60):
                    server.broadcast_event("said", Text(f"{number:05}" * 2000), fds=[0])
                for number in range(60):
                    packet, fds = await asyncio.to_thread(packet_stream.receive_packet, late)
                    assert len(fds) == 1
                    close_fds(fds)
                    message = service.decode_from_service(SERVICE, packet)
                    assert message == service.Event("said", Text(f"{number:05}" * 2000))

    run(test)


def test_request_is_answered_or_cut_off_when_it_is_malformed(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving(run_dir) as (tested, _server, path):
            with raw(path) as connection:
                connection.sendmsg(
                    [b'{"id":9,"op":"say","args":{"text":5}}'],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("2i", 0, 0))],
                )
                reply = json.loads(await asyncio.to_thread(connection.recv, 65536))
                assert (reply["id"], reply["error"]["code"]) == (9, "protocol")
                connection.send(service.encode_request(SERVICE, 10, "say", Text("x")))
                assert json.loads(await asyncio.to_thread(connection.recv, 65536))["id"] == 10
                connection.send(b'{"id":')
                assert await asyncio.to_thread(connection.recv, 65536) == b""
            good = service.encode_request(SERVICE, 11, "say", Text("x"))
            for packet, count in ((good + b" " * 65536, 1), (good, MAX_FDS + 1), (good, 60)):
                with raw(path) as connection:
                    fds = struct.pack(f"{count}i", *([0] * count))
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                    connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                    assert await asyncio.to_thread(connection.recv, 65536) == b""
            assert tested.entered == 1

    with caplog.at_level(logging.INFO):
        run(test)
    assert "malformed request" in caplog.text
    assert "larger than" in caplog.text
    assert f"more than {MAX_FDS} descriptors" in caplog.text


def test_client_is_refused_when_its_uid_is_not_allowed(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert os.getuid() == 0, "only root can become another user"

    async def test() -> None:
        async with serving(run_dir, allows=lambda uid: uid == 0) as (tested, _server, path):
            os.chmod(run_dir, 0o755)
            # Connected through an inherited descriptor: the temp folder's parents are closed to other users.
            directory = os.open(run_dir, os.O_PATH)
            code = (
                "import os, socket, sys; os.fchdir(int(sys.argv[1])); os.setgroups([]);"
                f"os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY});"
                "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(5);"
                "s.connect('test.sock'); sys.exit(0 if s.recv(10) == b'' else 1)"
            )
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", "-c", code, str(directory), pass_fds=(directory,)
            )
            os.close(directory)
            assert await asyncio.wait_for(child.wait(), LIMIT_S) == 0
            assert tested.entered == 0
            client = AsyncPacketClient(SERVICE, path)
            await client.connect(LIMIT_S)
            assert (await client.call("say", Text("b"), timeout_s=LIMIT_S))[0] == Text("b")
            client.close()

    run(test)
    assert f"uid {NOBODY} may not use it" in caplog.text


def test_client_is_refused_when_there_are_too_many(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir, max_clients=1) as (_tested, _server, path):
            first, second = AsyncPacketClient(SERVICE, path), AsyncPacketClient(SERVICE, path)
            await first.connect(LIMIT_S)
            await first.call("say", Text(""), timeout_s=LIMIT_S)
            await second.connect(LIMIT_S)
            await second.closed
            with pytest.raises(UnavailableError, match="vtpm-test is not connected"):
                await second.call("say", Text(""), timeout_s=LIMIT_S)
            await first.call("say", Text(""), timeout_s=LIMIT_S)
            first.close()

    run(test)


def test_handler_goes_on_when_its_client_goes_away(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (tested, _server, path):
            with raw(path) as connection:
                connection.send(service.encode_request(SERVICE, 1, "end", Nothing()))
                while not tested.entered:
                    await asyncio.sleep(0)
            assert not tested.ended.is_set()
            tested.gate.set()
            await tested.ended.wait()

    run(test)


def test_handlers_are_cancelled_when_the_server_closes(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (tested, server, path):
            client = AsyncPacketClient(SERVICE, path)
            await client.connect(LIMIT_S)
            call = asyncio.create_task(client.call("end", Nothing(), timeout_s=LIMIT_S))
            while not tested.entered:
                await asyncio.sleep(0)
            await server.close()
            await tested.ended.wait()
            with pytest.raises(UnavailableError, match="vtpm-test went away"):
                await call
            assert "closed" in await client.closed

    run(test)


def test_call_fails_and_the_next_connects_again_when_the_service_dies(run_dir: Path) -> None:
    behaviours = iter([lambda c: c.recv(65536), echo, echo])
    with fake_service(run_dir, lambda connection: next(behaviours)(connection), times=3) as path:
        client = PacketClient(SERVICE, path)
        with pytest.raises(UnavailableError, match="vtpm-test went away during 'say'"):
            client.call("say", Text("a"), timeout_s=LIMIT_S)
        # The service closes after each answer, so the third call finds the second's connection broken.
        for text in ("b", "c"):
            assert client.call("say", Text(text), timeout_s=LIMIT_S) == (Text(text), ())
        client.close()


def test_call_fails_when_the_service_is_silent_or_absent(run_dir: Path) -> None:
    done = threading.Event()
    with fake_service(run_dir, lambda _connection: done.wait(LIMIT_S) and None) as path:
        client = PacketClient(SERVICE, path)
        with pytest.raises(UnavailableError, match=r"did not answer 'say' within 0\.1 s"):
            client.call("say", Text("a"), timeout_s=0.1)
        done.set()
    with pytest.raises(UnavailableError, match="vtpm-test does not answer"):
        client.call("say", Text("a"), timeout_s=LIMIT_S)
    path.unlink()
    with pytest.raises(UnavailableError, match="vtpm-test does not answer"):
        client.call("say", Text("a"), timeout_s=LIMIT_S)


def test_connecting_ends_in_time_when_the_service_accepts_nobody(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as stack:
        path = run_dir / "full.sock"
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(raw(path))
        with pytest.raises(UnavailableError, match="vtpm-test"):
            PacketClient(SERVICE, path).call("say", Text("a"), timeout_s=0.1)


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"id":77,"ok":{"text":"x"}}',
        b'{"id":1,"ok":{"text":5}}',
        b'{"event":"sung","args":{}}',
        b" " * 65537,
    ],
)
def test_answer_is_refused_when_it_is_malformed(run_dir: Path, answer: bytes) -> None:
    def answering(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        connection.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
        connection.recv(1)

    with fake_service(run_dir, answering) as path:
        client = PacketClient(SERVICE, path)
        with pytest.raises(ProtocolError):
            client.call("say", Text("a"), timeout_s=LIMIT_S)
        client.close()

    path.unlink()

    async def test() -> None:
        client = AsyncPacketClient(SERVICE, path)
        await client.connect(LIMIT_S)
        call = asyncio.create_task(client.call("say", Text("a"), timeout_s=0.5))
        with pytest.raises((ProtocolError, UnavailableError)):
            await call
        client.close()

    with fake_service(run_dir, answering) as path:
        run(test)


def test_connecting_is_refused_when_the_sockets_mode_forbids_it(run_dir: Path) -> None:
    lock = ServiceLock(run_dir, "test")
    with lock.bind_service_socket(run_dir / "test.sock", 0o600):
        directory = os.open(run_dir, os.O_PATH)
        os.chmod(run_dir, 0o755)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.fchdir(directory)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                PacketClient(SERVICE, Path("test.sock")).connect(LIMIT_S)
            except AccessDeniedError:
                status = 0
            finally:
                os._exit(status)
        os.close(directory)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lock.release()


def test_service_goes_on_when_it_ran_out_of_descriptors(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packet_socket, "_ACCEPT_PAUSE_S", 0.05)

    async def test() -> None:
        async with serving(run_dir) as (_tested, server, path):
            with raw(path) as early, raw(path) as late:
                request = service.encode_request(SERVICE, 1, "say", Text("x"))
                early.send(request)
                assert await asyncio.to_thread(early.recv, 65536)
                while len(server._clients) < 2:
                    await asyncio.sleep(0)
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                third = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                third.settimeout(LIMIT_S)
                # Below the lowest free number, so nothing new can be opened.
                free = os.dup(0)
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
                try:
                    third.connect(str(path))
                    late.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
                    while "cannot accept" not in caplog.text or len(server._clients) > 1:
                        await asyncio.sleep(0)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                with third:
                    third.send(request)
                    assert await asyncio.to_thread(third.recv, 65536)

    with caplog.at_level(logging.INFO):
        run(test)
    assert "than this process can open" in caplog.text


def test_handler_that_was_just_begun_closes_its_descriptors_when_the_server_closes(run_dir: Path) -> None:
    async def test() -> None:
        async with serving(run_dir) as (tested, server, path):
            with raw(path) as connection:
                request = service.encode_request(SERVICE, 1, "end", Nothing())
                connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
                while not server._tasks:
                    await asyncio.sleep(0)
                await server.close()
                assert tested.ended.is_set()

    run(test)


def test_peer_is_cut_off_when_there_are_no_descriptors_left_to_keep_its_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ended: list[str] = []
        kept: list[int] = []

        def dup(fd: int) -> int:
            if kept:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            kept.append(real(fd))
            return kept[0]

        with theirs:
            stream = packet_stream.PacketStream(ours, lambda _packet, _fds: None, ended.append)
            while not stream._queue:
                stream.send(bytes(60_000))
            real = os.dup
            monkeypatch.setattr(os, "dup", dup)
            stream.send(b"x", (theirs.fileno(), theirs.fileno()))
            assert len(ended) == 1
            assert "Too many open files" in ended[0]
            assert not stream.is_open
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(kept[0])

    asyncio.run(test())
