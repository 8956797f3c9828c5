"""policy, recovery-key and recover: what they ask of the manager, what they print, and what they refuse to do."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli, finish, start_program
from tests.unit.client.canned_manager import FINGERPRINT, PCR_0, PCR_7, PUBLIC_KEY, RECOVERY_KEY, STATUS, CannedManager
from vtpm.cli.files import NewFile
from vtpm.errors import StoreError
from vtpm.measurement.record import predict
from vtpm.tpm import authenticode
from vtpm.tpm.event_log import parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.wire.api import MeasuredServices, PcrSet, Policy

VALUE = "ab" * 32


def test_allowed_sets_are_shown_when_asked(cli: Cli, manager: CannedManager) -> None:
    manager.policy.sets.append(PcrSet("next\x1b[2J", [VALUE, PCR_7], False))
    shown = cli("policy", "show")
    assert shown.status == 0
    assert "set-up" in shown.out
    assert "\x1b" not in shown.out
    assert json.loads(cli("policy", "show", "--json").out)["sets"][1]["values"] == [VALUE, PCR_7]


def test_prediction_follows_the_options_and_changes_nothing_when_made(cli: Cli, manager: CannedManager) -> None:
    extended = hashlib.sha256(bytes.fromhex(PCR_0 + VALUE)).hexdigest()
    assert json.loads(cli("policy", "predict", "--json").out) == {"0": PCR_0, "7": PCR_7}
    assert json.loads(cli("policy", "predict", "--pcr", f"7={VALUE}", "--json").out) == {"0": PCR_0, "7": VALUE}
    assert json.loads(cli("policy", "predict", "--extend", f"0={VALUE}", "--json").out) == {"0": extended, "7": PCR_7}
    assert set(manager.methods()) == {"GET /v1/policy"}


def test_what_was_predicted_is_allowed_when_told_so(cli: Cli, manager: CannedManager) -> None:
    assert cli("policy", "allow", "kernel 6.2", "--pcr", f"7={VALUE}").status == 0
    assert manager.policy.sets[1] == PcrSet("kernel 6.2", [PCR_0, VALUE], False)
    assert cli("policy", "drop", "kernel 6.2").status == 0
    assert [found.label for found in manager.policy.sets] == ["set-up"]


@pytest.mark.parametrize("word", ["9=" + VALUE, "7", "7=abc", "7=" + "zz" * 32, "-1=" + VALUE, "x=" + VALUE])
def test_option_is_refused_by_name_when_it_is_no_pcr_value(cli: Cli, manager: CannedManager, word: str) -> None:
    for option in ("--pcr", "--extend"):
        refused = cli("policy", "allow", "next", option, word)
        assert refused.status == 2
        assert word in refused.err
    assert len(manager.policy.sets) == 1


def test_the_last_set_that_matches_stays_when_nobody_can_be_asked(cli: Cli, manager: CannedManager) -> None:
    manager.policy.sets.append(PcrSet("next", [VALUE, PCR_7], False))
    refused = cli("policy", "drop", "set-up")
    assert refused.status == 2
    assert "--yes" in refused.err
    assert len(manager.policy.sets) == 2
    assert cli("policy", "drop", "set-up", "--yes").status == 0


def test_recovery_key_is_shown_once_or_written_to_a_new_file(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    shown = cli("recovery-key", "--json")
    made = {"recovery_key": RECOVERY_KEY, "public_key": PUBLIC_KEY, "fingerprint": FINGERPRINT}
    assert json.loads(shown.out) == made
    assert manager.confirmed == PUBLIC_KEY
    shown = cli("recovery-key")
    # As it is to be written down, row by row.
    assert shown.out == f"{RECOVERY_KEY}\n"
    assert FINGERPRINT in shown.err and PUBLIC_KEY in shown.err
    path = tmp_path / "key"
    written = cli("recovery-key", "--output", str(path))
    assert written.status == 0
    assert "AAAA" not in written.out + written.err
    assert PUBLIC_KEY in written.err
    assert path.read_text() == f"{RECOVERY_KEY}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    asked = len(manager.asked)
    refused = cli("recovery-key", "--output", str(path))
    assert refused.status == 2
    assert "POST /v1/recovery-key" not in manager.methods()[asked:]
    manager.fail_with("platform_tpm")
    assert cli("recovery-key", "--output", str(tmp_path / "other"), "--yes").status == 7
    assert [path.name for path in tmp_path.iterdir() if "other" in path.name] == []


def test_recovery_key_is_not_confirmed_when_its_reader_is_gone(manager: CannedManager) -> None:
    for words in (("recovery-key",), ("recovery-key", "--json")):
        program = start_program(*words)
        assert program.stdout is not None
        program.stdout.close()
        program.stdout = None
        assert finish(program).status == 1
        assert "POST /v1/recovery-key" in manager.methods()
        assert manager.confirmed == ""


def test_recovery_key_is_not_confirmed_when_it_cannot_be_written(
    cli: Cli, manager: CannedManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: NewFile, data: bytes) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(NewFile, "fill", fail)
    assert cli("recovery-key", "--output", str(tmp_path / "key")).status == StoreError.exit_status
    assert "POST /v1/recovery-key" in manager.methods()
    assert manager.confirmed == ""


def test_recovery_key_stays_when_there_is_one_and_nobody_can_be_asked(cli: Cli, manager: CannedManager) -> None:
    assert STATUS.platform is not None
    manager.status = replace(STATUS, platform=replace(STATUS.platform, recovery="7B2J-0000"))
    refused = cli("recovery-key")
    assert refused.status == 2
    assert "stays as it is" in refused.err
    assert "POST /v1/recovery-key" not in manager.methods()
    assert cli("recovery-key", "--yes").status == 0


def test_recover_takes_the_key_from_a_file_or_standard_input(
    cli: Cli, manager: CannedManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_text(RECOVERY_KEY)
    assert cli("recover", "--key-file", str(path), "--yes").status == 0
    assert manager.recovered_with == RECOVERY_KEY
    manager.recovered_with = ""
    monkeypatch.setattr("sys.stdin", io.StringIO(RECOVERY_KEY))
    assert cli("recover").status == 2
    assert manager.recovered_with == ""
    assert cli("recover", "--yes").status == 0
    assert manager.recovered_with == RECOVERY_KEY
    for unreadable in (tmp_path, tmp_path / "absent"):
        assert cli("recover", "--key-file", str(unreadable), "--yes").status == 2


def test_services_of_the_next_boot_are_predicted_as_installed_when_asked(
    cli: Cli, manager: CannedManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, measurement = bytes(range(32)), "5e" * 32
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, f"{measurement}\n", ""))
    manager.policy = Policy("sha256:7,13", [PcrSet("set-up", [PCR_7, VALUE], True)], [PCR_7, VALUE])
    manager.status = replace(STATUS, measured=MeasuredServices("sha256", 13, VALUE, start.hex(), 1))
    expected = predict("sha256", start, (measurement,)).hex()
    assert json.loads(cli("policy", "predict", "--services", "--json").out) == {"7": PCR_7, "13": expected}
    assert cli("policy", "allow", "next", "--services", "--pcr", f"7={VALUE}").status == 0
    assert manager.policy.sets[1].values == [VALUE, expected]


@pytest.mark.parametrize(
    ("measured", "status", "words"),
    [
        (None, 2, "are not measured"),
        (MeasuredServices(note="not measured: services_pcr is 0"), 2, "are not measured"),
        (MeasuredServices("sha256", 13, VALUE, VALUE, 1, "it held something else"), 4, "it held something else"),
        (MeasuredServices("sha384", 7, VALUE, VALUE, 1), 2, "sealed under sha256"),
        (MeasuredServices("sha256", 13, VALUE, VALUE, 1), 2, "PCR 13, which the root key is not sealed under"),
    ],
)
def test_services_of_the_next_boot_are_refused_when_their_pcr_cannot_be_known_or_does_not_count(
    cli: Cli, manager: CannedManager, measured: MeasuredServices | None, status: int, words: str
) -> None:
    manager.status = replace(STATUS, measured=measured)
    refused = cli("policy", "allow", "next", "--services")
    assert refused.status == status
    assert words in refused.err
    assert len(manager.policy.sets) == 1


LOGS = Path(__file__).parents[2] / "vectors" / "eventlog"


def _log_of(boot: str) -> tuple[Path, str, list[str]]:
    """A recorded boot's log, what PCR 4 held after it, and the digests that made it."""
    path = LOGS / f"{boot}.bin"
    log = parse_event_log(path.read_bytes())
    digests = [event.digests[HashAlgorithm.SHA256].hex() for event in log.events if event.pcr == 4 and event.extends]
    return path, log.replay(HashAlgorithm.SHA256)[4].hex(), digests


def test_next_kernel_is_predicted_from_its_file_when_the_log_accounts_for_the_pcr(
    cli: Cli, manager: CannedManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, held, digests = _log_of("ovmf_unified_kernel")
    manager.policy = Policy("sha256:4,7", [PcrSet("set-up", [held, PCR_7], True)], [held, PCR_7])
    files = {tmp_path / "old.efi": digests[-1], tmp_path / "new.efi": VALUE}
    for file, digest in files.items():
        file.write_text(digest)
    # The digests of files are tested where they are made; here it is which event they stand for.
    monkeypatch.setattr(authenticode, "authenticode_digest", lambda image, _: bytes.fromhex(bytes(image).decode()))
    words = ("--efi", f"{tmp_path / 'old.efi'}={tmp_path / 'new.efi'}", "--event-log", str(path))
    expected = bytes(32)
    for digest in [*digests[:-1], VALUE]:
        expected = hashlib.sha256(expected + bytes.fromhex(digest)).digest()
    assert json.loads(cli("policy", "predict", *words, "--json").out) == {"4": expected.hex(), "7": PCR_7}
    # A log that does not lead to what the PCR holds says nothing about the next boot.
    manager.policy = Policy("sha256:4,7", [PcrSet("set-up", [VALUE, PCR_7], True)], [VALUE, PCR_7])
    refused = cli("policy", "allow", "next", *words)
    assert refused.status == 7
    assert len(manager.policy.sets) == 1


def test_prediction_is_refused_clearly_when_a_file_is_not_what_it_should_be(
    cli: Cli, manager: CannedManager, tmp_path: Path
) -> None:
    path, held, _ = _log_of("ovmf_kernel")
    no_image = tmp_path / "text"
    no_image.write_text("no EFI application")
    assert "PCR 4" in cli("policy", "predict", "--efi", f"{no_image}={no_image}").err
    manager.policy = Policy("sha256:4", [PcrSet("set-up", [held], True)], [held])
    for words, name in (
        ((f"{no_image}={no_image}", path), str(no_image)),
        ((f"{tmp_path / 'absent'}={no_image}", path), "absent"),
        ((str(no_image), path), "OLD=NEW"),
    ):
        refused = cli("policy", "predict", "--efi", words[0], "--event-log", str(words[1]))
        assert refused.status == 2
        assert name in refused.err


@pytest.mark.parametrize(
    "words", [("recovery-key", "--yes"), ("recover", "--yes", "--key-file", "KEY")], ids=lambda words: words[0]
)
def test_no_core_is_dumped_when_a_recovery_key_is_held(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    forbidden: list[bool] = []
    monkeypatch.setattr("vtpm.confine.service.forbid_core_dumps", lambda: forbidden.append(True))
    (tmp_path / "key").write_text(RECOVERY_KEY)
    cli(*(str(tmp_path / "key") if word == "KEY" else word for word in words))
    assert forbidden == [True]
