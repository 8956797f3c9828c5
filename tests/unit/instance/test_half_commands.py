"""TPM commands that an emulator sends in parts."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest

from tests.support.relayed import RelayedVtpmd
from tests.support.vtpmd import PlayedEmulator, Vtpmd
from tests.unit.engine import commands
from vtpm.wire.emulator import Init, SetBufferSize
from vtpm.wire.manager_link import ClientChanged, ClientKind

RC_FAILURE = 0x101


# What carries the commands out has no part in it.
@pytest.mark.parametrize("vtpmd", [Vtpmd, RelayedVtpmd], indirect=True)
def test_a_command_in_parts_has_one_answer_when_the_vtpmd_dies_after_any_of_its_bytes(vtpmd: Vtpmd) -> None:
    command = commands.get_random(8)
    with ExitStack() as stack, PlayedEmulator(vtpmd) as emulator:
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup())) == 0
        predecessor = vtpmd
        for cut in range(1, len(command)):
            emulator.data.sendall(command[:cut])
            # The TPM thread answers these two, so it has looked at the link by then.
            for _ in range(2):
                assert emulator.control(SetBufferSize(0)).result == 0
            predecessor.kill()
            successor = stack.enter_context(predecessor.successor())
            predecessor.close()
            successor.manager.hello()
            predecessor = successor
            assert commands.code_of(emulator.tpm(command[cut:])) == RC_FAILURE
            assert emulator.control(Init(0)).result == 0
            assert commands.code_of(emulator.tpm(commands.startup())) == 0
            assert len(emulator.tpm(command)) == 20


def test_a_vtpmd_sleeps_when_half_a_command_has_come(vtpmd: Vtpmd) -> None:
    with PlayedEmulator(vtpmd) as emulator:
        assert emulator.control(Init(0)).result == 0
        emulator.data.sendall(commands.startup()[:5])
        before = vtpmd.processor_s()
        time.sleep(0.3)
        assert vtpmd.processor_s() - before < 0.1
        assert commands.code_of(emulator.tpm(commands.startup()[5:])) == 0
        assert len(emulator.tpm(commands.get_random(8))) == 20
        emulator.data.sendall(commands.startup()[:5])
    vtpmd.manager.wait_for(ClientChanged, lambda told: told.client is ClientKind.NONE)
