"""Clients that misbehave, on real vTPMs: each gets a clear refusal, its vTPM goes on and a sibling notices nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.control_driver import ControlClient
from tests.security.tpm_commands import COMMANDS_20
from tests.support.host import Host
from vtpm.client.manager_client import ManagerClient
from vtpm.tpm.types import TpmVersion
from vtpm.wire.emulator import Command, Init, Plain, SetLocality, encode_request

TIMEOUT_S = 30.0
MOST_STALL_S = 2.0
"""Far above what a command takes; below what a driver waits. The machine may be busy with other tests."""
GET_RANDOM = COMMANDS_20["GetRandom"]
STARTUP = COMMANDS_20["Startup"]
READ_CLOCK = COMMANDS_20["ReadClock"]
RC_INITIALIZE, RC_COMMAND_SIZE, RC_RETRY, RC_CANCELED, RC_LOCALITY = 0x100, 0x142, 0x922, 0x909, 0x907
EXTEND_17 = bytes.fromhex("8002 00000041 00000182 00000011 00000009 40000009 0000 00 0000 00000001 000b") + bytes(32)


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(TIMEOUT_S)
    sock.connect(os.fspath(path))
    return sock


def _code(response: bytes) -> int:
    return int(struct.unpack_from(">I", response, 6)[0])


def _ask(sock: socket.socket, command: bytes) -> bytes:
    sock.sendall(command)
    return sock.recv(4096)


def _prefixed(sock: socket.socket, locality: int, command: bytes) -> bytes:
    sock.sendall(struct.pack(">IBI", 8, locality, len(command)) + command)
    (size,) = struct.unpack(">I", sock.recv(4, socket.MSG_WAITALL))
    response = sock.recv(size, socket.MSG_WAITALL)
    assert sock.recv(4, socket.MSG_WAITALL) == bytes(4)
    return response


def _until_free(path: Path, command: bytes) -> bytes:
    """Ask as a new client, again while the one before is being let go; the last answer."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        with _connect(path) as sock:
            response = _ask(sock, command)
        if _code(response) != RC_RETRY or time.monotonic() > deadline_s:
            return response


class Vtpm:
    """A running vTPM by its sockets."""

    def __init__(self, client: ManagerClient, name: str, version: TpmVersion = TpmVersion.V2_0) -> None:
        client.create(name, tpm_version=version)
        shown = client.start(name)
        self.name = name
        self.pid = shown.pid
        self.data = Path(shown.tcti.removeprefix("swtpm:path="))
        self.control = Path(shown.control_socket)


class Sibling(threading.Thread):
    """Asks another vTPM for random bytes all the time."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path = path
        self.ending = threading.Event()
        self.answered = threading.Event()
        self.longest_s = 0.0
        self.problem = ""

    def run(self) -> None:
        try:
            with _connect(self._path) as sock:
                assert _code(_ask(sock, STARTUP)) in (0, RC_INITIALIZE)
                while not self.ending.wait(0.005):
                    begin_s = time.monotonic()
                    response = _ask(sock, GET_RANDOM)
                    self.longest_s = max(self.longest_s, time.monotonic() - begin_s)
                    assert _code(response) == 0, response.hex()
                    self.answered.set()
        except (OSError, AssertionError) as error:
            self.problem = repr(error)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[ManagerClient]:
    with host.client() as client:
        yield client


@pytest.fixture(scope="module")
def sibling_path(client: ManagerClient) -> Path:
    return Vtpm(client, "sibling").data


@pytest.fixture
def vtpm(client: ManagerClient, sibling_path: Path, request: pytest.FixtureRequest) -> Iterator[Vtpm]:
    """A vTPM to misbehave with, while a sibling is asked all the time."""
    vtpm = Vtpm(client, "t" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12])
    sibling = Sibling(sibling_path)
    sibling.start()
    try:
        yield vtpm
        # After all that the test did, too.
        sibling.answered.clear()
        assert sibling.answered.wait(TIMEOUT_S), sibling.problem
        shown = client.show(vtpm.name)
        assert (shown.state, shown.pid) == ("running", vtpm.pid)
    finally:
        sibling.ending.set()
        sibling.join(TIMEOUT_S)
        # The next test's sibling must not be refused as a second client.
        _until_free(sibling_path, GET_RANDOM)
    assert sibling.problem == ""
    assert sibling.longest_s < MOST_STALL_S


def _serves(vtpm: Vtpm) -> bool:
    """Whether a new client is answered, by the TPM itself."""
    return _code(_until_free(vtpm.data, STARTUP)) in (0, RC_INITIALIZE)


@contextlib.contextmanager
def _qemu(vtpm: Vtpm) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-machine", "q35,accel=tcg"),
            *("-chardev", f"socket,id=chr,path={vtpm.control}", "-tpmdev", "emulator,id=tpm,chardev=chr"),
            *("-device", "tpm-crb,tpmdev=tpm", "-qmp", "stdio"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def _qmp(qemu: subprocess.Popen[bytes], command: bytes) -> bytes:
    assert qemu.stdin is not None and qemu.stdout is not None
    qemu.stdin.write(b'{"execute": "' + command + b'"}\n')
    qemu.stdin.flush()
    return qemu.stdout.readline()


def test_second_qemu_ends_with_an_error_and_the_first_goes_on_when_both_want_one_vtpm(vtpm: Vtpm) -> None:
    with _qemu(vtpm) as first:
        assert first.stdout is not None
        assert b"QMP" in first.stdout.readline()
        assert b"return" in _qmp(first, b"qmp_capabilities")
        with _qemu(vtpm) as second:
            _, said = second.communicate(timeout=TIMEOUT_S)
            assert second.returncode not in (0, None)
            assert b"tpm" in said.lower()
        assert first.poll() is None
        assert b"return" in _qmp(first, b"query-tpm")
    assert _serves(vtpm)


def test_next_client_is_served_when_a_control_message_is_cut_at_any_byte(vtpm: Vtpm) -> None:
    message = encode_request(SetLocality(3))
    for request in (message, encode_request(Init(0)), encode_request(Plain(Command.GET_CAPABILITY))):
        for cut in range(len(request)):
            with _connect(vtpm.control) as sock:
                sock.sendall(request[:cut])
        deadline_s = time.monotonic() + TIMEOUT_S
        with contextlib.ExitStack() as stack:
            while True:
                control = stack.enter_context(ControlClient(vtpm.control))
                answer = control.ask(Plain(Command.GET_CAPABILITY)).reply
                if answer.result == 0:
                    break
                assert time.monotonic() < deadline_s, answer
                control.close()
    assert _serves(vtpm)


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefixed"])
def test_command_size_is_refused_and_the_next_client_served_when_five_megabytes_come(
    vtpm: Vtpm, prefixed: bool
) -> None:
    size = 5 * 1024 * 1024
    command = struct.pack(">HII", 0x8001, size, 0x17B) + bytes(size - 10)
    with _connect(vtpm.data) as sock:
        # The vTPM hangs up while most of it is still to be sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall((struct.pack(">IBI", 8, 0, size) if prefixed else b"") + command[:60000])
        answer = sock.recv(4096)
        assert _code(answer[4:] if prefixed else answer) == RC_COMMAND_SIZE
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(4096) == b""
    with _connect(vtpm.data) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall((struct.pack(">IBI", 8, 0, size) if prefixed else b"") + command)
    assert _serves(vtpm)


def test_second_client_is_refused_and_the_next_served_when_one_is_connected(vtpm: Vtpm) -> None:
    with _connect(vtpm.data) as first:
        assert _code(_ask(first, STARTUP)) == 0
        with _connect(vtpm.data) as second:
            assert _code(_ask(second, GET_RANDOM)) == RC_RETRY
        assert _code(_ask(first, GET_RANDOM)) == 0
    assert _code(_until_free(vtpm.data, GET_RANDOM)) == 0
    with ControlClient(vtpm.control) as control:
        assert control.ask(Plain(Command.GET_CAPABILITY)).reply.result == 0
        with ControlClient(vtpm.control) as other:
            assert other.ask(Plain(Command.GET_CAPABILITY)).reply.result != 0
        assert control.ask(Plain(Command.GET_CAPABILITY)).reply.result == 0


def test_locality_counts_when_the_prefix_names_it(vtpm: Vtpm) -> None:
    with _connect(vtpm.data) as sock:
        assert _code(_prefixed(sock, 0, STARTUP)) == 0
        assert _code(_prefixed(sock, 0, EXTEND_17)) == RC_LOCALITY
        assert _code(_prefixed(sock, 3, EXTEND_17)) == 0


def test_control_channel_answers_and_cancels_when_a_long_command_runs(vtpm: Vtpm) -> None:
    with _connect(vtpm.data) as data, ControlClient(vtpm.control) as control:
        assert _code(_ask(data, STARTUP)) == 0
        canceled = 0
        for number in range(20):
            # Another key each time, or libtpms takes the primes that it keeps.
            command = bytearray(COMMANDS_20["CreatePrimary RSA"])
            unique = struct.pack(">HB", 1, number)
            at = len(command) - 2 - 4 - 2
            command[at:] = unique + bytes(6)
            command[2:6] = struct.pack(">I", len(command))
            size_at = command.index(bytes.fromhex("0001000b")) - 2
            command[size_at : size_at + 2] = struct.pack(">H", len(command) - size_at - 2 - 6)
            data.sendall(command)
            assert control.ask(Plain(Command.GET_CAPABILITY)).reply.result == 0
            assert control.ask(Plain(Command.CANCEL_TPM_CMD)).reply.result == 0
            response = data.recv(4096)
            canceled += _code(response) == RC_CANCELED
            if _code(response) == 0:
                handle = response[10:14]
                assert _code(_ask(data, bytes.fromhex("8001 0000000e 00000165") + handle)) == 0
            else:
                assert _code(response) == RC_CANCELED
        assert canceled > 0
        assert _code(_ask(data, GET_RANDOM)) == 0


@pytest.mark.parametrize(("version", "tag"), [(TpmVersion.V2_0, 0x8001), (TpmVersion.V1_2, 0x00C4)])
def test_version_shows_when_a_powered_off_vtpm_is_probed_as_qemu_does(
    client: ManagerClient, version: TpmVersion, tag: int
) -> None:
    probed = Vtpm(client, f"probe{tag:x}", version)
    ours, theirs = socket.socketpair()
    with ours, ControlClient(probed.control) as control:
        with theirs:
            assert control.ask(Plain(Command.SET_DATAFD), descriptors=[theirs.fileno()]).reply.result == 0
        assert control.ask(Plain(Command.STOP)).reply.result == 0
        ours.settimeout(TIMEOUT_S)
        answer = _ask(ours, READ_CLOCK)
        assert (len(answer), struct.unpack_from(">H", answer)[0]) == (10, tag)
        # QEMU's four-byte body, and the next request in step.
        assert control.ask(SetLocality(1), b"\0\0\0").raw == bytes(4)
        assert control.ask(Init(0)).reply.result == 0
