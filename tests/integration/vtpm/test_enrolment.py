"""A host's platform is enrolled by files that are carried, and what is kept is of its own TPM."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.keeper.test_attesting import put_certificate
from tests.support.host import Host
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform, booted_platform
from vtpm.errors import AttestationError, NotFoundError, UsageError
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.credential import read_endorsement_key

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@contextlib.contextmanager
def hardware() -> Iterator[tuple[Host, SwtpmPlatform]]:
    with booted_platform() as platform, Host(platform.tcti) as host:
        yield host, platform


def request(host: Host, folder: Path, name: str) -> dict[str, str]:
    asked: dict[str, str] = json.loads(
        host.cli("platform", "enroll", "--name", name, "--out", str(folder / f"{name}.request"), "--json").stdout
    )
    return asked


def certify(host: Host, folder: Path, name: str, *how: str) -> Path:
    sealed = folder / f"{name}.sealed"
    host.cli(
        "authority",
        "certify",
        str(folder / "ca"),
        str(folder / f"{name}.request"),
        "--name",
        name,
        "--out",
        str(sealed),
        *how,
    )
    return sealed


def manufacturers_certificate(swtpm: SwtpmPlatform, folder: Path) -> Path:
    """Have swtpm's own authority certify the endorsement key, put it into the TPM, and return its roots' folder."""
    with PlatformTpm(swtpm.tcti) as tpm:
        numbers = read_endorsement_key(tpm.identity().endorsement).key.public_numbers()
    home, roots = folder / "localca", folder / "roots"
    for place in (home, roots):
        place.mkdir()
    (home / "conf").write_text(
        f"statedir = {home}\nsigningkey = {home}/signkey.pem\nissuercert = {home}/issuercert.pem\n"
        f"certserial = {home}/certserial\n"
    )
    (home / "opts").write_text("--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n")
    command = [
        *("swtpm_localca", "--type", "ek", "--dir", str(home), "--configfile", str(home / "conf")),
        *("--ek", f"x={numbers.x:064x},y={numbers.y:064x},id=secp256r1", "--optsfile", str(home / "opts")),
        *("--vmid", "test", "--tpm2", "--tpm-spec-family", "2.0", "--tpm-spec-level", "0"),
        *("--tpm-spec-revision", "159", "--tpm-manufacturer", "id:00001014", "--tpm-model", "swtpm"),
        *("--tpm-version", "id:20191023"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    put_certificate(swtpm, (home / "ek.cert").read_bytes(), folder)
    for name in ("swtpm-localca-rootca-cert.pem", "issuercert.pem"):
        (roots / name).write_bytes((home / name).read_bytes())
    return roots


def test_platform_is_enrolled_when_the_operator_names_its_endorsement_key(folder: Path) -> None:
    with hardware() as (host, _), host.client() as client:
        with pytest.raises(NotFoundError, match="not enrolled"):
            client.enrolled()
        host.cli("authority", "new", str(folder / "ca"), "--name", "test authority")
        asked = request(host, folder, "host-b")
        assert asked["kind"] == "hardware"
        sealed = certify(host, folder, "host-b", "--ek", asked["ek"])
        host.cli("platform", "enroll", "--certificate", str(sealed))
        shown = json.loads(host.cli("platform", "show", "--json").stdout)
        assert (shown["name"], shown["kind"], shown["authority"]) == ("host-b", "hardware", "test authority")
        kept = host.state_dir / "platform" / "enrolled.json"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        kinds = [event.kind for event in client.all_events() if event.kind.startswith("platform_")]
        assert kinds == ["platform_enrolment_requested", "platform_enrol_asked", "platform_enrolled"]
        # It outlives the services, and comes in the place of an earlier one.
        host.shut_down()
        host.start()
        assert client.enrolled().name == "host-b"
        request(host, folder, "host-c")
        host.cli("platform", "enroll", "--certificate", str(certify(host, folder, "host-c", "--embedded")))
        assert (client.enrolled().name, client.enrolled().kind) == ("host-c", "embedded")
        kept.write_bytes(b"{}")
        done = host.cli("platform", "show", check=False)
        assert done.returncode == 8
        assert "damaged" in done.stderr


def test_platform_is_enrolled_when_its_manufacturer_has_certified_it(folder: Path) -> None:
    with booted_platform() as platform:
        roots = manufacturers_certificate(platform, folder)
        with Host(platform.tcti) as host, host.client() as client:
            host.cli("authority", "new", str(folder / "ca"), "--name", "test")
            request(host, folder, "host-b")
            host.cli(
                "platform",
                "enroll",
                "--certificate",
                str(certify(host, folder, "host-b", "--ek-roots", str(roots))),
            )
            assert client.enrolled().kind == "hardware"
            (roots / "swtpm-localca-rootca-cert.pem").write_bytes((folder / "ca" / "authority.pem").read_bytes())
            with pytest.raises(AssertionError, match="leads to none of the roots"):
                certify(host, folder, "host-b", "--ek-roots", str(roots), "--out", str(folder / "another"))


def test_certificate_is_kept_by_nobody_else_when_it_is_carried_to_another_host(folder: Path) -> None:
    with hardware() as (host, _), Host() as other, other.client() as client:
        host.cli("authority", "new", str(folder / "ca"), "--name", "test")
        asked = request(host, folder, "host-b")
        sealed = certify(host, folder, "host-b", "--ek", asked["ek"])
        with pytest.raises(AttestationError, match="another platform or another key"):
            client.keep_certificate(sealed.read_text())
        with pytest.raises(NotFoundError):
            client.enrolled()
        with pytest.raises(UsageError, match="no vtpm sealed platform certificate"):
            client.keep_certificate((folder / "host-b.request").read_text())
        # The stand-in says what it is, and is certified as nothing else.
        mine = request(other, folder, "host-c")
        assert mine["kind"] == "embedded"
        with pytest.raises(AssertionError, match="embedded stand-in"):
            certify(other, folder, "host-c", "--ek", mine["ek"])
        other.cli("platform", "enroll", "--certificate", str(certify(other, folder, "host-c", "--embedded")))
        assert (client.enrolled().name, client.enrolled().kind) == ("host-c", "embedded")
        assert not [event for event in client.all_events() if event.kind == "platform_enrol_failed"]


def test_host_passes_the_policy_that_it_printed_and_no_other(folder: Path) -> None:
    policy, trusted = folder / "platform-policy.toml", folder / "trusted"
    with booted_platform() as platform, Host(platform.tcti, settings=f'platform_policy = "{policy}"\n') as host:
        folder.chmod(0o755)
        host.cli("authority", "new", str(folder / "ca"), "--name", "test")
        asked = request(host, folder, "host-b")
        host.cli("platform", "enroll", "--certificate", str(certify(host, folder, "host-b", "--ek", asked["ek"])))
        text = host.cli("platform", "policy").stdout
        policy.write_text(text)
        host.cli("platform", "evidence", "--out", str(folder / "evidence"))
    trusted.mkdir()
    (trusted / "test.pem").write_bytes((folder / "ca" / "authority.pem").read_bytes())
    check = ("policy", "check", str(policy), "--evidence", str(folder / "evidence"), "--authorities", str(trusted))
    passed = json.loads(host.cli(*check, "--json").stdout)
    assert (passed["passes"], passed["kind"], passed["embedded"]) == ("host-b", "hardware", "refused")
    assert passed["pcrs"] == "sha256:0,12,13"
    (measured,) = (line for line in text.splitlines() if line.startswith("0 = "))
    policy.write_text(text.replace(measured, f'0 = ["{"ab" * 32}"]'))
    done = host.cli(*check, check=False)
    assert done.returncode == 15
    assert "host-b has booted something that policy does not allow: PCR 0 of sha256" in done.stderr
