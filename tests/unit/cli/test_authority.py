"""authority: keys and certificates that it leaves, and what it certifies, without any manager."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.cli.conftest import Cli
from tests.unit.client.canned_manager import CannedManager
from tests.unit.migration.enrolment_examples import authority as manufacturer
from tests.unit.migration.enrolment_examples import ek_certificate, request
from tests.unit.migration.test_enrolment import activated
from tests.unit.tpm.attest_examples import public_area
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind, verify
from vtpm.migration.enrolment import decode_sealed, encode_file, endorsement_fingerprint, open_sealed
from vtpm.tpm.attest import read_signing_key

EK = endorsement_fingerprint(request())


@pytest.fixture
def folder(tmp_path: Path, manager: CannedManager) -> Path:
    (tmp_path / "request").write_bytes(encode_file(request()))
    return tmp_path


def certify(cli: Cli, folder: Path, *how: str, status: int = 0) -> str:
    out = folder / "sealed"
    out.unlink(missing_ok=True)
    ended = cli(
        "authority", "certify", str(folder / "ca"), str(folder / "request"), "--name", "host-b", "--out", str(out), *how
    )
    assert ended.status == status, ended.err
    assert out.exists() is (status == 0)
    return ended.err if status else ended.out


def certified(folder: Path) -> CertifiedPlatform:
    """What is said of the platform, by the authority that is trusted."""
    sealed = decode_sealed((folder / "sealed").read_bytes())
    certificate, _ = open_sealed(sealed, activated(sealed), public_area())
    trusted = x509.load_pem_x509_certificate((folder / "ca" / "authority.pem").read_bytes())
    return verify(certificate, [trusted], read_signing_key(public_area()), datetime.now(UTC))


def test_authority_certifies_what_the_operator_names(cli: Cli, folder: Path, manager: CannedManager) -> None:
    assert cli("authority", "new", str(folder / "ca"), "--name", "test").status == 0
    for name in ("authority.key", "authority.pem"):
        assert stat.S_IMODE((folder / "ca" / name).stat().st_mode) == 0o600
    out = certify(cli, folder, "--ek", EK, "--json")
    assert json.loads(out) == {"name": "host-b", "kind": "hardware", "ek": EK, "file": str(folder / "sealed")}
    said = certified(folder)
    assert (said.name, said.kind) == ("host-b", PlatformKind.HARDWARE)
    certify(cli, folder, "--embedded")
    assert certified(folder).kind is PlatformKind.EMBEDDED
    assert not manager.asked


def test_authority_certifies_what_a_manufacturer_has_certified(cli: Cli, folder: Path) -> None:
    cli("authority", "new", str(folder / "ca"), "--name", "test")
    roots = folder / "roots"
    roots.mkdir()
    assert "not 1 to" in certify(cli, folder, "--ek-roots", str(roots), status=2)
    root = manufacturer("root")
    (roots / "root.pem").write_bytes(root.certificate.public_bytes(Encoding.PEM))
    assert "has no certificate by its manufacturer" in certify(cli, folder, "--ek-roots", str(roots), status=15)
    (folder / "request").write_bytes(encode_file(request(ek_certificate(manufacturer("root")))))
    assert "leads to none of the roots" in certify(cli, folder, "--ek-roots", str(roots), status=15)


@pytest.mark.parametrize(
    "how", [[], ["--ek", EK, "--embedded"], ["--ek-roots", "x", "--ek", EK]], ids=["none", "two", "another two"]
)
def test_nothing_is_certified_when_it_is_not_said_what_it_is(cli: Cli, folder: Path, how: list[str]) -> None:
    cli("authority", "new", str(folder / "ca"), "--name", "test")
    assert "give one of" in certify(cli, folder, *how, status=2)


def test_key_opens_by_its_passphrase_alone_when_it_has_one(cli: Cli, folder: Path) -> None:
    for name, text in (("words", "several good words\n"), ("others", "several other words\n"), ("short", "few\n")):
        (folder / name).write_text(text)
    new = ("authority", "new", str(folder / "ca"), "--name", "test", "--passphrase-file")
    assert cli(*new, str(folder / "short")).status == 2
    assert json.loads(cli(*new, str(folder / "words"), "--json").out)["encrypted"] is True
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in (folder / "ca" / "authority.key").read_bytes()
    for wrong in ([], ["--passphrase-file", str(folder / "others")]):
        assert "does not open" in certify(cli, folder, "--ek", EK, *wrong, status=8)
    certify(cli, folder, "--ek", EK, "--passphrase-file", str(folder / "words"))
    assert certified(folder).kind is PlatformKind.HARDWARE


def test_authority_is_not_replaced_when_there_is_one(cli: Cli, folder: Path) -> None:
    new = ("authority", "new", str(folder / "ca"), "--name", "test")
    assert cli(*new).status == 0
    before = {path.name: path.read_bytes() for path in (folder / "ca").iterdir()}
    assert cli(*new).status == 2
    assert {path.name: path.read_bytes() for path in (folder / "ca").iterdir()} == before


def test_authority_is_refused_when_key_and_certificate_are_not_a_pair(cli: Cli, folder: Path) -> None:
    for name in ("ca", "other"):
        cli("authority", "new", str(folder / name), "--name", "test")
    os.replace(folder / "other" / "authority.pem", folder / "ca" / "authority.pem")
    assert "do not belong together" in certify(cli, folder, "--ek", EK, status=8)
    (folder / "ca" / "authority.pem").write_bytes(b"")
    assert "not exactly one certificate" in certify(cli, folder, "--ek", EK, status=8)
    (folder / "ca" / "authority.key").unlink()
    assert "cannot be read" in certify(cli, folder, "--ek", EK, status=2)


def test_nothing_is_certified_when_the_request_is_none(cli: Cli, folder: Path) -> None:
    cli("authority", "new", str(folder / "ca"), "--name", "test")
    (folder / "request").write_bytes(b"{}")
    assert "no vtpm platform enrolment request" in certify(cli, folder, "--ek", EK, status=2)


def test_nothing_is_certified_under_another_name_than_the_operator_knows_the_host_by(cli: Cli, folder: Path) -> None:
    cli("authority", "new", str(folder / "ca"), "--name", "test")
    out = folder / "sealed"
    words = ("certify", str(folder / "ca"), str(folder / "request"), "--name", "host-a", "--out", str(out), "--ek", EK)
    ended = cli("authority", *words)
    assert ended.status == 2
    assert "asks for the name 'host-b', not for 'host-a': nothing was certified" in ended.err
    assert not out.exists()
