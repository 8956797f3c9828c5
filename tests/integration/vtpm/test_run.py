"""vtpm run on a real host, whose vtpmds know of their clients only that they are there."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.tpm_commands import COMMANDS_20
from tests.support.host import BIN, Host
from vtpm.client.manager_client import ManagerClient
from vtpm.wire.api import LifeState

TIMEOUT_S = 60.0
QEMU = ("qemu-system-x86_64", "-M", "q35,accel=tcg", "-m", "64", "-nodefaults", "-S", "-display", "none")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[ManagerClient]:
    with host.client() as client:
        yield client


def _start(host: Host, name: str, *command: str) -> subprocess.Popen[str]:
    """Run a command under `vtpm run`; it is up once it has said a line."""
    program = subprocess.Popen(
        [BIN / "vtpm", "--socket", host.socket, "run", name, "--", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline()
    return program


def test_another_clients_vtpm_goes_on_when_the_command_ends(host: Host, client: ManagerClient) -> None:
    client.create("shared")
    with _start(host, "shared", "sh", "-c", "echo up; read line") as program, socket.socket(socket.AF_UNIX) as other:
        other.settimeout(TIMEOUT_S)
        other.connect(str(Path(client.show("shared").tcti.removeprefix("swtpm:path="))))
        other.sendall(COMMANDS_20["Startup"])
        assert other.recv(64)[6:10] == bytes(4)
        shown = client.show("shared").client
        assert shown is not None
        assert (shown.kind, shown.pid) == ("data", 0)
        _, said = program.communicate("\n", timeout=TIMEOUT_S)
        assert program.returncode == 0
        assert "shared is in use and goes on" in said
        assert client.show("shared").state is LifeState.RUNNING
        other.sendall(COMMANDS_20["GetRandom"])
        assert other.recv(4096)[6:10] == bytes(4)
    client.stop("shared")


def test_the_vtpm_is_stopped_when_its_qemu_ends(host: Host, client: ManagerClient) -> None:
    client.create("own")
    with _start(host, "own", *QEMU, "-monitor", "stdio") as program:
        shown = client.show("own").client
        assert shown is not None
        assert shown.kind == "emulator"
        program.communicate("quit\n", timeout=TIMEOUT_S)
        assert program.returncode == 0
        assert client.show("own").state is LifeState.STOPPED
