"""A vtpmd as in a virtual machine, its relay played by the test: hostile, slow or gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.relay import Port
from tests.support.vtpmd import TIMEOUT_S, PlayedManager, processor_s
from tests.unit.engine import commands
from tests.unit.wire.port_examples import PORT_EXAMPLES, SESSION
from vtpm.errors import DomainError, ProtocolError
from vtpm.instance import vm_main
from vtpm.instance.vm_main import wait_connected
from vtpm.tpm.types import TpmVersion
from vtpm.wire.emulator import Command, Init, Plain, decode_reply
from vtpm.wire.framing import encode_frame
from vtpm.wire.guest_port import (
    Close,
    Closed,
    ConnectionKind,
    Control,
    DataFd,
    Direction,
    Ended,
    Hello,
    Note,
    Open,
    Power,
    Ready,
    Reply,
    Response,
    TpmRequest,
    encode_message,
)
from vtpm.wire.instance_spec import Role
from vtpm.wire.manager_link import ClientChanged, ClientKind, LinkPower, PowerChanged
from vtpm.wire.manager_link import Note as ManagerNote

HELLO = Hello(SESSION, TpmVersion.V2_0, Role.FIRST)
RC_FAILURE = 0x101
ABANDONED = 71
COMMAND = commands.get_random(8)
MOST_GROWTH = 8 << 20
DATA, CONTROL = ConnectionKind.DATA, ConnectionKind.CONTROL


class Machine:
    """What runs in a virtual machine, with the far ends of its two ports."""

    def __init__(self, stack: ExitStack) -> None:
        ours, guest = (stack.enter_context(end) for end in socket.socketpair())
        self.manager_end, manager = (stack.enter_context(end) for end in socket.socketpair())
        fds = [guest.fileno(), manager.fileno()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.relayed", "vm", json.dumps(fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        guest.close()
        manager.close()
        self.port = Port(ours, Direction.TO_RELAY)
        self.manager = PlayedManager(self.manager_end)
        stack.callback(self.end)

    def begin(self, hello: Hello = HELLO) -> None:
        self.port.send(hello)
        assert self.port.receive(Ready).session == hello.session

    def power_on(self, connection: int = 1) -> None:
        self.port.send(Open(connection, CONTROL, 1000), Control(connection, Init(0)))
        assert self.port.receive(Power).powered
        assert decode_reply(Command.INIT, self.port.receive(Reply).data).result == 0

    def ask(self, connection: int, command: bytes = COMMAND) -> bytes:
        self.port.send(TpmRequest(connection, None, command))
        answer: bytes = self.port.receive(Response).data
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self.manager_end.shutdown(socket.SHUT_RDWR)
        self.manager.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def resident_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def machine() -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(stack)


def test_vtpmd_is_what_hello_says_when_it_takes_a_guest_over(machine: Machine) -> None:
    machine.port.sock.sendall(b"rest of a frame\xc0" + encode_frame(b"noise"))
    machine.begin(Hello(SESSION, TpmVersion.V1_2, Role.SUCCESSOR, True, 3, 5, 6, 1000))
    assert machine.manager.hello().tpm_version is TpmVersion.V1_2
    assert machine.manager.of(ClientChanged)[-1] == ClientChanged(ClientKind.EMULATOR, 0, 1000)
    assert machine.ask(6).hex() == "00c40000000a00000009"
    machine.port.send(Control(5, Plain(Command.GET_CONFIG)))
    assert decode_reply(Command.GET_CONFIG, machine.port.receive(Reply).data).result == 0


def test_data_client_is_served_in_both_forms_when_opened(machine: Machine) -> None:
    machine.begin()
    machine.power_on()
    machine.port.send(Open(2, DATA, 1001))
    assert commands.code_of(machine.ask(2, commands.startup())) == 0
    machine.manager.wait_for(ClientChanged, lambda told: told == ClientChanged(ClientKind.DATA, 0, 1001))
    machine.port.send(TpmRequest(2, 0, COMMAND))
    assert len(machine.port.receive(Response).data) == 20
    machine.port.send(Close(2))
    assert machine.port.receive(Closed).connection == 2
    machine.port.send(Open(3, DATA, 1001))
    assert len(machine.ask(3)) == 20
    machine.port.send(Close(1))
    assert machine.port.receive(Closed).connection == 1


def test_turns_stay_in_order_when_the_relay_breaks_them(machine: Machine) -> None:
    machine.begin()
    machine.power_on()
    machine.port.send(
        HELLO,
        TpmRequest(2, None, COMMAND),
        Control(9, Init(0)),
        Close(7),
        Open(1, DATA, 0),
        Open(2, CONTROL, 0),
        TpmRequest(1, None, COMMAND),
    )
    machine.port.send(Open(2, DATA, 0), Open(3, DATA, 0), DataFd(1, 3), Control(2, Init(0)))
    assert commands.code_of(machine.ask(2, commands.startup())) == 0
    machine.port.send(*[TpmRequest(2, None, COMMAND)] * 2, *[Control(1, Plain(Command.GET_CONFIG))] * 2)
    came = [machine.port.receive(object) for _ in range(2)]
    assert {type(one) for one in came} == {Response, Reply}
    assert machine.port.is_silent()
    machine.port.send(DataFd(1, 3), Note("a second client was refused"))
    machine.manager.wait_for(ManagerNote, lambda note: note.message == "a second client was refused")
    assert machine.port.is_silent()
    assert len(machine.ask(2)) == 20


def test_datafd_is_refused_by_the_vtpmd_when_another_client_was_faster(machine: Machine) -> None:
    machine.begin()
    machine.port.send(Open(1, CONTROL, 0), DataFd(1, 2))
    assert decode_reply(Command.SET_DATAFD, machine.port.receive(Reply).data).result == 0
    machine.port.send(Close(2))
    machine.port.receive(Closed)
    # An emulator has one data channel, and keeps it until its control channel ends.
    machine.port.send(DataFd(1, 3))
    came = {type(one): one for one in (machine.port.receive(object), machine.port.receive(object))}
    assert decode_reply(Command.SET_DATAFD, came[Reply].data).result != 0
    assert came[Closed].connection == 3


@pytest.mark.timeout(400)
def test_vtpmd_stays_small_and_idle_when_the_relay_floods_and_does_not_read(machine: Machine) -> None:
    machine.begin()
    machine.power_on()
    before = machine.resident_bytes()
    to_vm = [message for message in PORT_EXAMPLES.values() if encode_message(message)[1] < 0x80]
    wanted = [Control(1, Plain(Command.GET_CONFIG))] * 4
    flood = b"".join(encode_frame(encode_message(message)) for message in (*wanted, *to_vm))
    machine.port.sock.sendall(b"x" * (16 << 20) + b"\xc0")
    machine.port.sock.settimeout(0.5)
    # Its answers fill the port, and then it takes no more requests.
    with pytest.raises(TimeoutError):
        while True:
            machine.port.sock.sendall(flood)
    spent_s = processor_s(machine.process.pid)
    time.sleep(0.2)
    assert processor_s(machine.process.pid) - spent_s < 0.05
    assert machine.resident_bytes() - before < MOST_GROWTH
    assert machine.process.poll() is None
    machine.port.sock.close()
    assert machine.process.wait(TIMEOUT_S) == ABANDONED


def test_end_is_told_when_the_manager_shuts_down(machine: Machine) -> None:
    machine.begin()
    machine.power_on()
    machine.port.send(Open(2, DATA, 0))
    assert commands.code_of(machine.ask(2, commands.startup())) == 0
    assert machine.manager.shut_down().code == ""
    assert not machine.port.receive(Power).powered
    assert machine.port.receive(Ended).status == 0
    assert machine.process.wait(TIMEOUT_S) == 0
    assert machine.manager.of(PowerChanged)[-1].power is LinkPower.OFF


@pytest.mark.parametrize("port", ["guest", "manager"])
@pytest.mark.parametrize("ready", [False, True], ids=["before HELLO", "serving"])
def test_vtpmd_ends_when_a_port_hangs_up(machine: Machine, port: str, ready: bool) -> None:
    if ready:
        machine.begin()
    (machine.port.sock if port == "guest" else machine.manager_end).shutdown(socket.SHUT_RDWR)
    if not ready and port == "manager":
        machine.port.send(HELLO)
        machine.port.receive(Ready)
    assert machine.process.wait(TIMEOUT_S) != 0
    if port == "manager":
        assert machine.port.receive(Ended).status == ABANDONED


class PoweredOff(BaseException):
    """What ran, runs no more."""


class PlayedBoot:
    """A virtual machine that boots. Its ports have names at the third look, and are files, which have no far end."""

    def __init__(self, folder: Path, *, fails: bool) -> None:
        self.did: list[str] = []
        self._looks = 0
        self._folder = folder
        self._fails = fails

    def mount_file_systems(self) -> None:
        self.did.append("mount")

    def load_modules(self) -> None:
        self.did.append("modules")

    def find_port(self, name: str) -> str:
        self._looks += 1
        if self._looks < 3:
            raise DomainError(f"no port {name}")
        path = self._folder / name
        if not self._fails:
            path.touch()
        return str(path)

    def power_off(self) -> NoReturn:
        self.did.append("power off")
        raise PoweredOff


@pytest.mark.parametrize("fails", [False, True], ids=["a port that is none", "no port"])
def test_machine_is_powered_off_when_serving_has_ended_in_any_way(
    tmp_path: Path, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    boot = PlayedBoot(tmp_path, fails=fails)
    with pytest.raises(PoweredOff):
        vm_main.run(boot)
    assert boot.did == ["mount", "modules", "power off"]
    assert capsys.readouterr().err.startswith("vtpmd: ")


def test_port_is_waited_for_until_the_hosts_end_is_open() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        wait_connected(ours.fileno())
        theirs.close()
        with pytest.raises(ProtocolError, match="not opened in time"):
            wait_connected(ours.fileno(), timeout_s=0.05)
