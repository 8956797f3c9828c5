"""export and import: what they ask of the manager, what they write and read, and what they refuse to do."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Cli, on_terminal
from tests.unit.client.canned_manager import BACKUP, FINGERPRINT, STOPPED, VM_UUID, CannedManager
from tests.unit.vault import swtpm_files
from vtpm.vault.swtpm_blob import SwtpmKey

PASSPHRASE = "correct horse battery staple"
STATE = bytes(range(256)) * 4


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file with the passphrase, ended by a line break as editors do."""
    path = tmp_path / "passphrase"
    path.write_text(f"{PASSPHRASE}\n")
    return path


def body_of_last(manager: CannedManager) -> Any:
    return manager.asked[-1].body


# export


def test_backup_is_in_a_new_private_file_when_exported(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "web1.vtpm"
    ended = cli("export", "web1", "--output", str(path), "--yes")
    assert (ended.status, ended.err) == (0, "Exporting web1 ...\n")
    assert f"it opens with recovery key {FINGERPRINT}" in ended.out
    assert path.read_bytes() == BACKUP
    assert path.stat().st_mode & 0o777 == 0o600
    assert manager.methods() == ["POST /v1/vtpms/web1/export"]
    assert body_of_last(manager) == {"recovery_key": None, "passphrase": None}


def test_backup_is_sealed_to_what_is_named_when_exported(
    cli: Cli, manager: CannedManager, tmp_path: Path, secret: Path
) -> None:
    ended = cli("export", "web1", "--output", str(tmp_path / "a"), "--passphrase-file", str(secret), "--yes", "--json")
    assert json.loads(ended.out) == {
        "name": "web1",
        "uuid": str(STOPPED.uuid),
        "epoch": 1,
        "exported_at": "2026-07-01T10:00:00Z",
        "sealed_to": "",
        "file": str(tmp_path / "a"),
    }
    assert body_of_last(manager) == {"recovery_key": None, "passphrase": PASSPHRASE}
    cli("export", "web1", "--output", str(tmp_path / "b"), "--recovery-key", str(secret), "--yes")
    assert body_of_last(manager) == {"recovery_key": PASSPHRASE, "passphrase": None}
    assert PASSPHRASE not in ended.out + ended.err


def test_nothing_is_exported_when_the_file_is_there_already(
    cli: Cli, manager: CannedManager, tmp_path: Path, secret: Path
) -> None:
    before = secret.read_bytes()
    refused = cli("export", "web1", "--output", str(secret), "--yes")
    assert refused.status == 2
    assert "Name a new file" in refused.err
    assert secret.read_bytes() == before
    assert cli("export", "web1", "--output", str(tmp_path / "no" / "folder"), "--yes").status == 2
    assert manager.methods() == []


def test_no_file_is_left_when_the_export_fails(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    manager.fail_with("conflict", "web1 is running", "Stop it")
    path = tmp_path / "web1.vtpm"
    ended = cli("export", "web1", "--output", str(path), "--yes")
    assert (ended.status, ended.out) == (4, "")
    assert ended.err.endswith("error: web1 is running\nnext: Stop it\n")
    assert not path.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["export", "web1", "--output", "OUT"],
        ["export", "web1", "--output", "OUT", "--yes", "--recovery-key", "SECRET", "--passphrase-file", "SECRET"],
        ["export", "web1", "--output", "OUT", "--yes", "--passphrase-file", "ABSENT"],
        ["export", "web1", "--yes"],
        ["import"],
        ["import", "SECRET", "--from-swtpm", "DIR"],
        ["import", "SECRET", "--original-is-dead", "--yes"],
        ["import", "SECRET", "--original-is-dead", "--yes", "--recovery-key-file", "SECRET", "--passphrase-file",
         "SECRET"],
        ["import", "SECRET", "--passphrase-file", "SECRET", "--yes"],
        ["import", "SECRET", "--passphrase-file", "SECRET", "--original-is-dead"],
        ["import", "SECRET", "--passphrase-file", "SECRET", "--original-is-dead", "--yes", "--key-file", "SECRET"],
        ["import", "SECRET", "--passphrase-file", "SECRET", "--original-is-dead", "--yes", "--kdf", "sha512"],
        ["import", "SECRET", "--passphrase-file", "SECRET", "--original-is-dead", "--yes", "--vm-uuid", str(VM_UUID)],
        ["import", "ABSENT", "--passphrase-file", "SECRET", "--original-is-dead", "--yes"],
        ["import", "--from-swtpm", "DIR", "--yes"],
        ["import", "--from-swtpm", "DIR", "--name", "web2"],
        ["import", "--from-swtpm", "DIR", "--name", "web2", "--yes", "--original-is-dead"],
        ["import", "--from-swtpm", "DIR", "--name", "web2", "--yes", "--recovery-key-file", "SECRET"],
        ["import", "--from-swtpm", "DIR", "--name", "web2", "--yes", "--key-format", "binary"],
        ["import", "--from-swtpm", "DIR", "--name", "web2", "--yes", "--kdf", "sha512"],
        ["import", "--from-swtpm", "DIR", "--name", "web2", "--yes", "--key-file", "SECRET", "--passphrase-file",
         "SECRET"],
        ["import", "--from-swtpm", "ABSENT", "--name", "web2", "--yes"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_nothing_is_asked_of_the_manager_when_the_words_do_not_go_together(
    cli: Cli, manager: CannedManager, tmp_path: Path, secret: Path, words: list[str]
) -> None:
    directory = tmp_path / "swtpm"
    directory.mkdir()
    (directory / "tpm2-00.permall").write_bytes(swtpm_files.plain(STATE))
    places = {
        "OUT": str(tmp_path / "out"),
        "SECRET": str(secret),
        "ABSENT": str(tmp_path / "absent"),
        "DIR": str(directory),
    }
    ended = cli(*(places.get(word, word) for word in words))
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.count("error: ") == 1
    assert not (tmp_path / "out").exists()
    assert [asked for asked in manager.methods() if not asked.startswith("GET")] == []


def test_question_says_what_is_at_stake_when_there_is_a_terminal(manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "web1.vtpm"
    refused = on_terminal("export", "web1", "--output", str(path), typed="n\n")
    assert refused.status == 2
    assert "has the TPM of web1" in refused.out
    assert not path.exists()


# import of a backup


def test_backup_and_what_opens_it_are_sent_when_imported(
    cli: Cli, manager: CannedManager, tmp_path: Path, secret: Path
) -> None:
    path = tmp_path / "backup"
    path.write_bytes(BACKUP)
    word = ["--original-is-dead", "--yes"]
    ended = cli("import", str(path), "--passphrase-file", str(secret), *word)
    assert (ended.status, ended.err) == (0, f"Importing {path} ...\n")
    assert ended.out == f"web2 imported, stopped: TPM 2.0, uuid {STOPPED.uuid}, epoch 2\n"
    sent = {
        "backup": base64.b64encode(BACKUP).decode(),
        "original_is_dead": True,
        "name": None,
        "recovery_key": None,
        "passphrase": PASSPHRASE,
    }
    assert (manager.methods(), body_of_last(manager)) == (["POST /v1/import"], sent)
    ended = cli("import", str(path), "--recovery-key-file", str(secret), "--name", "db", *word, "--json")
    assert json.loads(ended.out)["name"] == "db"
    assert body_of_last(manager) == {**sent, "name": "db", "recovery_key": PASSPHRASE, "passphrase": None}


def test_file_is_not_sent_when_no_backup_is_so_large(
    cli: Cli, manager: CannedManager, tmp_path: Path, secret: Path
) -> None:
    path = tmp_path / "backup"
    with path.open("wb") as file:
        file.truncate(100 << 30)
    ended = cli("import", str(path), "--passphrase-file", str(secret), "--original-is-dead", "--yes")
    assert ended.status == 2
    assert "is no backup" in ended.err
    assert manager.asked == []


def test_key_is_not_shown_when_its_file_is_no_text(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"VTPM-RECOVERY-KEY-1 SECRET \xff")
    ended = cli("import", str(path), "--recovery-key-file", str(path), "--original-is-dead", "--yes")
    assert ended.status == 2
    assert "is not UTF-8" in ended.err
    assert "SECRET" not in ended.err


# import of an swtpm


def sent_by_swtpm_import(manager: CannedManager, directory: Path) -> dict[str, Any]:
    asked = manager.asked.pop()
    assert (asked.method, asked.path) == ("POST", "/v1/import/swtpm")
    assert asked.body["source"] == str(directory)
    return dict(asked.body)


def test_permanent_state_alone_is_sent_when_an_swtpm_is_imported(
    cli: Cli, manager: CannedManager, tmp_path: Path
) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(swtpm_files.plain(STATE))
    (tmp_path / "tpm2-00.volatilestate").write_bytes(swtpm_files.plain(b"volatile"))
    ended = cli("import", "--from-swtpm", str(tmp_path), "--name", "db", "--vm-uuid", str(VM_UUID), "--yes")
    assert ended.out.startswith("db imported, stopped: TPM 2.0")
    body = sent_by_swtpm_import(manager, tmp_path)
    assert base64.b64decode(body["permanent"]) == STATE
    assert (body["name"], body["tpm_version"], body["savestate"]) == ("db", "2.0", "")
    assert body["vm_uuid"] == str(VM_UUID)
    assert base64.b64encode(b"volatile").decode() not in json.dumps(body)


def test_savestate_is_sent_too_when_the_swtpm_is_a_tpm_12(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    (tmp_path / "tpm-00.permall").write_bytes(swtpm_files.plain(STATE))
    (tmp_path / "tpm-00.savestate").write_bytes(swtpm_files.plain(b"saved"))
    assert cli("import", "--from-swtpm", str(tmp_path), "--name", "db", "--yes").status == 0
    body = sent_by_swtpm_import(manager, tmp_path)
    assert (body["tpm_version"], base64.b64decode(body["savestate"])) == ("1.2", b"saved")


def test_state_of_an_swtpm_is_decrypted_when_its_key_is_given(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    key = b"\x5a" * 32
    directory, hexadecimal, binary, passphrase = (tmp_path / name for name in ("swtpm", "hex", "binary", "pwd"))
    directory.mkdir()
    hexadecimal.write_text(key.hex())
    binary.write_bytes(key)
    passphrase.write_bytes(b"s3cret\n")
    stretched = SwtpmKey.from_passphrase(b"s3cret\n").of_size(32)
    assert stretched is not None
    words = ["import", "--from-swtpm", str(directory), "--name", "db", "--yes"]
    for used, options in (
        (key, ["--key-file", str(hexadecimal)]),
        (key, ["--key-file", str(binary), "--key-format", "binary"]),
        (stretched, ["--passphrase-file", str(passphrase)]),
    ):
        (directory / "tpm2-00.permall").write_bytes(swtpm_files.encrypted(STATE, used, bytes(32)))
        assert cli(*words, *options).status == 0
        assert base64.b64decode(sent_by_swtpm_import(manager, directory)["permanent"]) == STATE
    assert cli(*words, "--passphrase-file", str(passphrase), "--kdf", "sha512").status == 8
    assert manager.asked == []
