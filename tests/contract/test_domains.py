"""What every kind of domain must do, whatever it is made of: the launcher knows none of them by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.image.building import build_vtpmd
from tests.support.slot import HeldVtpm
from tests.support.vtpmd import PlayedEmulator
from tests.unit.engine import commands
from vtpm.confine.report import ProtectionStatus
from vtpm.domains.accelerator import TCG
from vtpm.domains.base import ORDERLY, Domain
from vtpm.domains.process import ProcessDomain
from vtpm.domains.qemu import QemuDomain
from vtpm.tpm.return_codes import Rc20
from vtpm.tpm.types import Make, Startup, StateKind, TpmVersion
from vtpm.wire.emulator import Command, Init, Plain
from vtpm.wire.instance_spec import Role
from vtpm.wire.manager_link import ClientKind, Ready

INDEX = 0x01500001
FAILURE = int(Rc20.TPM_RC_FAILURE)

KINDS = ("process", "qemu", "qemu-swtpm")
OFFERS_1_2 = ("process", "qemu")


@pytest.fixture(scope="module", params=KINDS)
def domain(request: pytest.FixtureRequest) -> Domain:
    if request.param == "process":
        return ProcessDomain()
    make = Make.SWTPM if request.param == "qemu-swtpm" else Make.LIBTPMS
    images = build_vtpmd(request.getfixturevalue("place"), make)
    return QemuDomain(images, TCG, 96, make)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vm")


@pytest.fixture
def vtpm(domain: Domain) -> Iterator[HeldVtpm]:
    with HeldVtpm(domain) as held:
        yield held


def tpm(sock: socket.socket, command: bytes) -> bytes:
    sock.sendall(command)
    return sock.recv(8192)


def succeed(sock: socket.socket, *wanted: bytes) -> None:
    for command in wanted:
        assert commands.code_of(tpm(sock, command)) == 0


def test_state_outlives_the_domain_when_it_is_stopped_in_order_and_started_again(vtpm: HeldVtpm) -> None:
    manager = vtpm.start()
    assert manager.power_on(Startup.CLEAR).code == ""
    with vtpm.connect("data") as data:
        succeed(data, commands.nv_define(INDEX, 4), commands.nv_write(INDEX, b"kept"))
    assert manager.shut_down().code == ""
    assert vtpm.ended() == ORDERLY
    manager = vtpm.start()
    assert manager.power_on(Startup.CLEAR).code == ""
    with vtpm.connect("data") as data:
        assert commands.nv_value(tpm(data, commands.nv_read(INDEX, 4)), 4) == b"kept"


def test_answered_write_is_there_when_the_domain_was_killed(vtpm: HeldVtpm) -> None:
    manager = vtpm.start()
    assert manager.power_on(Startup.CLEAR).code == ""
    with vtpm.connect("data") as data:
        succeed(data, commands.nv_define(INDEX, 4), commands.nv_write(INDEX, b"kept"))
        assert vtpm.kill() != ORDERLY
    manager = vtpm.start()
    assert manager.power_on(Startup.CLEAR).code == ""
    with vtpm.connect("data") as data:
        assert commands.nv_value(tpm(data, commands.nv_read(INDEX, 4)), 4) == b"kept"


def test_emulator_uses_the_tpm_by_its_protocol_and_resets_it(vtpm: HeldVtpm) -> None:
    manager = vtpm.start()
    with PlayedEmulator(vtpm) as emulator:
        assert emulator.control(Plain(Command.GET_CAPABILITY)).result == 0
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert commands.code_of(emulator.tpm(commands.pcr_extend(16, b"1" * 32))) == 0
        extended = commands.pcr_value(emulator.tpm(commands.pcr_read(16)))
        assert extended != bytes(32)
        assert emulator.control(Plain(Command.STOP)).result == 0
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert commands.pcr_value(emulator.tpm(commands.pcr_read(16))) == bytes(32)
    assert manager.shut_down().code == ""
    assert vtpm.ended() == ORDERLY


def test_second_client_is_refused_when_one_uses_the_tpm(vtpm: HeldVtpm) -> None:
    manager = vtpm.start()
    assert manager.power_on(Startup.CLEAR).code == ""
    with vtpm.connect("data") as first:
        succeed(first, commands.get_random(8))
        with vtpm.connect("data") as second:
            assert commands.code_of(tpm(second, commands.get_random(8))) == int(Rc20.TPM_RC_RETRY)
        succeed(first, commands.get_random(8))


def test_guest_gets_failures_until_it_resets_when_its_domain_died(vtpm: HeldVtpm) -> None:
    vtpm.start()
    with PlayedEmulator(vtpm) as emulator:
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert commands.code_of(emulator.tpm(commands.nv_define(INDEX, 4))) == 0
        assert vtpm.kill() != ORDERLY
        # Sent while nobody is there; QEMU does not know.
        emulator.data.sendall(commands.pcr_read(0))
        manager = vtpm.start(Role.SUCCESSOR)
        assert commands.code_of(emulator.data.recv(8192)) == FAILURE
        assert commands.code_of(emulator.tpm(commands.get_random(8))) == FAILURE
        assert emulator.control(Plain(Command.STOP)).result == 0
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert commands.code_of(emulator.tpm(commands.nv_write(INDEX, b"kept"))) == 0
        assert manager.of(Ready)[0].client is ClientKind.EMULATOR


@pytest.mark.parametrize("domain", OFFERS_1_2, indirect=True, scope="module")
def test_tpm_1_2_is_served_when_the_vtpm_is_one(domain: Domain) -> None:
    with HeldVtpm(domain, TpmVersion.V1_2) as vtpm:
        assert vtpm.start().power_on(Startup.CLEAR).code == ""
        with vtpm.connect("data") as data:
            # TPM_GetRandom, 8 bytes: TPM 1.2 main part 3, 13.6.
            answer = tpm(data, bytes.fromhex("00c1 0000000e 00000046 00000008"))
        assert answer[6:14] == bytes(4) + (8).to_bytes(4, "big")


def test_every_protection_is_named_and_none_is_absent_when_it_is_confined(vtpm: HeldVtpm) -> None:
    vtpm.start()
    assert {"no_new_privs", "capabilities", "root", "seccomp"} <= {line.step.split()[-1] for line in vtpm.report}
    assert all(line.status is not ProtectionStatus.ABSENT and line.why for line in vtpm.report)
    if os.geteuid() == 0:
        weaker = [line.step for line in vtpm.report if line.status is not ProtectionStatus.IN_FORCE]
        assert weaker == []


def test_domain_runs_as_its_own_user_without_rights_when_root_starts_it(vtpm: HeldVtpm) -> None:
    vtpm.start()
    assert vtpm.instance is not None
    lines = Path(f"/proc/{vtpm.instance.domain.pid}/status").read_text().splitlines()
    status = {line.split(":")[0]: line.split()[1:] for line in lines}
    if os.geteuid() == 0:
        assert set(status["Uid"]) == {str(vtpm.slot.uid)}
    assert status["NoNewPrivs"] == ["1"] and status["Seccomp"] == ["2"]
    assert {value for name in ("CapEff", "CapPrm", "CapInh", "CapBnd") for value in status[name]} == {"0" * 16}


def test_no_descriptor_or_process_is_left_when_it_has_ended(domain: Domain) -> None:
    with HeldVtpm(domain) as vtpm:
        vtpm.start()
        vtpm.kill()
        before = sorted(os.listdir("/proc/self/fd"))
        vtpm.start()
        vtpm.kill()
        assert sorted(os.listdir("/proc/self/fd")) == before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    assert children == ""


def test_measurement_names_what_runs_and_stays_the_same(vtpm: HeldVtpm) -> None:
    vtpm.start()
    measurement = vtpm.domain.measurement
    assert len(bytes.fromhex(measurement)) == 32
    assert vtpm.slot.info().measurement == measurement


def test_volatile_state_survives_when_the_guest_suspends(vtpm: HeldVtpm) -> None:
    manager = vtpm.start()
    with PlayedEmulator(vtpm) as emulator:
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert commands.code_of(emulator.tpm(commands.pcr_extend(10, b"1" * 32))) == 0
        value = commands.pcr_value(emulator.tpm(commands.pcr_read(10)))
        assert emulator.control(Plain(Command.STORE_VOLATILE)).result == 0
        assert StateKind.VOLATILE in manager.state
        vtpm.kill()
    with HeldVtpm(vtpm.domain, name="again") as again:
        again.state.update(vtpm.state)
        again.start()
        with PlayedEmulator(again) as emulator:
            assert emulator.control(Init(0)).result == 0
            assert commands.pcr_value(emulator.tpm(commands.pcr_read(10))) == value
