"""A vtpmd without the host around it: the instance's own program, its manager and its launcher played by the test.

Unconfined, so that what is tested is the instance alone, in a fraction of the time that a host needs to start.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from tests.support.host import wait_ended
from vtpm.instance.main import prepare
from vtpm.launcher.slot import create_journal
from vtpm.tpm.types import Startup, StateKind, TpmVersion
from vtpm.wire.emulator import Command, Plain, Reply, Request, decode_reply, encode_request, is_whole_reply
from vtpm.wire.framing import Deframer, encode_frame
from vtpm.wire.hold import HoldType, ParkedKind, decode_hold
from vtpm.wire.instance_spec import InstanceArgs, InstanceFd, Role
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    SESSION_BYTES,
    Activated,
    Arrive,
    Depart,
    Direction,
    Done,
    Hello,
    Load,
    LoadError,
    MoveError,
    MovePart,
    Permit,
    PowerOn,
    Ready,
    Retry,
    Return,
    Returned,
    SaveBegin,
    SaveChunk,
    Saved,
    SaveError,
    Shutdown,
    ShutdownMode,
    ToInstance,
    ToManager,
    decode_message,
    encode_message,
)
from vtpm.wire.manager_link_moves import BlobReceiver, CompletedBlob, sealed_messages
from vtpm.wire.manager_link_peers import SaveReceiver, state_messages

TIMEOUT_S = 20.0
M = TypeVar("M", bound=ToManager)


class PlayedMoves:
    """What a manager says of moves. All is refused until it is told otherwise; what is sealed is kept, and named."""

    def __init__(self) -> None:
        self.departs = False
        """Whether Depart is granted."""
        self.returns: Retry | None = Retry.LATER
        """How Return is refused; None: it is granted."""
        self.arrives = False
        """Whether Arrive is granted for what a manager of the same key has sealed."""
        self.silent = False
        """It does not answer at all."""
        self.has_load = True
        """Whether a Load is answered; not while the vTPM is expected."""
        self.sealed: dict[bytes, dict[StateKind, bytes]] = {}
        """By what goes over; share it between two managers to let a vTPM move."""
        self.extra_bytes = 20_000
        self._blobs = BlobReceiver()

    def answer(self, message: Any, state: dict[StateKind, bytes]) -> list[ToInstance]:
        """Return the answer to a message, if it is about moves and whole."""
        if isinstance(message, Return):
            return [self._refused(message.seq, self.returns)] if self.returns is not None else [Returned(message.seq)]
        blob = self._blobs.receive(message)
        if blob is None or self.silent:
            return []
        return self._depart(blob, state) if isinstance(blob.head, Depart) else self._arrive(blob)

    def _depart(self, blob: CompletedBlob, state: dict[StateKind, bytes]) -> list[ToInstance]:
        if not self.departs:
            return [self._refused(blob.head.seq, Retry.FINAL)]
        sealed = os.urandom(self.extra_bytes)
        self.sealed[sealed] = state | {StateKind.VOLATILE: blob.data}
        return list(sealed_messages(blob.head.seq, sealed))

    def _arrive(self, blob: CompletedBlob) -> list[ToInstance]:
        opened = self.sealed.get(blob.data) if self.arrives else None
        if opened is None:
            return [self._refused(blob.head.seq, Retry.FINAL)]
        return list(state_messages(blob.head.seq, opened))

    @staticmethod
    def _refused(seq: int, retry: Retry) -> MoveError:
        return MoveError(seq, retry, "migration", "no migration of this vTPM is under way")


class PlayedManager:
    """A manager that keeps state in memory. `keeps` False: it refuses each save, as a full store does."""

    def __init__(self, sock: socket.socket, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self.state: dict[StateKind, bytes] = {}
        self.keeps = True
        self.moves = PlayedMoves()
        self.told: list[ToManager] = []
        """All that came, in order."""
        self._sock = sock
        self._seq = 0
        self._came = threading.Condition()
        self._saves = SaveReceiver()
        self._reads = threading.Event()
        self._reads.set()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def hello(self) -> Ready:
        """Say Hello and return the answer."""
        session = os.urandom(SESSION_BYTES)
        self._send(Hello(session))
        return self.wait_for(Ready, lambda ready: ready.session == session)

    def power_on(self, startup: Startup = Startup.NONE) -> Done:
        """Ask for power-on and return the answer."""
        return self._ask(PowerOn(self._next(), startup))

    def shut_down(self, mode: ShutdownMode = ShutdownMode.ORDERLY) -> Done:
        """Ask for the end and return the answer."""
        return self._ask(Shutdown(self._next(), mode))

    def activate(self, arrival: int | None = None) -> None:
        """Say that what has arrived may run; of the last Arrive if none is named."""
        self._send(Activated(self.of(Arrive)[-1].seq if arrival is None else arrival))

    def wait_for(self, kind: type[M], fits: Callable[[M], bool] = lambda _: True) -> M:
        """Return the first message of a class that fits, once it has come."""

        def found() -> M | None:
            return next((one for one in self.told if isinstance(one, kind) and fits(one)), None)

        with self._came:
            assert self._came.wait_for(found, self._timeout_s), f"no {kind.__name__} came, but {self.told}"
            message = found()
            assert message is not None
            return message

    def of(self, kind: type[M]) -> list[M]:
        """Return what has come of one class."""
        with self._came:
            return [one for one in self.told if isinstance(one, kind)]

    def pause(self) -> None:
        """Read no more after one read that is under way, as a manager that is dead while the launcher keeps its end."""
        self._reads.clear()

    def go_on(self) -> None:
        """Read again."""
        self._reads.set()

    def join(self) -> None:
        """Wait until the link has ended."""
        self._reads.set()
        self._thread.join(TIMEOUT_S)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _ask(self, question: PowerOn | Shutdown) -> Done:
        self._send(question)
        return self.wait_for(Done, lambda done: done.seq == question.seq)

    def _send(self, message: ToInstance) -> None:
        self._sock.sendall(encode_frame(encode_message(message)))

    def _serve(self) -> None:
        deframer = Deframer(MAX_BODY_BYTES)
        with contextlib.suppress(OSError):
            while self._reads.wait() and (data := self._sock.recv(65536)):
                for body in deframer.feed(data):
                    assert isinstance(body, bytes), body
                    message = decode_message(body, Direction.TO_MANAGER)
                    self._answer(message)
                    with self._came:
                        self.told.append(message)
                        self._came.notify_all()

    def _answer(self, message: Any) -> None:
        if isinstance(message, Depart | Return | Arrive | MovePart):
            if not self.moves.silent:
                for answer in self.moves.answer(message, self.state):
                    self._send(answer)
        elif isinstance(message, Load) and not self.moves.has_load:
            self._send(LoadError(message.seq, Retry.FINAL, "conflict", "the vTPM is not here"))
        elif isinstance(message, Load):
            answers = state_messages(message.seq, self.state) if self.state else [Permit(message.seq, bytes([1] * 16))]
            for answer in answers:
                self._send(answer)
        elif isinstance(message, SaveBegin | SaveChunk) and (save := self._saves.receive(message)) is not None:
            if not self.keeps:
                self._send(SaveError(save.seq, Retry.FINAL, "store", "no space left"))
                return
            if save.data:
                self.state[save.kind] = save.data
            else:
                self.state.pop(save.kind, None)
            self._send(Saved(save.seq))


class Vtpmd:
    """A running instance and its links' other ends. A context manager.

    Args:
        version: of its TPM.
        predecessor: killed already; its links' parked ends, journals and sockets go on.
    """

    def __init__(self, version: TpmVersion = TpmVersion.V2_0, predecessor: Vtpmd | None = None) -> None:
        self._version = version
        self._folder = None if predecessor else tempfile.TemporaryDirectory(prefix="vtpmd-")
        self.folder: Path = predecessor.folder if predecessor else Path(self._folder.name)  # type: ignore[union-attr]
        self._hold, their_hold = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link, their_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if predecessor is None:
            self.listeners = [_listener(self.folder / name) for name in ("data", "control")]
            self.journals = [create_journal(), create_journal()]
        else:
            self.listeners, self.journals = predecessor.listeners, predecessor.journals
        fds = [their_hold.fileno(), their_link.fileno(), *(one.fileno() for one in self.listeners), *self.journals]
        self._parked: dict[ParkedKind, int] = {}
        if predecessor is not None:
            self._parked, predecessor._parked = predecessor._take_parked(), {}
        fds += [self._parked[kind] for kind in ParkedKind if kind in self._parked]
        args = InstanceArgs(version, Role.SUCCESSOR if predecessor else Role.FIRST)
        self.log = (self.folder / "log").open("a+")
        self.process = self._start(args, fds)
        their_hold.close()
        their_link.close()
        self.manager = PlayedManager(self._link)
        if predecessor is not None:
            self.manager.state = predecessor.manager.state

    def _start(self, args: InstanceArgs, fds: list[int]) -> subprocess.Popen[bytes]:
        """Start what is in the vtpmd's place; the descriptors are in the order of InstanceFd."""
        return self._run("tests.support.vtpmd", json.dumps(args.to_json()), fds)

    def _run(self, module: str, args: str, fds: list[int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", module, args, json.dumps(fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stderr=self.log,
        )

    def successor(self) -> Self:
        """Return another of its kind in its place; it has been killed or has ended."""
        return type(self)(self._version, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._folder is not None:
            for listener in self.listeners:
                listener.close()
            for journal in self.journals:
                os.close(journal)
            self._folder.cleanup()

    def close(self) -> None:
        """End the process and let go of what is its own, but not of what its successors go on with. Safe to repeat."""
        if self._hold.fileno() < 0:
            return
        self.kill()
        self.log.close()
        for fd in self._take_parked().values():
            os.close(fd)
        self._hold.close()

    def _take_parked(self) -> dict[ParkedKind, int]:
        """Take what it has had kept, as the launcher does."""
        self._hold.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, fds, _, _ = socket.recv_fds(self._hold, 16, 1)
                if not packet:
                    break
                message = decode_hold(packet, len(fds))
                if (old := self._parked.pop(message.kind, None)) is not None:
                    os.close(old)
                if message.type is HoldType.PARK:
                    self._parked[message.kind] = fds[0]
        return self._parked

    def kill(self) -> None:
        """End the process with SIGKILL, and its links; nothing when that is done already."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self.manager.join()
        self._link.close()

    def log_lines(self) -> list[str]:
        """What it has written to its log so far."""
        return (self.folder / "log").read_text().splitlines()

    def resident_bytes(self) -> int:
        """How much memory it has now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def processor_s(self) -> float:
        """How much processor time it has used so far, in seconds."""
        return processor_s(self.process.pid)

    def exit_status(self) -> int:
        """Wait for its end and return the status."""
        assert wait_ended(self.process.pid, TIMEOUT_S)
        return self.process.wait(TIMEOUT_S)

    def connect(self, name: str) -> socket.socket:
        """Connect to its "data" or "control" socket."""
        sock = socket.socket(socket.AF_UNIX)
        # With a time limit, connect fails at once when the queue of the listener is full.
        sock.connect(str(self.folder / name))
        sock.settimeout(TIMEOUT_S)
        return sock


class Reachable(Protocol):
    """What has the two sockets of a guest link."""

    def connect(self, name: str) -> socket.socket:
        """Connect to its "data" or "control" socket."""
        ...


class PlayedEmulator:
    """Speaks to a vTPM as QEMU does: one request at a time. A context manager."""

    def __init__(self, vtpmd: Reachable) -> None:
        self.control_socket = vtpmd.connect("control")
        self.data, self.parked_data = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.data.settimeout(TIMEOUT_S)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.parked_data.fileno()]))]
        self.control_socket.sendmsg([encode_request(Plain(Command.SET_DATAFD))], rights)
        assert self._reply(Command.SET_DATAFD).result == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go, as QEMU does when it ends; again does nothing."""
        for sock in (self.control_socket, self.data, self.parked_data):
            sock.close()

    def control(self, request: Request) -> Reply:
        """Send a control request and take its answer."""
        self.control_socket.sendall(encode_request(request))
        return self._reply(request.command)

    def tpm(self, command: bytes) -> bytes:
        """Send a TPM command and take its response."""
        self.data.sendall(command)
        return self.data.recv(8192)

    def _reply(self, command: Command) -> Reply:
        data = b""
        while not is_whole_reply(command, data):
            part = self.control_socket.recv(4096)
            assert part, "the vtpmd hung up"
            data += part
        return decode_reply(command, data)


def processor_s(pid: int) -> float:
    """Return how much processor time a process has used so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def run_prepared(prepare: Callable[[Any, tuple[int, ...]], Callable[[], int]], args: str, fds: Sequence[int]) -> int:
    """Be the process: its descriptors at the numbers of InstanceFd, then as the confinement program starts it."""
    high = [os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]
    for number, fd in zip(InstanceFd, high, strict=False):
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    os.closerange(InstanceFd(len(fds) + 2) + 1, 200)
    return prepare(_Spec(json.loads(args)), tuple(range(3, 3 + len(fds))))()


class _Spec:
    """What `prepare` needs of a ConfinementSpec."""

    def __init__(self, target_args: dict[str, Any]) -> None:
        self.target_args = target_args


if __name__ == "__main__":
    os._exit(run_prepared(prepare, sys.argv[1], json.loads(sys.argv[2])))
