"""Power, as the manager asks for it and as guests switch it by their own protocol."""

from __future__ import annotations

import pytest

from tests.support.vtpmd import PlayedEmulator, Vtpmd
from tests.unit.engine import commands
from vtpm.tpm.types import Startup
from vtpm.wire.emulator import Command, Init, Plain, decode_reply, encode_request
from vtpm.wire.manager_link import LinkPower, PowerChanged

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
