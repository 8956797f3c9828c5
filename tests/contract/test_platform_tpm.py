"""What every platform TPM must do for the keeper: Debian's swtpm in the place of hardware, and the embedded TPM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tpm2_pytss import ESAPI, TPM2B_SENSITIVE_CREATE

from tests.support.processes import EmbeddedTpmProcess, short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError, StateError, UsageError
from vtpm.platform_tpm.objects import parent_template
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrSelection, pcr_policy_digest
from vtpm.platform_tpm.platform_tpm import MAX_SECRET_BYTES, PlatformTpm, ZeroPcrs
from vtpm.platform_tpm.sealed_blob import SealedBlob

pytestmark = pytest.mark.timeout(30)

SECRET = bytes(range(100, 132))
Tpm = SwtpmPlatform | EmbeddedTpmProcess
KINDS = {"swtpm": SwtpmPlatform, "embedded": EmbeddedTpmProcess}


@pytest.fixture(autouse=True)
def quiet_tss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSS2_LOG", "all+none")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[Tpm]:
    return KINDS[request.param]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def tpm(kind: type[Tpm], directory: Path) -> Iterator[Tpm]:
    with kind(directory) as started:
        yield started


def extend(tpm: Tpm, index: int) -> None:
    subprocess.run(
        ["tpm2_pcrevent", "-T", tpm.tcti, str(index)], input=b"x", check=True, timeout=10, capture_output=True
    )


def seal(tpm: Tpm, selection: PcrSelection = DEFAULT_PCRS) -> SealedBlob:
    with PlatformTpm(tpm.tcti) as platform:
        return platform.seal(SECRET, selection, zero_pcrs=ZeroPcrs.ALLOW)


def test_secret_opens_when_nothing_changed(tpm: Tpm) -> None:
    blob = seal(tpm)
    with PlatformTpm(tpm.tcti) as platform:
        assert platform.unseal(SealedBlob.from_bytes(blob.to_bytes())) == SECRET


def test_secret_opens_when_tpm_was_killed_and_started_again(tpm: Tpm) -> None:
    blob = seal(tpm)
    tpm.stop()
    tpm.start()
    with PlatformTpm(tpm.tcti) as platform:
        assert platform.unseal(blob) == SECRET


def test_secret_of_every_size_opens_when_allowed(tpm: Tpm) -> None:
    with PlatformTpm(tpm.tcti) as platform:
        for size in (1, MAX_SECRET_BYTES):
            assert platform.unseal(platform.seal(b"s" * size, DEFAULT_PCRS, zero_pcrs=ZeroPcrs.ALLOW)) == b"s" * size
        for size in (0, MAX_SECRET_BYTES + 1):
            with pytest.raises(PlatformTpmError, match="cannot be sealed"):
                platform.seal(b"s" * size, DEFAULT_PCRS, zero_pcrs=ZeroPcrs.ALLOW)


def test_refusal_names_the_pcrs_when_they_changed(tpm: Tpm) -> None:
    blob = seal(tpm)
    extend(tpm, 4)
    extend(tpm, 7)
    extend(tpm, 9)  # not of the selection
    with PlatformTpm(tpm.tcti) as platform, pytest.raises(PlatformTpmError, match="PCRs changed in bank sha256: 4, 7"):
        platform.unseal(blob)


def test_other_bank_protects_when_selected(tpm: Tpm) -> None:
    blob = seal(tpm, PcrSelection.parse("sha384:1,10"))
    with PlatformTpm(tpm.tcti) as platform:
        assert platform.unseal(blob) == SECRET
    extend(tpm, 10)
    with PlatformTpm(tpm.tcti) as platform, pytest.raises(PlatformTpmError, match="sha384: 10"):
        platform.unseal(blob)


def test_many_pcrs_are_read_when_they_take_several_answers(tpm: Tpm) -> None:
    selection = PcrSelection.parse("sha256:" + ",".join(map(str, range(24))))
    extend(tpm, 15)
    with PlatformTpm(tpm.tcti) as platform:
        values = platform.pcr_values(selection)
        assert sorted(values) == list(range(24))
        assert any(values[15])
        assert platform.unseal(platform.seal(SECRET, selection)) == SECRET


def test_sealing_is_refused_when_all_pcrs_are_zero(tpm: Tpm) -> None:
    with PlatformTpm(tpm.tcti) as platform, pytest.raises(PlatformTpmError, match="all zero"):
        platform.seal(SECRET, DEFAULT_PCRS)
    extend(tpm, 0)
    with PlatformTpm(tpm.tcti) as platform:
        assert platform.unseal(platform.seal(SECRET, DEFAULT_PCRS)) == SECRET


def test_another_tpm_is_told_apart_when_it_stands_in(kind: type[Tpm], tpm: Tpm) -> None:
    blob = seal(tpm)
    with (
        short_directory() as elsewhere,
        kind(elsewhere) as other,
        PlatformTpm(other.tcti) as platform,
        pytest.raises(PlatformTpmError, match="is not the one that the root key was sealed by"),
    ):
        platform.unseal(blob)


def test_cleared_tpm_is_told_apart_when_owner_is_new(tpm: Tpm) -> None:
    blob = seal(tpm)
    subprocess.run(["tpm2_clear", "-T", tpm.tcti, "-c", "p"], check=True, timeout=10, capture_output=True)
    with PlatformTpm(tpm.tcti) as platform, pytest.raises(PlatformTpmError, match="or was cleared"):
        platform.unseal(blob)


def test_damage_is_refused_when_any_byte_of_the_private_part_flips(tpm: Tpm) -> None:
    blob = seal(tpm)
    with PlatformTpm(tpm.tcti) as platform:
        for place in range(len(blob.private)):
            private = bytearray(blob.private)
            private[place] ^= 1
            with pytest.raises(StateError, match="damaged"):
                platform.unseal(replace(blob, private=bytes(private)))
        assert platform.unseal(blob) == SECRET


def test_damage_is_refused_when_any_byte_of_the_public_part_flips(tpm: Tpm) -> None:
    blob = seal(tpm)
    with PlatformTpm(tpm.tcti) as platform:
        for place in range(len(blob.public)):
            public = bytearray(blob.public)
            public[place] ^= 1
            with pytest.raises(StateError, match="damaged"):
                platform.unseal(replace(blob, public=bytes(public)))
        assert platform.unseal(blob) == SECRET


def test_open_door_is_refused_when_the_blob_claims_other_pcrs(tpm: Tpm) -> None:
    blob = seal(tpm)
    with PlatformTpm(tpm.tcti) as platform, pytest.raises(StateError, match="public area"):
        platform.unseal(replace(blob, selection=PcrSelection.parse("sha256:16,17,18,19")))


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


def test_sealing_works_when_a_killed_client_left_the_tpm_full(tpm: Tpm) -> None:
    # What a client does that is killed before it can flush: an ESAPI context that is left without a flush.
    for _ in range(3):
        with ESAPI(tpm.tcti) as esapi:
            esapi.create_primary(TPM2B_SENSITIVE_CREATE(), parent_template())
    with PlatformTpm(tpm.tcti) as platform:
        assert platform.unseal(platform.seal(SECRET, DEFAULT_PCRS, zero_pcrs=ZeroPcrs.ALLOW)) == SECRET


def test_nothing_stays_in_the_tpm_when_closed(tpm: Tpm) -> None:
    for _ in range(10):
        blob = seal(tpm)
        with PlatformTpm(tpm.tcti) as platform:
            platform.unseal(blob)
            platform.random(8)
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session", "handles-persistent"):
        listed = subprocess.run(
            ["tpm2_getcap", "-T", tpm.tcti, kind], check=True, timeout=10, capture_output=True, text=True
        )
        assert listed.stdout.strip() == ""


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
