"""platform: what its commands ask of the manager, what they write and print."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.cli.conftest import Cli
from tests.unit.client.canned_manager import ENROLLED, POLICY_FILE, REQUEST, CannedManager
from tests.unit.migration.evidence_examples import AUTHORITY, POLICY
from tests.unit.migration.evidence_examples import evidence as shown_evidence
from tests.unit.tpm.attest_examples import NONCE
from vtpm.errors import UsageError
from vtpm.migration.evidence_file import MAX_FILE_BYTES, EvidenceFile, decode_evidence_file, encode_evidence_file
from vtpm.migration.policy import PlatformPolicy, print_policy
from vtpm.wire.evidence import Evidence, encode_evidence


def test_request_is_written_and_its_endorsement_key_printed(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "request"
    ended = cli("platform", "enroll", "--name", "host-b", "--out", str(path))
    assert ended.status == 0
    assert dict(line.split(None, 1) for line in ended.out.splitlines()) == {
        "name": "host-b",
        "kind": "hardware",
        "ek": "ab" * 32,
        "file": str(path),
    }
    assert path.read_text() == REQUEST
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert manager.asked[0].body == {"name": "host-b"}
    again = cli("platform", "enroll", "--name", "host-b", "--out", str(path))
    assert (again.status, len(manager.asked)) == (2, 1)


def test_request_is_written_beside_when_no_file_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = json.loads(cli("platform", "enroll", "--name", "host-b", "--json").out)
    assert asked == {"name": "host-b", "kind": "hardware", "ek": "ab" * 32, "file": "platform-enrolment.json"}
    assert (tmp_path / asked["file"]).read_text() == REQUEST


def test_certificate_is_handed_over_as_it_was_carried(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    path.write_text("sealed")
    ended = cli("platform", "enroll", "--certificate", str(path))
    assert manager.asked[0].body == {"certificate": "sealed"}
    shown = cli("platform", "show")
    assert ended.out == shown.out
    assert shown.out.splitlines()[0].split() == ["name", "host-b"]
    assert ENROLLED.authority in shown.out
    assert json.loads(cli("platform", "show", "--json").out) == dataclasses.asdict(ENROLLED)


@pytest.mark.parametrize(
    "words",
    [[], ["--name", "a", "--certificate", "f"], ["--certificate", "f", "--out", "g"], ["--out", "g"]],
    ids=" ".join,
)
def test_enrolment_is_refused_when_it_is_not_clear_what_is_meant(
    cli: Cli, manager: CannedManager, words: list[str]
) -> None:
    ended = cli("platform", "enroll", *words)
    assert ended.status == 2
    assert not manager.asked


@pytest.mark.parametrize("content", [b"\xff", bytes(16 * 1024 + 1)])
def test_certificate_is_refused_when_the_file_can_be_none(
    cli: Cli, manager: CannedManager, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "sealed"
    path.write_bytes(content)
    assert cli("platform", "enroll", "--certificate", str(path)).status == 2
    assert not manager.asked


def test_evidence_is_written_and_policy_printed(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "evidence"
    assert cli("platform", "evidence", "--out", str(path)).status == 0
    assert path.read_text() == manager.evidence
    assert json.loads(cli("platform", "evidence", "--out", str(tmp_path / "more"), "--json").out)["file"].endswith(
        "more"
    )
    assert cli("platform", "policy").out == POLICY_FILE
    assert json.loads(cli("platform", "policy", "--json").out) == {"policy": POLICY_FILE}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A policy, evidence that passes it, and who has enrolled that."""
    put(tmp_path)
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "authority.pem").write_bytes(AUTHORITY.public_bytes(Encoding.PEM))
    return tmp_path


def put(folder: Path, policy: PlatformPolicy = POLICY, found: Evidence | None = None, nonce: bytes = NONCE) -> None:
    (folder / "policy").write_text(print_policy(policy))
    file = EvidenceFile(nonce, encode_evidence(found or shown_evidence()))
    (folder / "evidence").write_bytes(encode_evidence_file(file))


def check(cli: Cli, folder: Path, *words: str, status: int = 0) -> str:
    ended = cli("policy", "check", str(folder / "policy"), *words)
    assert ended.status == status, ended.err
    return ended.err if status else ended.out


def test_policy_is_checked_without_a_manager(cli: Cli, files: Path, manager: CannedManager) -> None:
    assert json.loads(check(cli, files, "--json")) == {
        "policy": str(files / "policy"),
        "pcrs": "sha256:0,7,12,13",
        "embedded": "refused",
    }
    evidence = ("--evidence", str(files / "evidence"))
    assert json.loads(check(cli, files, *evidence, "--json"))["passes"] == "host-b"
    assert "host-b" in check(cli, files, *evidence, "--authorities", str(files / "trusted"))
    (files / "policy").write_text("bank = 7")
    assert "neither sha256 nor sha384" in check(cli, files, status=2)
    assert not manager.asked


def test_it_is_said_what_does_not_fit_when_evidence_does_not_pass(cli: Cli, files: Path) -> None:
    evidence = ("--evidence", str(files / "evidence"))
    put(files, dataclasses.replace(POLICY, pcrs=POLICY.pcrs | {7: frozenset({b"x" * 32})}))
    assert "PCR 7 of sha256" in check(cli, files, *evidence, status=15)
    put(files, nonce=bytes(32))
    assert "made for something else" in check(cli, files, *evidence, status=15)
    put(files)
    (files / "trusted" / "authority.pem").write_bytes(b"")
    assert "no certificate in PEM" in check(cli, files, *evidence, "--authorities", str(files / "trusted"), status=2)
    assert "needs --evidence" in check(cli, files, "--authorities", str(files / "trusted"), status=2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 5000,
        encode_evidence_file(EvidenceFile(NONCE, b"e", version=2)),
        encode_evidence_file(EvidenceFile(NONCE, b"e", form="a request")),
        b" " * (MAX_FILE_BYTES + 1),
    ],
    ids=["empty", "list", "deep", "version", "form", "long"],
)
def test_evidence_file_is_refused_when_it_is_none(content: bytes) -> None:
    with pytest.raises(UsageError, match="no evidence of a platform"):
        decode_evidence_file(content)
