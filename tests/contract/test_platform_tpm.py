"""What every platform TPM must do for the keeper: connections, PCRs, randomness."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.contract.conftest import Tpm
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError, UsageError
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrBank, PcrSelection, pcr_policy_digest, predict_pcr
from vtpm.platform_tpm.platform_tpm import PlatformTpm

pytestmark = pytest.mark.timeout(30)


def extend(tpm: Tpm, index: int) -> None:
    subprocess.run(
        ["tpm2_pcrevent", "-T", tpm.tcti, str(index)], input=b"x", check=True, timeout=10, capture_output=True
    )


def test_random_bytes_differ_when_asked_twice(tpm: Tpm) -> None:
    with PlatformTpm(tpm.tcti) as platform:
        first, second = platform.random(100), platform.random(100)
    assert len(first) == len(second) == 100
    assert first != second


def test_info_names_maker_and_banks_when_asked(tpm: Tpm) -> None:
    with PlatformTpm(tpm.tcti) as platform:
        info = platform.info()
    assert info.manufacturer == "IBM"
    assert info.vendor == "SWTPM"
    assert info.firmware.count(".") == 3
    assert "sha256" in info.banks


def test_error_is_clear_when_the_tpm_goes_away(tpm: Tpm) -> None:
    with PlatformTpm(tpm.tcti) as platform:
        tpm.stop()
        with pytest.raises(PlatformTpmError, match="went away"):
            platform.random(8)


def test_error_is_clear_when_the_tpm_is_absent(kind: type[Tpm], directory: Path) -> None:
    with pytest.raises(PlatformTpmError, match="cannot be reached"):
        PlatformTpm(kind(directory).tcti)


def test_error_comes_in_time_when_the_tpm_hangs(kind: type[Tpm], tpm: Tpm) -> None:
    pid = tpm.pid if isinstance(tpm, SwtpmPlatform) else tpm.process.pid  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(PlatformTpmError, match=r"no answer within 0\.5 s"):
        PlatformTpm(tpm.tcti, timeout_s=0.5)
    assert time.monotonic() - began < 3
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("tcti", ["nonsense", "nonsense:x", "", "device:/dev/none", "swtpm:", "swtpm:path="])
def test_error_is_clear_when_the_tcti_is_wrong(tcti: str) -> None:
    with pytest.raises(PlatformTpmError):
        PlatformTpm(tcti, timeout_s=5)


@pytest.mark.parametrize(
    "text", ["", "sha256", "sha256:", "sha1:0", "md5:0", "sha256:24", "sha256:0,0", "sha256:0,", "sha256:-1", "0,1"]
)
def test_selection_is_refused_when_it_protects_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        PcrSelection.parse(text)


def test_policy_digest_is_the_tpms_when_computed_here(tpm: Tpm, directory: Path) -> None:
    extend(tpm, 2)
    with PlatformTpm(tpm.tcti) as platform:
        digest = pcr_policy_digest(DEFAULT_PCRS, platform.pcr_values(DEFAULT_PCRS))
    policy = directory / "policy"
    subprocess.run(
        ["tpm2_createpolicy", "-T", tpm.tcti, "--policy-pcr", "-l", str(DEFAULT_PCRS), "-L", str(policy)],
        check=True,
        timeout=10,
        capture_output=True,
    )
    assert policy.read_bytes() == digest


def test_many_pcrs_are_read_when_they_take_several_answers(platform: PlatformTpm) -> None:
    platform.extend(15, PcrBank.SHA256, b"x" * 32)
    values = platform.pcr_values(PcrSelection.parse("sha256:" + ",".join(map(str, range(24)))))
    assert sorted(values) == list(range(24))
    assert any(values[15])


@pytest.mark.parametrize("bank", PcrBank)
def test_pcr_is_what_was_predicted_when_extended(platform: PlatformTpm, bank: PcrBank) -> None:
    digests = [hashlib.new(bank, text).digest() for text in (b"one", b"two")]
    for digest in digests:
        platform.extend(9, bank, digest)
    predicted = predict_pcr(bank, bytes(bank.digest_bytes), digests)
    assert platform.pcr_values(PcrSelection(bank, (9,))) == {9: predicted}


def test_extending_is_refused_when_pcr_or_size_is_wrong(platform: PlatformTpm) -> None:
    for index, size in ((24, 32), (-1, 32), (9, 20), (9, 48)):
        with pytest.raises(UsageError):
            platform.extend(index, PcrBank.SHA256, bytes(size))


def test_next_call_connects_anew_when_the_tpm_is_back(tpm: Tpm, platform: PlatformTpm) -> None:
    tpm.stop()
    for _ in range(2):
        with pytest.raises(PlatformTpmError, match=r"went away|cannot be reached"):
            platform.random(8)
    tpm.start()
    assert len(platform.random(8)) == 8


def test_endorsement_name_is_that_of_the_standard_template_when_compared(tpm: Tpm, directory: Path) -> None:
    with PlatformTpm(tpm.tcti) as platform:
        ours = platform._connection.run("make a key", platform._connection.endorsement_name)
    public = directory / "ek.tpmt"
    subprocess.run(
        [
            "tpm2_createek",
            "-T",
            tpm.tcti,
            "-G",
            "ecc",
            "-c",
            directory / "ek.ctx",
            "-f",
            "tpmt",
            "-u",
            public,
        ],
        check=True,
        timeout=10,
        capture_output=True,
    )
    assert ours == b"\0\x0b" + hashlib.sha256(public.read_bytes()).digest()
