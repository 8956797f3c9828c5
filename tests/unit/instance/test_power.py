"""Power, as the manager asks for it and as guests switch it by their own protocol."""

from __future__ import annotations

import pytest

from tests.support.vtpmd import PlayedEmulator, Vtpmd
from tests.unit.engine import commands
from vtpm.instance.server import EXIT_SPENT
from vtpm.tpm.types import Startup
from vtpm.wire.emulator import Command, Init, Plain, decode_reply, encode_request
from vtpm.wire.manager_link import LinkPower, Note, PowerChanged

RC_INITIALIZE = 0x100


@pytest.mark.parametrize("on", [False, True], ids=["before INIT", "after INIT"])
def test_power_on_is_answered_with_success_when_an_emulator_was_faster(vtpmd: Vtpmd, on: bool) -> None:
    with PlayedEmulator(vtpmd) as emulator:
        if on:
            assert emulator.control(Init(0)).result == 0
            assert commands.code_of(emulator.tpm(commands.startup())) == 0
        assert vtpmd.manager.power_on().code == ""
        if not on:
            assert vtpmd.manager.of(PowerChanged) == []
            assert emulator.control(Init(0)).result == 0
            assert commands.code_of(emulator.tpm(commands.startup())) == 0
        # The TPM is the one that the guest started.
        assert commands.code_of(emulator.tpm(commands.startup())) == RC_INITIALIZE


def test_power_on_is_answered_with_success_when_a_control_client_has_sent_init(vtpmd: Vtpmd) -> None:
    with vtpmd.connect("control") as control:
        control.sendall(encode_request(Init(0)))
        assert decode_reply(Command.INIT, control.recv(64)).result == 0
        assert vtpmd.manager.power_on().code == ""
        assert [told.power for told in vtpmd.manager.of(PowerChanged)] == [LinkPower.ON]


@pytest.mark.parametrize("startup", [Startup.CLEAR, Startup.STATE])
def test_power_on_is_a_conflict_when_a_startup_is_asked_for_under_a_guest(vtpmd: Vtpmd, startup: Startup) -> None:
    with PlayedEmulator(vtpmd) as emulator:
        assert emulator.control(Init(0)).result == 0
        done = vtpmd.manager.power_on(startup)
        assert (done.code, done.message) == ("conflict", "the TPM is on and has a guest")
        assert emulator.control(Plain(Command.GET_CONFIG)).result == 0


def test_orderly_stop_is_answered_with_the_error_when_its_shutdown_cannot_be_kept(vtpmd: Vtpmd) -> None:
    assert vtpmd.manager.power_on(Startup.CLEAR).code == ""
    vtpmd.manager.keeps = False
    done = vtpmd.manager.shut_down()
    assert done.code == "store"
    assert "no space left" in done.message
    assert vtpmd.exit_status() == 0
    assert vtpmd.manager.of(PowerChanged)[-1].power is LinkPower.FAILED


@pytest.mark.parametrize("startup", [Startup.NONE, Startup.CLEAR])
def test_orderly_stop_is_answered_with_success_when_all_is_kept(vtpmd: Vtpmd, startup: Startup) -> None:
    assert vtpmd.manager.power_on(startup).code == ""
    assert vtpmd.manager.shut_down().code == ""
    assert vtpmd.exit_status() == 0
    assert vtpmd.manager.of(PowerChanged)[-1].power is LinkPower.OFF


def test_a_successor_is_wanted_when_the_state_of_a_guest_that_left_cannot_be_kept(vtpmd: Vtpmd) -> None:
    with PlayedEmulator(vtpmd) as emulator:
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        vtpmd.manager.keeps = False
    assert vtpmd.exit_status() == EXIT_SPENT
    vtpmd.manager.wait_for(Note, lambda note: "no space left" in note.message)
    vtpmd.manager.keeps = True
    vtpmd.kill()
    with vtpmd.successor() as successor:
        # It may have powered the TPM on before; what it said of that was for no manager.
        if successor.manager.hello().power is not LinkPower.ON:
            successor.manager.wait_for(PowerChanged, lambda told: told.power is LinkPower.ON)
        with PlayedEmulator(successor) as emulator:
            assert emulator.control(Init(0)).result == 0
            assert commands.code_of(emulator.tpm(commands.startup())) == 0
            assert commands.code_of(emulator.tpm(commands.get_random(8))) == 0


def test_reset_goes_on_when_what_the_client_before_did_cannot_be_kept(vtpmd: Vtpmd) -> None:
    assert vtpmd.manager.power_on(Startup.CLEAR).code == ""
    with PlayedEmulator(vtpmd) as emulator:
        vtpmd.manager.keeps = False
        assert emulator.control(Plain(Command.STOP)).result == 0
        vtpmd.manager.wait_for(PowerChanged, lambda told: told.power is LinkPower.FAILED)
        emulator.control_socket.sendall(encode_request(Init(0)))
        assert vtpmd.exit_status() == EXIT_SPENT
        vtpmd.manager.keeps = True
        vtpmd.kill()
        with vtpmd.successor() as successor:
            successor.manager.hello()
            assert decode_reply(Command.INIT, emulator.control_socket.recv(64)).result == 0
            assert commands.code_of(emulator.tpm(commands.startup())) == 0
