"""A vtpmd that dies under a guest is followed by one that only fails, until the guest resets (decision record 1)."""

from __future__ import annotations

import array
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest import GuestConfig, Reboot, build_image, checks
from tests.support.guest.guest import Guest
from tests.support.host import Host, kill_process
from tests.unit.engine import commands
from vtpm.client.manager_client import ManagerClient
from vtpm.wire.api import LifeState
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    HashData,
    Init,
    Plain,
    Reply,
    Request,
    SetBufferSize,
    SetLocality,
    decode_reply,
    encode_request,
    is_whole_reply,
)

TIMEOUT_S = 20.0
RC_FAILURE = 0x101
KILLS_PER_VTPM = 4
"""The launcher replaces no instance that died more than five times within a minute."""
VTPMS = 51


class Emulator:
    """Speaks to a vTPM as QEMU does: one request at a time, one answer to each. A context manager."""

    def __init__(self, control_socket: Path) -> None:
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._data, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for sock in (self._control, self._data):
            sock.settimeout(TIMEOUT_S)
        self._control.connect(str(control_socket))
        with theirs:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
            self._control.sendmsg([encode_request(Plain(Command.SET_DATAFD))], rights)
            assert self._reply(Command.SET_DATAFD).result == 0

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._data.close()

    def control(self, request: Request, cuts: tuple[int, ...] = ()) -> Reply:
        """Send a request, in parts when cuts are given, and take its one whole answer."""
        self.send_part(encode_request(request, padding=bytes(3)), cuts)
        return self._reply(request.command)

    def send_part(self, data: bytes, cuts: tuple[int, ...] = ()) -> None:
        """Send on the control channel, in parts, each of which the other side has had time to look at."""
        for begin, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
            if begin:
                self.check_silence(0.002)
            self._control.sendall(data[begin:end])

    def reply_to(self, command: Command) -> Reply:
        """Take the answer to what was sent."""
        return self._reply(command)

    def check_silence(self, for_s: float = 0.05) -> None:
        """Neither channel has an answer too many."""
        poller = select.poll()
        for sock in (self._control, self._data):
            poller.register(sock, select.POLLIN)
        assert not poller.poll(for_s * 1000), "an answer came to no request"

    def send_tpm_part(self, data: bytes) -> None:
        """Send part of a TPM command."""
        self._data.sendall(data)

    def tpm(self, command: bytes) -> bytes:
        """Send a TPM command, or the rest of one, and take its one whole response."""
        self._data.sendall(command)
        response = _exactly(self._data, 10)
        return response + _exactly(self._data, struct.unpack_from(">I", response, 2)[0] - 10)

    def power_on(self) -> None:
        """STOP, INIT and TPM2_Startup, as a reset of a machine leads to."""
        self.control(Plain(Command.STOP))
        assert self.control(Init(0)).result == 0
        # TPM2_Startup is refused from localities 1, 2 and 4.
        assert self.control(SetLocality(0)).result == 0
        assert commands.code_of(self.tpm(commands.startup())) == 0

    def _reply(self, command: Command) -> Reply:
        data = _exactly(self._control, 4)
        while True:
            # An error has its command's fixed fields too.
            poller = select.poll()
            poller.register(self._control, select.POLLIN)
            if is_whole_reply(command, data) and not poller.poll(0):
                return decode_reply(command, data)
            data += _exactly(self._control, 1)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, "the vTPM hung up on its emulator"
        data += part
    return bytes(data)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[ManagerClient]:
    with host.client() as client:
        yield client


def _kill(client: ManagerClient, name: str) -> None:
    pid = client.show(name).pid
    assert pid is not None
    kill_process(pid)
    _await_successor(client, name, pid)


def _await_successor(client: ManagerClient, name: str, dead_pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while client.show(name).pid in (dead_pid, None):
        assert time.monotonic() < deadline, "no successor came"


CUT_REQUESTS: tuple[Request, ...] = (
    Plain(Command.GET_CAPABILITY),
    SetLocality(3),
    HashData(b"measured"),
    SetBufferSize(0),
    GetInfo(0, 0),
    Init(0),
)


def _cut_points() -> list[tuple[Request, int]]:
    return [(request, cut) for request in CUT_REQUESTS for cut in range(1, len(encode_request(request)))]


def test_a_request_has_one_answer_when_it_comes_cut_at_any_byte(client: ManagerClient) -> None:
    client.create("cuts")
    with Emulator(Path(client.start("cuts").control_socket)) as emulator:
        for request, cut in _cut_points():
            assert emulator.control(request, (cut,)).command is request.command
            emulator.check_silence(0)
        for request in CUT_REQUESTS:
            whole = len(encode_request(request))
            emulator.control(request, tuple(range(1, whole)))
            emulator.check_silence(0)


@pytest.mark.timeout(240)
def test_half_a_request_is_answered_once_it_is_whole_when_the_vtpmd_dies_between_its_halves(
    client: ManagerClient,
) -> None:
    for number, request in enumerate(CUT_REQUESTS):
        name = f"half-{number}"
        client.create(name)
        whole = encode_request(request)
        cuts = sorted({1, 3, 4, len(whole) // 2, len(whole) - 1} - {0, len(whole)})[:KILLS_PER_VTPM]
        with Emulator(Path(client.start(name).control_socket)) as emulator:
            emulator.power_on()
            for cut in cuts:
                emulator.send_part(whole[:cut])
                emulator.check_silence(0.01)
                _kill(client, name)
                emulator.check_silence()
                assert commands.code_of(emulator.tpm(commands.get_random(8))) == RC_FAILURE
                emulator.send_part(whole[cut:])
                emulator.reply_to(request.command)
                emulator.check_silence(0)
                emulator.power_on()
        client.stop(name, force=True)


def test_half_a_tpm_command_is_answered_once_it_is_whole_when_the_vtpmd_dies_between_its_halves(
    client: ManagerClient,
) -> None:
    client.create("half-tpm")
    whole = commands.get_random(8)
    with Emulator(Path(client.start("half-tpm").control_socket)) as emulator:
        emulator.power_on()
        for cut in (1, 9, 10, len(whole) - 1)[:KILLS_PER_VTPM]:
            emulator.send_tpm_part(whole[:cut])
            emulator.check_silence(0.01)
            _kill(client, "half-tpm")
            emulator.check_silence()
            assert commands.code_of(emulator.tpm(whole[cut:])) == RC_FAILURE
            emulator.check_silence(0)
            emulator.power_on()
            assert len(emulator.tpm(whole)) == 20


@pytest.mark.timeout(300)
def test_each_request_has_one_answer_when_the_vtpmd_is_killed_at_random_moments(client: ManagerClient) -> None:
    """Over 200 kills under control and data turns: answers stay in step, and no PCR is fresh before INIT."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    kills = 0
    for number in range(VTPMS):
        name = f"guest-{number}"
        client.create(name)
        with Emulator(Path(client.start(name).control_socket)) as emulator:
            emulator.power_on()
            for _ in range(KILLS_PER_VTPM):
                _one_kill(client, name, emulator, generator)
                kills += 1
        client.stop(name, force=True)
    assert kills > 200


def _one_kill(client: ManagerClient, name: str, emulator: Emulator, generator: random.Random) -> None:
    digest = generator.randbytes(32)
    assert commands.code_of(emulator.tpm(commands.pcr_extend(10, digest))) == 0
    extended = commands.pcr_value(emulator.tpm(commands.pcr_read(10)))
    assert emulator.control(SetLocality(generator.randrange(5))).result == 0
    pid = client.show(name).pid
    assert pid is not None
    killer = threading.Timer(generator.random() * 0.02, kill_process, (pid,))
    killer.start()
    init_answered = False
    while True:
        match generator.randrange(10):
            case 0:
                assert emulator.control(Plain(Command.STOP)).result in (0, 9)
                init_answered = emulator.control(Init(0)).result == 0
                if emulator.control(SetLocality(0)).result != 0:
                    break
                code = commands.code_of(emulator.tpm(commands.startup()))
                assert code in (0, RC_FAILURE)
                if not init_answered or code == RC_FAILURE:
                    break
                assert commands.code_of(emulator.tpm(commands.pcr_extend(10, digest))) in (0, RC_FAILURE)
                read = emulator.tpm(commands.pcr_read(10))
                if commands.code_of(read) == RC_FAILURE:
                    break
                extended = commands.pcr_value(read)
            case 1 | 2:
                offset = generator.randrange(4)
                info = emulator.control(GetInfo(0, offset))
                if info.result == 0:
                    assert len(info.data) == info.fields["total"] - offset
            case 3:
                emulator.control(Plain(Command.GET_TPMESTABLISHED))
            case 4:
                read = emulator.tpm(commands.pcr_read(10))
                if commands.code_of(read) == RC_FAILURE:
                    break
                assert commands.pcr_value(read) == extended, "the PCRs are others, and the guest was not reset"
            case _:
                size = generator.randrange(1, 33)
                response = emulator.tpm(commands.get_random(size))
                if commands.code_of(response) == RC_FAILURE:
                    break
                assert len(response) == 12 + size, "the response to another command came"
        if not killer.is_alive() and client.show(name).pid not in (pid, None):
            # Perhaps a reset came after the death, and the TPM is well again.
            break
    killer.join(TIMEOUT_S)
    _await_successor(client, name, pid)
    emulator.check_silence(0.005)
    emulator.power_on()
    assert set(commands.pcr_value(emulator.tpm(commands.pcr_read(10)))) == {0}


def test_an_init_is_carried_out_by_the_successor_when_the_vtpmd_dies_in_it(client: ManagerClient) -> None:
    client.create("init")
    with Emulator(Path(client.start("init").control_socket)) as emulator:
        emulator.power_on()
        pid = client.show("init").pid
        assert pid is not None
        # A stopped process takes nothing; the one killed after it went on had INIT in its socket or its hands.
        for delay_s in (0.0, 0.0005, 0.002):
            emulator.control(Plain(Command.STOP))
            pid = client.show("init").pid
            assert pid is not None
            emulator.send_part(encode_request(Init(0)))
            time.sleep(delay_s)
            kill_process(pid)
            assert emulator.reply_to(Command.INIT).result == 0
            emulator.check_silence(0)
            _await_successor(client, "init", pid)
            if commands.code_of(emulator.tpm(commands.startup())) == RC_FAILURE:
                # INIT was answered before the death, and this is the reset that follows.
                emulator.power_on()
            assert commands.code_of(emulator.tpm(commands.get_random(8))) == 0


def test_locality_is_kept_when_the_vtpmd_dies(client: ManagerClient) -> None:
    client.create("locality")
    with Emulator(Path(client.start("locality").control_socket)) as emulator:
        emulator.power_on()
        assert emulator.control(SetLocality(3)).result == 0
        _kill(client, "locality")
        assert commands.code_of(emulator.tpm(commands.get_random(8))) == RC_FAILURE
        assert emulator.control(Init(0)).result == 0
        # TPM2_Startup and PCR 20 both take locality 3; PCR 20 does not take locality 0 (PC Client profile).
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert commands.code_of(emulator.tpm(commands.pcr_extend(20, bytes(32)))) == 0
        assert emulator.control(SetLocality(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.pcr_extend(20, bytes(32)))) == 0x907


@pytest.mark.timeout(300)
def test_a_real_guest_has_no_tpm_until_it_is_reset_when_its_vtpmd_is_killed(
    host: Host, client: ManagerClient, tmp_path: Path
) -> None:
    client.create("real")
    control = Path(client.start("real").control_socket)
    with Guest(GuestConfig(image=build_image(), tpm_control_socket=control), tmp_path) as guest:
        qemu = guest.process_id
        traces = checks.leave_traces(guest)
        checks.check_extend(guest)
        _kill(client, "real")
        assert guest.run("tpm2_pcrread sha256:14").status != 0, "the guest was given a fresh TPM"
        assert client.show("real").state is LifeState.FAILED
        assert guest.process_id == qemu
        os.kill(qemu, 0)
        guest.reboot(Reboot.HOST)
        checks.check_fresh_pcrs(guest)
        checks.check_traces(guest, traces)
        assert client.show("real").state is LifeState.RUNNING
        before = checks.read_pcrs(guest)
        with_manager = client.show("real").pid
        host.kill("manager")
        assert checks.read_pcrs(guest) == before
        host.start()
        guest.check(f"echo -n kept | tpm2_nvwrite -C o -i - {checks.NV_INDEX:#x}")
        assert guest.check(f"tpm2_nvread -C o -s 4 {checks.NV_INDEX:#x}") == "kept"
        assert client.show("real").pid == with_manager
        assert guest.process_id == qemu
