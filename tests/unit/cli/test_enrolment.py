"""platform: what its commands ask of the manager, what they write and print."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli
from tests.unit.client.canned_manager import ENROLLED, REQUEST, CannedManager


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
