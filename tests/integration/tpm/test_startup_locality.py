"""PCR 0 begins where libtpms lets it begin, from whatever locality the TPM was started."""

from __future__ import annotations

import hashlib

import pytest

from tests.unit.engine import commands as c
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import powered
from tests.unit.tpm.log_examples import SEPARATOR, SHA256, event, spec_id, startup_locality
from vtpm.tpm.event_log import EventType, check_replay, parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.types import Locality, TpmVersion

BANK = HashAlgorithm.SHA256
MEASURED = hashlib.sha256(b"measured").digest()
HCRTM = hashlib.sha256(b"firmware").digest()
SEPARATORS = b"".join(event(pcr, SEPARATOR, [(SHA256, MEASURED)]) for pcr in (0, 1))


def _pcrs(locality: int) -> dict[int, bytes]:
    """PCRs 0 and 1 of a TPM that was started from a locality, and extended once each."""
    engine, _ = powered(TpmVersion.V2_0)
    if locality == 4:
        assert [engine.hash_start(), engine.hash_data(b"firmware"), engine.hash_end()] == [0, 0, 0]
    started_from = Locality(0 if locality == 4 else locality)
    assert c.code_of(engine.process(c.startup(), started_from)) == 0
    for pcr in (0, 1):
        assert c.code_of(engine.process(c.pcr_extend(pcr, MEASURED))) == 0
    return {pcr: c.pcr_value(engine.process(c.pcr_read(pcr))) for pcr in (0, 1)}


@pytest.mark.parametrize("locality", [0, 3])
def test_log_accounts_for_pcr_0_when_the_tpm_was_started_from_a_locality(locality: int) -> None:
    log = parse_event_log(spec_id() + startup_locality(bytes([locality])) + SEPARATORS)
    held = in_process(_pcrs, locality)
    check_replay(log, BANK, held)
    assert log.replay(BANK) == held


def test_log_accounts_for_pcr_0_when_firmware_was_measured_before_startup() -> None:
    measured = event(0, EventType.EV_EFI_HCRTM_EVENT, [(SHA256, HCRTM)], b"HCRTM")
    log = parse_event_log(spec_id() + startup_locality(b"\4") + measured + SEPARATORS)
    held = in_process(_pcrs, 4)
    check_replay(log, BANK, held)
    assert log.replay(BANK) == held
