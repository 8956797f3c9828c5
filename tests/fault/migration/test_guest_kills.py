"""A guest and its vTPM go between two hosts whose managers are killed: it goes on at one of them, and misses nothing.

The hosts are real; QEMU is played, in the order in which it carries state, so that a round takes a second.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import pytest

from tests.fault.test_import_kills import killed_at
from tests.support.host import Host, wait_ended
from tests.support.two_hosts import Peers, known_to_each_other
from tests.support.vtpmd import PlayedEmulator
from vtpm.errors import VtpmError
from vtpm.tpm.power_commands import STARTUP
from vtpm.tpm.types import Startup, StateKind, TpmVersion
from vtpm.wire.api_migrations import Guest, Phase, ReceiveVtpm
from vtpm.wire.emulator import GetStateBlob, Init, InitFlags, LockStorage, SetStateBlob, StateFlags

NAMES = ("host-a", "host-b")
SETTLE_S = 60.0
DYING_S = 0.5
OK, RETRY = bytes(4), bytes.fromhex("00000922")
_AUTH = bytes.fromhex("00000009400000090000000000")
_PCR, _INDEX, _OWNER = bytes.fromhex("00000010"), bytes.fromhex("01500001"), bytes.fromhex("40000001")


def _command(code: int, handles: bytes, parameters: bytes, auth: bytes = _AUTH) -> bytes:
    body = code.to_bytes(4) + handles + auth + parameters
    return (b"\x80\x02" if auth else b"\x80\x01") + (len(body) + 6).to_bytes(4) + body


EXTEND = _command(0x182, _PCR, bytes.fromhex("00000001000b") + bytes([7] * 32))
READ_PCR = _command(0x17E, b"", bytes.fromhex("00000001000b03000001"), b"")
DEFINE_COUNTER = _command(0x12A, _OWNER, bytes.fromhex("0000000e") + _INDEX + bytes.fromhex("000b0206001600000008"))
INCREMENT = _command(0x134, _OWNER + _INDEX, b"")
READ_COUNTER = _command(0x14E, _OWNER + _INDEX, bytes.fromhex("00080000"))


class _Control:
    """A guest link by the path of its control socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    def connect(self, _: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self._path)
        sock.settimeout(SETTLE_S)
        return sock


class Journey:
    """A guest and its vTPM between two hosts.

    Args:
        at: where they run.
    """

    def __init__(self, peers: Peers, emulators: contextlib.ExitStack) -> None:
        self.peers = peers
        self.emulators = emulators
        self.at = "host-a"
        self.stayed = self.moved = 0
        with self.here.client() as client:
            self.uuid = UUID(str(client.create("web1").uuid))
            control = client.start("web1").control_socket
        self.emulator = emulators.enter_context(PlayedEmulator(_Control(control)))
        assert self.emulator.control(Init(0)).result == 0
        self.pcr, self.counter = bytes(32), 0
        for command in (STARTUP[TpmVersion.V2_0, Startup.CLEAR], DEFINE_COUNTER):
            self.say(self.emulator, command)
        self.beat()
        self.counter = self.counted()

    @property
    def other(self) -> str:
        return NAMES[self.at == NAMES[0]]

    @property
    def here(self) -> Host:
        return self.peers.hosts[self.at]

    @property
    def there(self) -> Host:
        return self.peers.hosts[self.other]

    def say(self, emulator: PlayedEmulator, command: bytes, limit_s: float = SETTLE_S) -> bytes:
        """Have a command done, as a driver does that is told to come again; returns the response."""
        deadline_s = time.monotonic() + limit_s
        while True:
            response = emulator.tpm(command)
            if response[6:10] != RETRY:
                assert response[6:10] == OK, response.hex()
                return response
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the TPM does not go on\n{self.logs()}")

    def beat(self) -> None:
        """Use the TPM: once without a word to the manager, once with."""
        self.say(self.emulator, EXTEND)
        self.pcr = sha256(self.pcr + bytes([7] * 32)).digest()
        self.say(self.emulator, INCREMENT)
        self.counter += 1

    def counted(self) -> int:
        return int.from_bytes(self.say(self.emulator, READ_COUNTER)[16:24])

    def check(self) -> None:
        """All that the guest was ever told is so, and nobody else runs the vTPM."""
        assert self.say(self.emulator, READ_PCR)[-32:] == self.pcr
        assert self.counted() == self.counter
        deadline_s = time.monotonic() + SETTLE_S
        while self.states() != {self.at: "running"}:
            assert time.monotonic() < deadline_s, f"{self.states()}\n{self.logs()}"
            time.sleep(0.1)
        self.beat()

    def states(self) -> dict[str, str]:
        found = dict[str, str]()
        for name, host in self.peers.hosts.items():
            with host.client() as client:
                found.update((name, vtpm.state) for vtpm in client.list())
        return found

    def go(self, victim: Host, call: str, number: int) -> bool:
        """Try to have the guest go, while a manager is killed at its n-th such call; returns whether it was."""
        self._give_up()
        with self.there.client() as client:
            control = client.receive("web1", ReceiveVtpm(self.uuid)).control_socket
        waiting = self.emulators.enter_context(PlayedEmulator(_Control(control)))
        pid = victim.pid("manager")
        assert pid is not None
        arrived = False
        with killed_at(victim, call, number, "-f"):
            with contextlib.suppress(VtpmError), self.here.client() as client:
                client.migrate("web1", self.other, guest=Guest.FOREIGN)
            sealed = self.emulator.control(GetStateBlob(StateFlags.DECRYPTED, StateKind.PERMANENT, 0))
            if sealed.result == 0:
                assert waiting.control(SetStateBlob(StateFlags.ENCRYPTED, StateKind.PERMANENT, sealed.data)).result == 0
                arrived = waiting.control(Init(InitFlags.DELETE_VOLATILE)).result == 0
            # From here on QEMU never runs both: at the source again, or at the destination for good.
            with contextlib.suppress(TimeoutError):
                if arrived:
                    self.say(waiting, READ_PCR, 3.0)
        # One that was killed dies once nobody traces it any more.
        killed = wait_ended(pid, DYING_S)
        if killed:
            # Reaps it.
            victim.kill("manager")
            victim.start()
        self._settle(waiting, arrived=arrived)
        return killed

    def _settle(self, waiting: PlayedEmulator, *, arrived: bool) -> None:
        left = self.emulator
        if arrived:
            self.moved += 1
            self.emulator, self.at = waiting, self.other
        else:
            self.stayed += 1
            left = waiting
            self.emulator.control(LockStorage(0))
        self.check()
        # Who has lost it has lost it, whatever is tried.
        if arrived:
            with contextlib.suppress(OSError, AssertionError):
                assert left.control(LockStorage(0)).result != 0
                assert left.tpm(EXTEND)[6:10] not in (OK, b"")
        left.close()

    def _give_up(self) -> None:
        """Have nobody wait for it any more, of an attempt before."""
        with self.there.client() as client:
            for one in client.migrations():
                if one.name == "web1" and one.phase is Phase.EXPECTED:
                    client.discard_arrival("web1")

    def logs(self) -> str:
        return "\n".join(f"{name}:\n{host.log()[-3000:]}" for name, host in self.peers.hosts.items())


@pytest.fixture(scope="module")
def journey() -> Iterator[Journey]:
    with (
        tempfile.TemporaryDirectory(prefix="vtpm-two-") as folder,
        known_to_each_other(Path(folder)) as peers,
        contextlib.ExitStack() as emulators,
    ):
        yield Journey(peers, emulators)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize(
    "call",
    ["fdatasync", pytest.param("pwrite64", marks=pytest.mark.soak), pytest.param("sendto", marks=pytest.mark.soak)],
)
def test_guest_misses_nothing_and_goes_on_at_one_host_when_a_manager_is_killed_at_any_such_call(
    journey: Journey, side: str, call: str
) -> None:
    journey.stayed = journey.moved = 0
    for number in itertools.count(1):
        victim = journey.here if side == "source" else journey.there
        if not journey.go(victim, call, number):
            break
    # The last one went through.
    assert journey.moved >= 1
    print(f"{side} killed at {number - 1} {call}: {journey.stayed} stayed, {journey.moved} moved")
    assert number > 2
