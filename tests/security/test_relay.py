"""A relay locked in as the launcher starts it: it has all that it needs, and less than a vtpmd."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.relayed import MANAGER_LINK_AT, RelayedVtpmd
from tests.support.vtpmd import TIMEOUT_S, PlayedEmulator
from tests.unit.engine import commands
from vtpm.confine.spawn import SpawnedProcess, spawn, wait_confined
from vtpm.confine.spec import AllowList, ConfinementSpec, UserNamespace
from vtpm.wire.emulator import Command, GetInfo, HashData, Init, Plain, SetBufferSize, SetLocality
from vtpm.wire.instance_spec import InstanceArgs, RelayFd
from vtpm.wire.manager_link import Note

RC_FAILURE = 0x101
UID = 70321
LIBRARIES = ("libtpms", "_libtpms", "libcrypto", "_ssl", "cffi")


class _Process:
    """What a Vtpmd needs of its process, for one that spawn made."""

    def __init__(self, spawned: SpawnedProcess) -> None:
        self._spawned = spawned
        self.pid = spawned.pid
        self.returncode: int | None = None

    def kill(self) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._spawned.pidfd, signal.SIGKILL)

    def wait(self, _: float) -> int:
        if self.returncode is None:
            ended = os.waitid(os.P_PIDFD, self._spawned.pidfd, os.WEXITED)
            os.close(self._spawned.pidfd)
            assert ended is not None
            self.returncode = ended.si_status
        return self.returncode


class ConfinedRelay(RelayedVtpmd):
    """A relay behind the confinement program; the vtpmd is not confined, being in a virtual machine."""

    def _start(self, args: InstanceArgs, fds: list[int]) -> subprocess.Popen[bytes]:
        root = os.geteuid() == 0
        package = importlib.util.find_spec("vtpm")
        assert package is not None and package.submodule_search_locations
        spec = ConfinementSpec(
            name="web1",
            uid=UID if root else os.geteuid(),
            gid=UID if root else os.getegid(),
            target="vtpm.relay.main:prepare",
            import_paths=(str(Path(next(iter(package.submodule_search_locations))).resolve().parent),),
            keep_fds=tuple(RelayFd)[: len(fds)],
            hold_fd=RelayFd.HOLD,
            user_namespace=UserNamespace.HOST if root else UserNamespace.OWN,
            target_args=args.to_json(),
            program="vtpm-relay",
            allow_list=AllowList.RELAY,
        )
        ours, theirs = socket.socketpair()
        # As the launcher, which keeps the other end: a log that nobody can read is a launcher that is gone.
        self._log_read, log_write = os.pipe()
        with ours, theirs:
            self.vm = self._run("tests.support.relayed", "vm", [theirs.fileno(), fds[MANAGER_LINK_AT]])
            fds = [*fds]
            fds[MANAGER_LINK_AT] = ours.fileno()
            spawned = spawn(spec, fds=dict(zip(RelayFd, fds, strict=False)), log_fd=log_write)
        os.close(log_write)
        wait_confined(spawned, timeout_s=TIMEOUT_S)
        return _Process(spawned)  # type: ignore[return-value]

    def kill(self) -> None:
        super().kill()
        if self._log_read >= 0:
            os.close(self._log_read)
            self._log_read = -1


@pytest.fixture
def relay() -> Iterator[ConfinedRelay]:
    with ConfinedRelay() as relay:
        relay.manager.hello()
        yield relay


def test_relay_shows_as_itself_and_holds_no_library_of_a_tpm_when_locked_in(relay: ConfinedRelay) -> None:
    pid = relay.process.pid
    shown = subprocess.check_output(["ps", "-o", "args=", "-p", str(pid)], text=True, timeout=10)
    assert shown == "vtpm-relay web1\n"
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Threads:\t1\n" in status
    assert "Seccomp:\t2\n" in status
    assert os.listdir(f"/proc/{pid}/root") == []
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert not any(name in maps for name in LIBRARIES)


def test_everything_a_relay_does_works_when_locked_in(relay: ConfinedRelay) -> None:
    with PlayedEmulator(relay) as emulator:
        for request in (
            Plain(Command.GET_CAPABILITY),
            Plain(Command.STOP),
            SetBufferSize(0),
            Init(0),
            SetLocality(0),
            GetInfo(0, 0),
            Plain(Command.CANCEL_TPM_CMD),
            Plain(Command.HASH_START),
            HashData(bytes(4096)),
            Plain(Command.HASH_END),
        ):
            assert emulator.control(request).result == 0, request
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        emulator.data.sendall(commands.get_random(8)[:6])
        assert emulator.control(SetBufferSize(0)).result == 0
        assert len(emulator.tpm(commands.get_random(8)[6:])) == 20
        with relay.connect("data") as second:
            second.sendall(commands.get_random(8))
            assert second.recv(64).endswith(b"\x09\x22")
        relay.manager.wait_for(Note, lambda note: f"uid {os.geteuid()}" in note.message)
    with relay.connect("data") as client:
        client.sendall(commands.startup())
        assert len(client.recv(4096)) == 10
    assert relay.manager.shut_down().code == ""
    assert relay.exit_status() == 0


def test_successor_takes_the_guest_over_when_locked_in(relay: ConfinedRelay) -> None:
    with PlayedEmulator(relay) as emulator:
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        relay.kill()
        with relay.successor() as successor:
            relay.close()
            successor.manager.hello()
            assert commands.code_of(emulator.tpm(commands.get_random(8))) == RC_FAILURE
            assert emulator.control(Init(0)).result == 0
            assert commands.code_of(emulator.tpm(commands.startup())) == 0
