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
