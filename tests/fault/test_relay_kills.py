"""Relay or virtual machine killed at each point of a turn: one answer to what was asked, then failures until INIT."""

from __future__ import annotations

import random
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.support.host import wait_ended
from tests.support.relay import LoneRelay
from tests.support.relayed import RelayedVtpmd
from tests.support.vtpmd import TIMEOUT_S, PlayedEmulator
from tests.unit.engine import commands
from tests.unit.relay.test_turns import FAIL, emulator, offer
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    Init,
    Plain,
    SetLocality,
    decode_reply,
    encode_reply,
    encode_request,
)
from vtpm.wire.guest_port import Control, DataFd, Hello, Power, Ready, Reply, Response, TpmRequest
from vtpm.wire.instance_spec import RelayExit, Role

RC_FAILURE = 0x101
COMMAND = commands.get_random(8)
KILLS = 14
INSTANCE_ABANDONED = 71


class Guest:
    """An emulator behind a relay whose virtual machine, played by the test, is powered on."""

    def __init__(self, relay: LoneRelay) -> None:
        self.relay = relay
        self.control, self.data, self.asked = emulator(relay)
        relay.port.send(Power(True))
        self.control.sendall(encode_request(SetLocality(2)))
        relay.port.receive(Control)
        relay.port.send(Reply(self.asked.connection, encode_reply(Command.SET_LOCALITY)))
        assert self.control.recv(64) == bytes(4)

    def close(self) -> None:
        self.control.close()
        self.data.close()

    def check_silence(self) -> None:
        poller = select.poll()
        for sock in (self.control, self.data):
            poller.register(sock, select.POLLIN)
        assert not poller.poll(30), "an answer came to no request"


@pytest.fixture
def guest() -> Iterator[Guest]:
    with LoneRelay() as relay:
        relay.make_ready()
        with closing(Guest(relay)) as guest:
            yield guest


def _successor(guest: Guest, stack: ExitStack) -> tuple[LoneRelay, Hello]:
    guest.relay.kill()
    successor = stack.enter_context(guest.relay.successor())
    guest.relay.close()
    hello = successor.port.receive(Hello)
    assert (hello.role, hello.powered, hello.locality) == (Role.SUCCESSOR, True, 2)
    assert hello.control
    assert hello.data
    return successor, hello


def _fails_once(guest: Guest) -> None:
    assert commands.code_of(guest.data.recv(8192)) == RC_FAILURE
    guest.check_silence()


@pytest.mark.parametrize("taken", [False, True], ids=["in the socket", "taken"])
def test_command_fails_once_and_at_once_when_the_relay_dies_under_it(guest: Guest, taken: bool) -> None:
    with ExitStack() as stack:
        if not taken:
            guest.relay.process.send_signal(signal.SIGSTOP)
        guest.data.sendall(COMMAND)
        if taken:
            guest.relay.port.receive(TpmRequest)
        successor, hello = _successor(guest, stack)
        # Before the virtual machine is ready, which takes seconds.
        _fails_once(guest)
        guest.data.sendall(COMMAND)
        _fails_once(guest)
        assert successor.port.is_silent()
        successor.port.send(Ready(hello.session))
        guest.control.sendall(encode_request(Plain(Command.GET_CONFIG)))
        successor.port.receive(Control)
        guest.data.sendall(COMMAND)
        assert successor.port.receive(TpmRequest).connection == hello.data
        successor.port.send(Response(hello.data, bytes.fromhex("80010000000a00000101")))
        _fails_once(guest)


def test_half_a_command_has_its_answer_once_it_is_whole_when_the_relay_dies_between_its_halves(guest: Guest) -> None:
    with ExitStack() as stack:
        guest.data.sendall(COMMAND[:7])
        guest.check_silence()
        _successor(guest, stack)
        guest.check_silence()
        guest.data.sendall(COMMAND[7:])
        _fails_once(guest)


def test_answer_is_not_given_twice_when_the_relay_dies_after_it(guest: Guest) -> None:
    with ExitStack() as stack:
        guest.data.sendall(COMMAND)
        guest.relay.port.receive(TpmRequest)
        guest.relay.port.send(Response(guest.asked.data, commands.get_random(8)))
        assert guest.data.recv(8192) == COMMAND
        successor, hello = _successor(guest, stack)
        successor.port.send(Ready(hello.session))
        guest.check_silence()


def test_request_fails_once_when_the_relay_dies_under_it(guest: Guest) -> None:
    with ExitStack() as stack:
        guest.control.sendall(encode_request(GetInfo(0, 0)))
        guest.relay.port.receive(Control)
        successor, hello = _successor(guest, stack)
        assert decode_reply(Command.GET_INFO, guest.control.recv(4096)).result == FAIL
        successor.port.send(Ready(hello.session))
        assert successor.port.is_silent()
        guest.check_silence()


@pytest.mark.parametrize("taken", [False, True], ids=["in the socket", "taken"])
def test_init_is_asked_again_when_the_relay_dies_under_it(guest: Guest, taken: bool) -> None:
    with ExitStack() as stack:
        if not taken:
            guest.relay.process.send_signal(signal.SIGSTOP)
        guest.control.sendall(encode_request(Init(0)))
        if taken:
            guest.relay.port.receive(Control)
        successor, hello = _successor(guest, stack)
        successor.port.send(Ready(hello.session))
        assert successor.port.receive(Control) == Control(hello.control, Init(0))
        guest.check_silence()
        successor.port.send(Power(True), Reply(hello.control, encode_reply(Command.INIT)))
        assert guest.control.recv(64) == bytes(4)
        guest.check_silence()


def test_emulator_hears_a_hang_up_when_the_relay_dies_before_it_is_parked() -> None:
    with LoneRelay() as relay:
        relay.make_ready()
        with relay.connect("control") as control, offer(control):
            relay.port.await_one(DataFd)
            relay.kill()
            assert control.recv(64) == b""


class Launcher(threading.Thread):
    """Kills one of the two after a while, sees the other end by itself or ends it, and starts a successor of both."""

    def __init__(self, vtpmd: RelayedVtpmd, delay_s: float, victim: str) -> None:
        super().__init__(daemon=True)
        self._vtpmd, self._delay_s, self._victim = vtpmd, delay_s, victim
        self.successor: RelayedVtpmd | None = None
        self.killed = threading.Event()

    def run(self) -> None:
        threading.Event().wait(self._delay_s)
        relay, machine = self._vtpmd.process, self._vtpmd.vm
        victim, other = (relay, machine) if self._victim == "relay" else (machine, relay)
        victim.kill()
        # Each sees that the other is gone.
        assert wait_ended(other.pid, TIMEOUT_S)
        assert other.wait(TIMEOUT_S) == (INSTANCE_ABANDONED if other is machine else RelayExit.VM_GONE)
        self._vtpmd.kill()
        successor = self._vtpmd.successor()
        successor.manager.hello()
        self.successor = successor
        self.killed.set()


def _power_on(emulator: PlayedEmulator) -> None:
    emulator.control(Plain(Command.STOP))
    assert emulator.control(Init(0)).result == 0
    assert emulator.control(SetLocality(0)).result == 0
    assert commands.code_of(emulator.tpm(commands.startup())) == 0


@pytest.mark.timeout(150)
def test_each_request_has_one_answer_when_relay_or_virtual_machine_is_killed_at_random_moments() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    with ExitStack() as stack:
        vtpmd = stack.enter_context(RelayedVtpmd())
        vtpmd.manager.hello()
        emulator = stack.enter_context(PlayedEmulator(vtpmd))
        for kill in range(KILLS):
            _power_on(emulator)
            assert commands.code_of(emulator.tpm(commands.pcr_extend(10, generator.randbytes(32)))) == 0
            extended = commands.pcr_value(emulator.tpm(commands.pcr_read(10)))
            launcher = Launcher(vtpmd, generator.random() * 0.03, ("relay", "machine")[kill % 2])
            launcher.start()
            _ask_until_failed(emulator, generator, extended)
            assert launcher.killed.wait(TIMEOUT_S)
            assert launcher.successor is not None
            vtpmd.close()
            vtpmd = stack.enter_context(launcher.successor)
            assert commands.code_of(emulator.tpm(commands.pcr_read(10))) == RC_FAILURE
            poller = select.poll()
            for sock in (emulator.control_socket, emulator.data):
                poller.register(sock, select.POLLIN)
            assert not poller.poll(5), "an answer came to no request"
        _power_on(emulator)
        assert set(commands.pcr_value(emulator.tpm(commands.pcr_read(10)))) == {0}


def _ask_until_failed(emulator: PlayedEmulator, generator: random.Random, extended: bytes) -> None:
    while True:
        match generator.randrange(4):
            case 0:
                offset = generator.randrange(4)
                info = emulator.control(GetInfo(0, offset))
                if info.result:
                    return
                assert len(info.data) == info.fields["total"] - offset
            case 1:
                read = emulator.tpm(commands.pcr_read(10))
                if commands.code_of(read) == RC_FAILURE:
                    return
                assert commands.pcr_value(read) == extended, "the PCRs are others, and the guest was not reset"
            case _:
                size = generator.randrange(1, 33)
                response = emulator.tpm(commands.get_random(size))
                if commands.code_of(response) == RC_FAILURE:
                    return
                assert len(response) == 12 + size, "the response to another command came"
