"""The guest harness and its checks against Debian's swtpm, a peer that is known to work."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.guest import (
    Firmware,
    Guest,
    GuestConfig,
    GuestEnded,
    GuestError,
    Image,
    Reboot,
    TpmModel,
    build_image,
    checks,
    checks12,
    swtpm_emulator,
)


@pytest.fixture(scope="session")
def image() -> Image:
    return build_image()


def _start_swtpm(emulators: ExitStack, folder: Path, tpm_version: str) -> Path:
    # swtpm ends with the QEMU that it served, so each power cycle takes another one on the same state.
    return emulators.enter_context(swtpm_emulator(folder / "tpm", tpm_version))


def test_guest_finds_its_nv_and_key_again_when_rebooted_and_powered_off(image: Image, tmp_path: Path) -> None:
    with ExitStack() as emulators:
        start = partial(_start_swtpm, emulators, tmp_path, "2.0")
        config = GuestConfig(image, start(), TpmModel.CRB, Firmware.SEABIOS, uuid=uuid4())
        checks.exercise(config, tmp_path / "vm", power_cycle=start)


def test_ovmf_measures_kernel_and_initrd_when_the_guest_boots_over_tis(image: Image, tmp_path: Path) -> None:
    with swtpm_emulator(tmp_path / "tpm") as control:
        config = GuestConfig(image, control, TpmModel.TIS, Firmware.OVMF)
        pcrs = checks.exercise(config, tmp_path / "vm")
    # The kernel's EFI stub measures the initramfs into PCR 9.
    assert set(pcrs[9]) != {"0"}


def test_guest_finds_its_nv_again_when_the_tpm_is_1_2(image: Image, tmp_path: Path) -> None:
    with ExitStack() as emulators:
        start = partial(_start_swtpm, emulators, tmp_path, "1.2")
        config = GuestConfig(image, start(), TpmModel.TIS, Firmware.SEABIOS)
        checks12.exercise(config, tmp_path / "vm", power_cycle=start)


def test_checks_fail_when_the_tpm_is_not_as_it_should_be(image: Image, tmp_path: Path) -> None:
    with (
        swtpm_emulator(tmp_path / "tpm") as control,
        Guest(GuestConfig(image, control), tmp_path / "vm") as guest,
    ):
        pcrs = checks.check_fresh_pcrs(guest)
        traces = checks.leave_traces(guest)
        guest.check(f"tpm2_pcrextend 3:sha256={'5a' * 32} {checks.FREE_PCR}:sha256={'5a' * 32}")
        with pytest.raises(AssertionError, match="the event log replays to"):
            checks.check_event_log(guest, checks.read_pcrs(guest))
        with pytest.raises(AssertionError, match="outlived the boot"):
            checks.check_fresh_pcrs(guest)
        with pytest.raises(AssertionError, match="says nothing of PCRs"):
            # The header event alone: 32 bytes and what they announce.
            guest.check(f"head -c 77 {checks.EVENT_LOG} > /tmp/log")
            checks.check_event_log(guest, pcrs, log="/tmp/log")
        with pytest.raises(AssertionError, match="another key"):
            checks.check_traces(guest, replace(traces, key_name="00"))
        guest.check(f"tpm2_nvundefine -Q -C o {checks.NV_INDEX:#x}")
        with pytest.raises(AssertionError, match="tpm2_nvread"):
            checks.check_traces(guest, traces)


def test_harness_tells_what_failed_when_the_guest_does_not_do_its_part(image: Image, tmp_path: Path) -> None:
    # A program that starts QEMU and waits, as `vtpm run` may.
    prefix = ("sh", "-c", '"$@"; exit $?', "prefix")
    with Guest(GuestConfig(image, command_prefix=prefix), tmp_path / "vm") as guest:
        # Status, both outputs and bytes that mean something to a terminal come back as they are.
        result = guest.run("printf 'a\\n@agent done\\tb'; printf '\\377' >&2; exit 3")
        assert (result.status, result.stdout, result.stderr) == (3, "a\n@agent done\tb", "\\xff")
        assert guest.check("head -c 300000 /dev/zero | tr '\\0' x") == "x" * 300_000
        with pytest.raises(GuestError, match="status 1 of"):
            guest.check("false")
        with pytest.raises(AssertionError):
            checks.driver_version(guest)

        boot_ids = {guest.boot_id}
        for how in (Reboot.HOST, Reboot.SUDDEN):
            guest.reboot(how)
            boot_ids.add(guest.boot_id)
        assert len(boot_ids) == 3
        assert guest.qmp.execute("query-status")["status"] == "running"
        # The oldest is the host's; SeaBIOS adds a reset of its own to each.
        assert guest.qmp.wait_event("RESET", timeout_s=5)["data"]["reason"] == "host-qmp-system-reset"
        assert guest.qmp.wait_event("RESET", timeout_s=5)["data"]["reason"] == "guest-reset"

        with pytest.raises(GuestError, match=r"(?s)in time.*end of"):
            guest.run("sleep 30", timeout_s=0.2)
        guest.kill()
        with pytest.raises(GuestEnded, match="agent channel"):
            guest.run("true")


def test_harness_ends_at_once_when_qemu_refuses_to_start(image: Image, tmp_path: Path) -> None:
    config = GuestConfig(image, tpm_control_socket=tmp_path / "absent")
    with pytest.raises(GuestEnded, match="Failed to connect"), Guest(config, tmp_path / "vm"):
        raise AssertionError("a guest without its TPM started")
