"""A vTPM goes into a backup and comes back as it was, in a new epoch; an swtpm's state becomes a vTPM."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.writer import TpmConnection, data_socket
from tests.integration.vault.test_swtpm_import import CASES, DATA, DIGEST, EK_12, EK_20, INDEX_12, INDEX_20, made
from tests.support.host import Host
from tests.support.processes import short_directory
from tests.unit.engine import commands as c
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import ConflictError, StateError, UsageError, VtpmError
from vtpm.recovery_key import RecoveryKey
from vtpm.tpm.types import Startup, TpmVersion
from vtpm.wire.api import ExportedVtpm, ExportVtpm, ImportBackup, Vtpm

VALUE = b"0123456789abcdef"
PASSPHRASE = "correct horse battery staple"
TO_PASSPHRASE = ExportVtpm(passphrase=PASSPHRASE)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def client(host: Host) -> Iterator[ManagerClient]:
    with host.client() as client:
        yield client


def manufactured(client: ManagerClient, name: str) -> tuple[Vtpm, bytes]:
    """Make a vTPM with an NV value, and return it, stopped, with its EK."""
    client.create(name)
    client.start(name, Startup.CLEAR)
    with TpmConnection(data_socket(client.show(name).tcti)) as tpm:
        tpm.succeed(c.nv_define(INDEX_20, len(VALUE)))
        tpm.succeed(c.nv_write(INDEX_20, VALUE))
        ek = tpm.endorsement_key()
    return client.stop(name), ek


def looked_at(client: ManagerClient, name: str) -> tuple[bytes, bytes]:
    """Start a vTPM, return its NV value and EK, and stop it."""
    client.start(name, Startup.CLEAR)
    with TpmConnection(data_socket(client.show(name).tcti)) as tpm:
        found = tpm.read(INDEX_20, len(VALUE)), tpm.endorsement_key()
    client.stop(name)
    return found


def restore(exported: ExportedVtpm, name: str | None = None) -> ImportBackup:
    return ImportBackup(exported.backup, original_is_dead=True, name=name, passphrase=PASSPHRASE)


def last_event(client: ManagerClient) -> tuple[str, str | None, dict[str, str]]:
    *_, event = client.all_events()
    return event.kind, event.vtpm, event.detail


def test_vtpm_is_as_it_was_in_a_new_epoch_when_its_backup_is_imported(host: Host, tmp_path: Path) -> None:
    """By the command line, with the host's recovery key, from `recovery-key` to the imported vTPM."""
    with host.client() as client:
        before, ek = manufactured(client, "web1")
        refused = host.cli("export", "web1", "--output", str(tmp_path / "early"), "--yes", check=False)
        assert (refused.returncode, "vtpm recovery-key" in refused.stderr) == (2, True)
        host.cli("recovery-key", "--output", str(tmp_path / "key"))
        exported = json.loads(host.cli("export", "web1", "--output", str(tmp_path / "file"), "--yes", "--json").stdout)
        status = client.status().platform
        assert status is not None and exported["sealed_to"] == status.recovery
        assert last_event(client)[:2] == ("exported", "web1")
        words = ["import", str(tmp_path / "file"), "--recovery-key-file", str(tmp_path / "key"), "--original-is-dead"]
        here = host.cli(*words, "--yes", check=False)
        assert (here.returncode, "web1 has the uuid" in here.stderr) == (4, True)
        client.delete("web1")
        imported = json.loads(host.cli(*words, "--yes", "--json").stdout)
        assert (imported["uuid"], imported["epoch"], imported["state"]) == (str(before.uuid), 2, "stopped")
        assert imported["version"] > before.version
        kind, name, detail = last_event(client)
        assert (kind, name) == ("imported", "web1")
        assert detail == {
            "source": "backup",
            "uuid": str(before.uuid),
            "exported_name": "web1",
            "exported_epoch": "1",
            "exported_at": exported["exported_at"],
            "epoch": "2",
        }
        assert looked_at(client, "web1") == (VALUE, ek)
        # And it goes on: the next backup is of the new epoch.
        assert client.export("web1", TO_PASSPHRASE).epoch == 2
        # Nor does the same backup come back in an epoch that has been.
        client.delete("web1")
        again = json.loads(host.cli(*words, "--yes", "--json").stdout)
        assert (again["epoch"], looked_at(client, "web1")) == (3, (VALUE, ek))
        secret = (tmp_path / "key").read_text().splitlines()[1]
    for log in (host.log(), host.service_logs()):
        assert secret not in log and PASSPHRASE not in log


def test_imported_vtpm_has_another_name_when_told_so(client: ManagerClient) -> None:
    before, ek = manufactured(client, "old-name")
    exported = client.export("old-name", TO_PASSPHRASE)
    client.delete("old-name")
    imported = client.import_backup(restore(exported, "new-name"))
    assert (imported.name, imported.uuid, imported.owner) == ("new-name", before.uuid, before.owner)
    assert looked_at(client, "new-name") == (VALUE, ek)


def test_backup_opens_for_the_named_recovery_key_alone_when_one_is_named(client: ManagerClient) -> None:
    _, ek = manufactured(client, "named-key")
    key, other = RecoveryKey.generate(), RecoveryKey.generate()
    exported = client.export("named-key", ExportVtpm(recovery_key=key.public.to_text()))
    assert exported.sealed_to == key.public.fingerprint
    client.delete("named-key")
    for wrong, error in (
        (ImportBackup(exported.backup, True, recovery_key=other.to_text()), StateError),
        (ImportBackup(exported.backup, True, recovery_key=key.public.to_text()), UsageError),
        (ImportBackup(exported.backup, True, passphrase=PASSPHRASE), UsageError),
    ):
        with pytest.raises(error):
            client.import_backup(wrong)
    client.import_backup(ImportBackup(exported.backup, True, recovery_key=key.to_text()))
    assert looked_at(client, "named-key") == (VALUE, ek)


def test_nothing_is_there_when_an_import_is_refused(client: ManagerClient) -> None:
    manufactured(client, "refused")
    exported = client.export("refused", TO_PASSPHRASE)
    client.delete("refused")
    good = restore(exported)
    blob = base64.b64decode(exported.backup)
    damaged = base64.b64encode(blob[:-1] + bytes([blob[-1] ^ 1])).decode()
    before = client.list(), len(list(client.all_events()))
    refusals: list[tuple[ImportBackup, type[VtpmError], str]] = [
        (ImportBackup(good.backup, False, passphrase=PASSPHRASE), UsageError, "its original is dead"),
        (ImportBackup(good.backup, True, passphrase=PASSPHRASE + "!"), StateError, "passphrase is wrong"),
        (ImportBackup(damaged, True, passphrase=PASSPHRASE), StateError, "damaged"),
        (ImportBackup(good.backup[:1000], True, passphrase=PASSPHRASE), StateError, "lengths do not agree"),
        (ImportBackup("!", True, passphrase=PASSPHRASE), UsageError, "not base64"),
        (ImportBackup(good.backup, True), UsageError, "give one of them"),
        (ImportBackup(good.backup, True, name="../x", passphrase=PASSPHRASE), UsageError, "not a name"),
        (ImportBackup("", True, passphrase=PASSPHRASE), StateError, "no backup"),
    ]
    for wanted, error, why in refusals:
        with pytest.raises(error, match=why):
            client.import_backup(wanted)
    client.create("taken")
    with pytest.raises(ConflictError, match="a vTPM taken exists already"):
        client.import_backup(restore(exported, "taken"))
    client.delete("taken")
    # The refusals left no event; "taken" came and went.
    assert (client.list(), len(list(client.all_events())) - 2) == before
    client.import_backup(good)


def test_export_is_refused_when_the_vtpm_runs_or_never_did(client: ManagerClient) -> None:
    client.create("never")
    with pytest.raises(ConflictError, match="was never started"):
        client.export("never", TO_PASSPHRASE)
    client.start("never")
    with pytest.raises(ConflictError, match="cannot export it"):
        client.export("never", TO_PASSPHRASE)
    client.stop("never")
    with pytest.raises(UsageError, match="12 to 1024 characters"):
        client.export("never", ExportVtpm(passphrase="short"))
    with pytest.raises(UsageError, match="not to both"):
        client.export("never", ExportVtpm(RecoveryKey.generate().public.to_text(), PASSPHRASE))


def test_store_of_before_the_import_is_refused_when_it_is_put_back() -> None:
    """The old copy of the vTPM, in its own store, with its own key: older than the anchor."""
    with Host() as host:
        with host.client() as client:
            manufactured(client, "web1")
            exported = client.export("web1", TO_PASSPHRASE)
            host.stop_manager()
        before = files(host)
        host.start()
        with host.client() as client:
            client.delete("web1")
            client.import_backup(restore(exported))
        host.stop_manager()
        after = files(host)
        put_back(host, before)
        host.start()
        with host.client() as client, pytest.raises(StateError, match="older than the anchor"):
            client.start("web1")
        host.stop_manager()
        put_back(host, after)
        host.start()
        with host.client() as client:
            assert client.show("web1").epoch == 2


def files(host: Host) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (host.state_dir / "vault").iterdir()}


def put_back(host: Host, copies: dict[Path, bytes]) -> None:
    """Have these files in the vault and no others; in the files that are there, so that their owner stays."""
    for path in files(host).keys() - copies.keys():
        path.unlink()
    for path, content in copies.items():
        path.write_bytes(content)


def _nv_read(tcti: str) -> bytes:
    return subprocess.run(
        ["tpm2_nvread", "-T", tcti, hex(INDEX_20)], check=True, capture_output=True, timeout=60
    ).stdout


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("plain", []),
        ("key file, AES-256", ["--key-file", "KEY"]),
        ("binary key file, AES-256", ["--key-file", "KEY", "--key-format", "binary"]),
        ("passphrase, AES-256, as libvirt", ["--passphrase-file", "KEY"]),
        ("passphrase, SHA-512, AES-256", ["--passphrase-file", "KEY", "--kdf", "sha512"]),
    ],
)
def test_what_swtpm_wrote_is_read_when_its_directory_is_imported(host: Host, case: str, options: list[str]) -> None:
    name = f"swtpm{len(case)}"
    with short_directory() as directory, host.client() as client:
        platform = made(directory, CASES[case])
        words = ["import", "--from-swtpm", str(platform.state_dir), "--name", name, "--yes"]
        words += [word.replace("KEY", str(directory / "key")) for word in options]
        with platform:
            for response in platform.run(c.nv_define(INDEX_20, len(DATA)), c.nv_write(INDEX_20, DATA)):
                assert c.code_of(response) == 0
            (ek,) = platform.run(EK_20)
            # Volatile state beside it stays where it is.
            platform.store_volatile()
            assert host.cli(*words, check=False).returncode == 4
        before = {path.name: path.read_bytes() for path in platform.state_dir.iterdir()}
        imported = json.loads(host.cli(*words, "--json").stdout)
        assert (imported["epoch"], imported["state"], imported["tpm_version"]) == (1, "stopped", "2.0")
        assert last_event(client) == (
            "imported",
            name,
            {"source": "swtpm", "directory": str(platform.state_dir), "uuid": imported["uuid"]},
        )
        assert {path.name: path.read_bytes() for path in platform.state_dir.iterdir()} == before
        tcti = client.start(name, Startup.CLEAR).tcti
        assert _nv_read(tcti) == DATA
        with TpmConnection(data_socket(tcti)) as tpm:
            assert tpm.transact(EK_20) == ek
        client.stop(name)


def test_nv_value_and_saved_state_are_there_when_a_tpm_12_is_imported(host: Host) -> None:
    with short_directory() as directory, host.client() as client:
        platform = made(directory, CASES["plain"], TpmVersion.V1_2)
        with platform:
            *written, ek, saved = platform.run(
                c.nv_define_12(INDEX_12, len(DATA)),
                c.nv_write_12(INDEX_12, DATA),
                c.pcr_extend_12(10, DIGEST[:20]),
                EK_12,
                c.save_state_12(),
            )
            assert [c.code_of(response) for response in (*written, ek, saved)] == [0] * 5
        host.cli("import", "--from-swtpm", str(platform.state_dir), "--name", "old", "--yes")
        # A backup of it carries the saved state as well.
        exported = client.export("old", TO_PASSPHRASE)
        client.delete("old")
        client.import_backup(restore(exported))
        with TpmConnection(data_socket(client.start("old", Startup.STATE).tcti)) as tpm:
            assert c.value_12(tpm.succeed(c.nv_read_12(INDEX_12, len(DATA))), len(DATA)) == DATA
            assert tpm.transact(EK_12) == ek
            assert c.value_12(tpm.succeed(c.pcr_read_12(10)), 20) != bytes(20)
        client.stop("old")
