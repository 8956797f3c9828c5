"""Reads a guest's event log, with the PCRs that its TPM holds at that moment; records the vectors of event logs.

`python -m tests.support.guest.event_logs FOLDER` boots a guest for each vector of tests/vectors/eventlog and writes it.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.guest import checks12
from tests.support.guest.checks import EVENT_LOG, Pcrs, read_pcrs
from tests.support.guest.guest import Firmware, Guest, GuestConfig, TpmModel
from tests.support.guest.image import build_image
from tests.support.guest.swtpm import swtpm_emulator
from tests.support.guest.unified_kernel import write_boot_folder

BANKS = ("sha1", "sha256", "sha384", "sha512")
"""All that swtpm has; without `swtpm_setup` all are on."""

UNIFIED_KERNEL_MEMORY_MIB = 384
"""Firmware holds the whole image, and the stub a copy of kernel and initramfs."""


@dataclass(frozen=True)
class RecordedLog:
    """What a guest's kernel has of its firmware's log, and every PCR of every bank."""

    log: bytes
    pcrs: dict[str, Pcrs]


def record_event_log(guest: Guest) -> RecordedLog:
    """Read both from a running guest whose TPM is a 2.0."""
    return RecordedLog(read_event_log(guest), {bank: read_pcrs(guest, bank) for bank in BANKS})


def read_event_log(guest: Guest) -> bytes:
    """The log as the guest's kernel shows it."""
    return base64.b64decode(guest.check(f"base64 -w 0 {EVENT_LOG}"))


def write_vectors(folder: Path) -> None:
    """Boot a guest for each vector, and write `NAME.bin`, the log, and `NAME.json`, the PCRs in hexadecimal."""
    image = build_image()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        unified = write_boot_folder(work / "disk", image).parents[2]
        configs = {
            "seabios_kernel": GuestConfig(image),
            "ovmf_kernel": GuestConfig(image, firmware=Firmware.OVMF),
            "ovmf_unified_kernel": GuestConfig(
                image, firmware=Firmware.OVMF, boot_folder=unified, memory_mib=UNIFIED_KERNEL_MEMORY_MIB
            ),
        }
        for name, config in configs.items():
            _write(folder, name, _boot(work / name, config))
        config12 = GuestConfig(image, tpm_model=TpmModel.TIS)
        _write(folder, "seabios_kernel_tpm12", _boot(work / "tpm12", config12, "1.2"))


def _boot(work: Path, config: GuestConfig, tpm_version: str = "2.0") -> RecordedLog:
    with (
        swtpm_emulator(work / "tpm", tpm_version) as control,
        Guest(replace(config, tpm_control_socket=control), work / "vm") as guest,
    ):
        if tpm_version == "2.0":
            return record_event_log(guest)
        return RecordedLog(read_event_log(guest), {"sha1": checks12.read_pcrs(guest)})


def _write(folder: Path, name: str, recorded: RecordedLog) -> None:
    (folder / f"{name}.bin").write_bytes(recorded.log)
    (folder / f"{name}.json").write_text(json.dumps({"pcrs": recorded.pcrs}, indent=1) + "\n")


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]))
