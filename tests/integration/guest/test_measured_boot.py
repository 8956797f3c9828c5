"""What OVMF measures of a unified kernel image is what was computed from the file, also before it ever ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guest import Firmware, Guest, GuestConfig, Image, build_image, swtpm_emulator
from tests.support.guest.event_logs import UNIFIED_KERNEL_MEMORY_MIB, RecordedLog, record_event_log
from tests.support.guest.unified_kernel import write_boot_folder
from vtpm.tpm.authenticode import authenticode_digest
from vtpm.tpm.event_log import EventType, check_replay, parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.pcr_prediction import Replacement, predict_pcrs

POLICY_PCRS = (0, 2, 4, 7)
POLICY_BANKS = (HashAlgorithm.SHA256, HashAlgorithm.SHA384)
UNLOGGED_PCRS = frozenset({10})
"""The kernel's IMA extends it, and has a log of its own."""


def booted(image: Image, boot_folder: Path, work: Path) -> RecordedLog:
    """Boot a new machine from the folder; its log and PCRs."""
    with swtpm_emulator(work / "tpm") as control:
        config = GuestConfig(
            image,
            control,
            firmware=Firmware.OVMF,
            boot_folder=boot_folder,
            memory_mib=UNIFIED_KERNEL_MEMORY_MIB,
        )
        with Guest(config, work / "vm") as guest:
            return record_event_log(guest)


@pytest.mark.timeout(300)
def test_pcr_4_is_as_predicted_from_the_file_when_the_next_kernel_is_booted(tmp_path: Path) -> None:
    image = build_image()
    now = write_boot_folder(tmp_path / "disk-now", image)
    following = write_boot_folder(tmp_path / "disk-next", image, "quiet")

    before = booted(image, tmp_path / "disk-now", tmp_path / "now")
    log = parse_event_log(before.log)
    predictions = {}
    for bank in log.banks:
        held = {pcr: bytes.fromhex(value) for pcr, value in before.pcrs[bank].items()}
        replayed = log.replay(bank)
        assert {pcr: held[pcr] for pcr in replayed} == replayed
    for bank in POLICY_BANKS:
        held = {pcr: bytes.fromhex(value) for pcr, value in before.pcrs[bank].items()}
        check_replay(log, bank, {pcr: value for pcr, value in held.items() if pcr not in UNLOGGED_PCRS})
        # The firmware starts the unified image; its stub has the firmware load the kernel inside.
        applications = [e for e in log.events if e.type == EventType.EV_EFI_BOOT_SERVICES_APPLICATION]
        whole, kernel = (authenticode_digest(path.read_bytes(), bank) for path in (now, image.kernel))
        assert [(event.pcr, event.digests[bank]) for event in applications] == [(4, whole), (4, kernel)]
        new = authenticode_digest(following.read_bytes(), bank)
        prediction = predict_pcrs(log, bank, {pcr: held[pcr] for pcr in POLICY_PCRS}, [Replacement(4, whole, new)])
        assert [change.event for change in prediction.changed] == [applications[0]]
        assert prediction.values[4] != held[4]
        predictions[bank] = prediction.values

    after = booted(image, tmp_path / "disk-next", tmp_path / "next")
    for bank, values in predictions.items():
        assert {pcr: value.hex() for pcr, value in values.items()} == {
            pcr: after.pcrs[bank][pcr] for pcr in POLICY_PCRS
        }
