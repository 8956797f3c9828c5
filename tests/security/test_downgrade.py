"""A manager upgraded and then downgraded: what a newer one wrote is refused in clear words and left as it is.

The newer program is this one with a version number that is one higher. That it still opens everything afterwards shows
that the older one changed nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.security.stored_host import LIMIT_S, Host
from tests.support import host as real
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform
from tests.unit.vault.world import ENGINE, KEY
from vtpm.errors import PlatformTpmError, StateError
from vtpm.keeper import wrapping
from vtpm.secret import Secret
from vtpm.tpm.types import StateKind
from vtpm.vault import envelope, root_record, sqlite_file
from vtpm.vault.vault import PermitGranted

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.stop()


@pytest.mark.parametrize(
    ("module", "constant", "words"),
    [
        (sqlite_file, "SCHEMA_VERSION", "has schema version 6; this program knows 5"),
        (root_record, "FORMAT_VERSION", "has a root record of format version 2; this program reads 1"),
    ],
    ids=["schema", "root record"],
)
def test_store_is_refused_and_kept_when_a_newer_manager_wrote_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, module: object, constant: str, words: str
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(module, constant, getattr(module, constant) + 1)
        host.start()
        vtpm = host.make()
        host.stop()
    host.refused(words)
    with monkeypatch.context() as newer:
        newer.setattr(module, constant, getattr(module, constant) + 1)
        host.start()
        assert host.content(vtpm) == b"first of web1"


def test_state_is_refused_and_kept_when_a_newer_manager_sealed_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    vtpm = host.make()
    with monkeypatch.context() as newer:
        newer.setattr(envelope, "FORMAT_VERSION", 2)
        host.save(vtpm, b"of a newer format").result(LIMIT_S)
    before = host.run(lambda store: (store.value, store.read_state(vtpm[0])))
    with pytest.raises(StateError, match="has format version 2; this program reads 1"):
        host.vault.load(*vtpm, ENGINE)
    assert host.run(lambda store: (store.value, store.read_state(vtpm[0]))) == before
    with monkeypatch.context() as newer:
        newer.setattr(envelope, "FORMAT_VERSION", 2)
        assert host.content(vtpm) == b"of a newer format"


def test_state_is_refused_and_kept_when_a_newer_engine_saved_it(host: Host) -> None:
    host.start()
    vtpm = host.make()
    assert not isinstance(host.vault.load(*vtpm, ENGINE + 1), PermitGranted)
    host.save(vtpm, b"of a newer engine").result(LIMIT_S)
    host.seq += 1
    host.vault.save(*vtpm, host.seq, StateKind.VOLATILE, b"PCRs").result(LIMIT_S)
    before = host.run(lambda store: (store.value, store.read_state(vtpm[0])))
    with pytest.raises(StateError, match=r"needs engine 0\.9\.3; this one is 0\.9\.2") as refusal:
        host.vault.load(*vtpm, ENGINE)
    assert "newer image" in refusal.value.next_step
    # Volatile state, which can be had once, is there too.
    assert host.run(lambda store: (store.value, store.read_state(vtpm[0]))) == before
    assert host.vault.load(*vtpm, ENGINE + 1) == {
        StateKind.PERMANENT: b"of a newer engine",
        StateKind.VOLATILE: b"PCRs",
    }


def test_wrapped_key_is_refused_when_a_newer_keeper_wrapped_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Secret(bytes(32))
    host.start()
    vtpm_id, _ = host.make()
    with monkeypatch.context() as newer:
        newer.setattr(wrapping, "VERSION", 2)
        wrapped = wrapping.wrap_key(root, vtpm_id, Secret(KEY))
    with pytest.raises(StateError, match="of another version than 1"):
        wrapping.unwrap_key(root, vtpm_id, wrapped)
    # Nor with the version put back: it is authenticated.
    with pytest.raises(StateError, match="does not open"):
        wrapping.unwrap_key(root, vtpm_id, bytes([1]) + wrapped[1:])


def test_host_says_so_and_serves_again_when_store_and_root_file_are_of_a_newer_version() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(short_directory())
        platform = stack.enter_context(SwtpmPlatform(folder))
        platform.extend(0, "firmware")
        host = stack.enter_context(real.Host(platform.tcti))
        client = stack.enter_context(host.client())
        client.create("web")
        host.shut_down()
        store, root_file = host.state_dir / "vault" / "vtpm.db", host.state_dir / "keeper" / "root.sealed"
        good = root_file.read_bytes()
        _set_schema(store, 6)
        root_file.write_bytes(good.replace(b'"version":2', b'"version":3'))
        assert json.loads(root_file.read_bytes())["version"] == 3
        host.start()
        with pytest.raises((StateError, PlatformTpmError), match="is of version 3; this vtpm reads version 2 only"):
            client.start("web")
        host.shut_down()
        assert json.loads(root_file.read_bytes())["version"] == 3
        root_file.write_bytes(good)
        before = store.read_bytes()
        host.start()
        with pytest.raises(StateError, match="has schema version 6; this program knows 5"):
            client.start("web")
        assert "The vault is not open" in host.cli("status").stdout
        host.shut_down()
        assert store.read_bytes() == before
        _set_schema(store, 5)
        host.start()
        client.start("web")


def _set_schema(store: Path, version: int) -> None:
    with closing(sqlite3.connect(store, isolation_level=None)) as db:
        db.execute("UPDATE vault_schema SET version = ?", (version,))
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
