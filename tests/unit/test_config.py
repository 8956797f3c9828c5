"""The settings of a host, as file and command line give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtpm.config import load_config
from vtpm.errors import UsageError
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS

TPM = "device:/dev/tpmrm0"


def _load(folder: Path, text: str, platform_tpm: str = TPM):  # type: ignore[no-untyped-def]
    path = folder / "vtpm.toml"
    path.write_text(text)
    return load_config(path, {"state_dir": folder, "run_dir": folder, "platform_tpm": platform_tpm})


@pytest.mark.parametrize(
    ("text", "platform_tpm", "measures", "pcrs"),
    [
        ("", TPM, True, "sha256:0,2,4,7,13"),
        ("services_pcr = 14", TPM, True, "sha256:0,2,4,7,14"),
        ("services_pcr = 0", TPM, False, "sha256:0,2,4,7"),
        ("", "embedded", False, "sha256:0,2,4,7"),
        ('pcrs = "sha384:7"', TPM, True, "sha384:7"),
    ],
)
def test_services_pcr_is_a_default_of_the_root_key_when_there_is_a_tpm_to_measure_into(
    tmp_path: Path, text: str, platform_tpm: str, measures: bool, pcrs: str
) -> None:
    config = _load(tmp_path, text, platform_tpm)
    assert (config.measures, config.root_pcrs, config.bank) == (measures, pcrs, pcrs[:6])


def test_firmwares_pcrs_are_the_keepers_default_too() -> None:
    assert load_config(None, {"state_dir": Path("/x"), "run_dir": Path("/x")}).root_pcrs == str(DEFAULT_PCRS)


@pytest.mark.parametrize("text", ["services_pcr = 16", "services_pcr = 23", "services_pcr = -1", "fence_pcr = 13"])
def test_services_pcr_is_refused_when_it_can_be_reset_or_is_the_fence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        _load(tmp_path, text)


def test_no_fence_can_be_written_down(tmp_path: Path) -> None:
    assert _load(tmp_path, "fence_pcr = 0").fence_pcr == 0


@pytest.mark.parametrize(
    ("text", "platform_tpm", "why"),
    [
        *((f"launch_pcr = {index}", TPM, "PCRs 0 to 7 are the firmware's") for index in (1, 7, 16, 17, 23)),
        ("launch_pcr = 13", TPM, "which services_pcr has|which pcrs has"),
        ('launch_pcr = 13\npcrs = "sha256:7"', TPM, "which services_pcr has"),
        ("fence_pcr = 12", TPM, "which fence_pcr has"),
        ("fence_pcr = 12", "embedded", "which fence_pcr has"),
        ('pcrs = "sha256:7,12"', "embedded", "which pcrs has"),
    ],
)
def test_launch_pcr_is_refused_when_it_can_be_reset_or_the_root_key_needs_it(
    tmp_path: Path, text: str, platform_tpm: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        _load(tmp_path, text, platform_tpm)


def test_launch_pcr_may_be_the_services_when_these_are_not_measured(tmp_path: Path) -> None:
    assert _load(tmp_path, "launch_pcr = 13", "embedded").launch_pcr == 13
    assert _load(tmp_path, "launch_pcr = 14\nfence_pcr = 12").launch_pcr == 14


@pytest.mark.parametrize(
    ("text", "platform_tpm", "allows"),
    [
        ("", TPM, False),
        ("", "embedded", True),
        ('new_images = "allow"', TPM, True),
        ('new_images = "refuse"', "embedded", False),
    ],
)
def test_new_images_are_allowed_without_hardware_unless_told_otherwise(
    tmp_path: Path, text: str, platform_tpm: str, allows: bool
) -> None:
    assert _load(tmp_path, text, platform_tpm).allows_new_images is allows


def test_launcher_is_here_unless_a_port_to_it_is_named(tmp_path: Path) -> None:
    assert _load(tmp_path, "").launcher_port == ""
    assert _load(tmp_path, 'launcher_port = "/dev/vport0p1"').launcher_port == "/dev/vport0p1"
    with pytest.raises(UsageError, match="launcher_port"):
        _load(tmp_path, "launcher_port = 1")
