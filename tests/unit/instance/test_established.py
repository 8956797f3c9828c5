"""What is no TPM command, yet writes state: dynamic launch and the established bit, when the state cannot be kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.vtpmd import PlayedEmulator, Vtpmd
from tests.unit.engine import commands
from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import TpmVersion
from vtpm.wire.emulator import Command, HashData, Init, Plain, Request, ResetEstablished
from vtpm.wire.manager_link import LinkPower, PowerChanged, SaveBegin

FAILED_12 = "00c40000000a00000009"
GET_VERSION_12 = bytes.fromhex("00c1 00000016 00000065 00000006 00000004 00000000")


@pytest.fixture(scope="module")
def manufactured() -> Iterator[Vtpmd]:
    """A TPM 1.2, which takes long to make: each test goes on with a successor of the one before."""
    with Vtpmd(TpmVersion.V1_2) as vtpmd:
        vtpmd.manager.hello()
        assert vtpmd.manager.power_on().code == ""
        vtpmd.kill()
        yield vtpmd


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("before", "request_"),
    [((), Plain(Command.HASH_START)), ((Plain(Command.HASH_START), HashData(b"x"), Plain(Command.HASH_END)),
     ResetEstablished(3))],
)  # fmt: skip
def test_failure_shows_at_once_when_state_written_beside_commands_cannot_be_kept(
    manufactured: Vtpmd, before: tuple[Request, ...], request_: Request
) -> None:
    with Vtpmd(TpmVersion.V1_2, predecessor=manufactured) as vtpmd, PlayedEmulator(vtpmd) as emulator:
        vtpmd.manager.hello()
        assert emulator.control(Init(0)).result == 0
        assert commands.code_of(emulator.tpm(commands.startup_12())) == 0
        for one in before:
            assert emulator.control(one).result == 0
        saves = len(vtpmd.manager.of(SaveBegin))
        vtpmd.manager.keeps = False
        assert emulator.control(request_).result == Rc12.TPM_FAIL
        assert len(vtpmd.manager.of(SaveBegin)) > saves
        vtpmd.manager.wait_for(PowerChanged, lambda told: told.power is LinkPower.FAILED)
        assert emulator.tpm(GET_VERSION_12).hex() == FAILED_12
