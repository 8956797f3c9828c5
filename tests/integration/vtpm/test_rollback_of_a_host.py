"""A whole host, over the real services and a sealed platform TPM: what was put back or does not open is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.support.host import Host
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import PlatformTpmError, StateError
from vtpm.wire.api import AuditEvent, LifeState
from vtpm.wire.keeper_client import KeeperClient

pytestmark = pytest.mark.timeout(180)
EACH_COMMIT = 'anchor = "each-commit"\n'


def _started(client: ManagerClient, name: str = "web") -> Writer:
    client.create(name)
    return Writer(data_socket(client.start(name).tcti))


def _write(writer: Writer, count: int) -> None:
    writer.start()
    writer.await_writes(count)
    assert writer.stop(), writer.error


def _copy(source: Path, target: Path) -> None:
    """Copy a folder with its owners, as a thief who is root does."""
    shutil.copytree(source, target)
    for path in (source, *source.rglob("*")):
        status = path.stat()
        os.chown(target / path.relative_to(source), status.st_uid, status.st_gid)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.db")}


def test_host_refuses_and_keeps_a_store_that_was_put_back_until_the_newest_is_there_again(
    platform: SwtpmPlatform, tmp_path: Path
) -> None:
    with Host(platform.tcti, settings=EACH_COMMIT) as host, host.client() as client, ExitStack() as stack:
        writer = _started(client)
        stack.enter_context(closing([writer]))
        _write(writer, 3)
        client.stop("web")
        host.shut_down()
        vault, older, newest = host.state_dir / "vault", tmp_path / "older", tmp_path / "newest"
        _copy(vault, older)
        host.start()
        client.start("web")
        writer.reconnect()
        _write(writer, 3)
        client.stop("web")
        host.shut_down()
        _copy(vault, newest)

        shutil.rmtree(vault)
        _copy(older, vault)
        before = _content(vault)
        host.start()
        with pytest.raises(StateError, match="older"):
            client.start("web")
        with pytest.raises(StateError, match="older"):
            client.list()
        status = host.cli("status").stdout
        assert "The vault is not open" in status
        assert "older" in status
        assert _content(vault) == before

        # Nothing needs to be restarted: the right store is looked for again.
        shutil.rmtree(vault)
        _copy(newest, vault)
        _until_open(client)
        client.start("web")
        writer.reconnect()
        writer.check()


def test_vtpms_are_refused_and_work_again_when_pcrs_changed_and_the_key_was_recovered(
    platform: SwtpmPlatform,
) -> None:
    with Host(platform.tcti) as host, host.client() as client, ExitStack() as stack:
        writer = _started(client)
        stack.enter_context(closing([writer]))
        key = host.cli("recovery-key").stdout
        _write(writer, 3)
        client.stop("web")
        host.shut_down()
        platform.reboot("other firmware")
        host.start()
        with pytest.raises(PlatformTpmError, match="PCRs changed in bank sha256: 0"):
            client.start("web")
        assert "LOCKED" in host.cli("status").stdout
        path = host.folder / "key"
        path.write_text(key)
        host.cli("recover", "--key-file", str(path), "--yes")
        assert client.start("web").state is LifeState.RUNNING
        writer.reconnect()
        writer.check()
        kinds = [event.kind for event in client.all_events()]
        assert (kinds.count("recovered"), kinds.count("store_accepted")) == (1, 0)
        # The next start needs no key.
        client.stop("web")
        host.shut_down()
        host.start()
        client.start("web")


def test_recovery_is_in_the_audit_log_when_the_manager_that_was_asked_for_it_died(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host:
        key = host.cli("recovery-key").stdout
        host.shut_down()
        platform.reboot("other firmware")
        host.start()
        # The keeper has done its part, and nobody has noted it.
        keeper = KeeperClient(host.run_dir, timeout_s=60)
        keeper.recover(key)
        fingerprint = keeper.status().recovery_unnoted
        host.kill("manager")
        host.start()
        with host.client() as client:
            (event,) = _awaited(client, "recovered")
        assert event.detail == {"key": fingerprint, "noted": "by the next manager"}
        while keeper.status().recovery_unnoted:
            time.sleep(0.05)
        keeper.close()
        host.stop_manager()
        host.start()
        with host.client() as client:
            assert [event.kind for event in client.all_events()].count("recovered") == 1


def _awaited(client: ManagerClient, kind: str) -> list[AuditEvent]:
    """Return the events of a kind, once there is one."""
    last = 0
    while True:
        page = client.events(last, wait_s=20)
        assert page, f"there is no {kind}"
        last = page[-1].id
        if found := [event for event in page if event.kind == kind]:
            return found


def test_older_store_is_refused_also_by_a_recovery_when_the_anchor_is_still_there(
    platform: SwtpmPlatform, tmp_path: Path
) -> None:
    with Host(platform.tcti, settings=EACH_COMMIT) as host, host.client() as client, ExitStack() as stack:
        writer = _started(client)
        stack.enter_context(closing([writer]))
        key = host.folder / "key"
        key.write_text(host.cli("recovery-key").stdout)
        client.stop("web")
        host.shut_down()
        vault, older = host.state_dir / "vault", tmp_path / "older"
        _copy(vault, older)
        host.start()
        client.start("web")
        writer.reconnect()
        _write(writer, 3)
        client.stop("web")
        host.shut_down()
        shutil.rmtree(vault)
        _copy(older, vault)
        platform.reboot("other firmware")
        host.start()
        done = host.cli("recover", "--key-file", str(key), "--yes", check=False)
        assert done.returncode == StateError.exit_status
        assert "older" in done.stderr
        with pytest.raises(StateError, match="older"):
            client.list()


def test_store_is_taken_on_the_operators_word_when_the_platform_tpm_was_lost(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti, settings=EACH_COMMIT) as host, host.client() as client, ExitStack() as stack:
        writer = _started(client)
        stack.enter_context(closing([writer]))
        key = host.cli("recovery-key").stdout
        _write(writer, 3)
        client.stop("web")
        host.shut_down()
        folder = stack.enter_context(short_directory())
        other = stack.enter_context(SwtpmPlatform(folder))
        other.extend(0, "firmware")
        host.platform_tpm = other.tcti
        host.start()
        with pytest.raises(PlatformTpmError, match="is not the one that the root key was sealed by"):
            client.start("web")
        path = host.folder / "key"
        path.write_text(key)
        host.cli("recover", "--key-file", str(path), "--yes")
        kinds = [event.kind for event in client.all_events()]
        assert (kinds.count("recovered"), kinds.count("store_accepted")) == (1, 1)
        client.start("web")
        writer.reconnect()
        writer.check()
        client.stop("web")
        host.end()


def test_next_boot_needs_no_recovery_when_it_was_allowed(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        client.create("web")
        value = hashlib.sha256(bytes(32) + hashlib.sha256(b"firmware 2").digest()).hexdigest()
        host.cli("policy", "allow", "firmware-2", "--pcr", f"0={value}")
        host.shut_down()
        platform.reboot("firmware 2")
        host.start()
        assert client.start("web").state is LifeState.RUNNING
        host.cli("policy", "drop", "set-up")
        kinds = [event.kind for event in client.all_events()]
        assert kinds.count("policy_allowed") == kinds.count("policy_dropped") == 1
        client.stop("web")
        host.shut_down()
        platform.reboot("firmware")
        host.start()
        with pytest.raises(PlatformTpmError, match="PCRs changed"):
            client.start("web")


def test_anchor_follows_at_once_or_within_the_interval_as_the_mode_says(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        writer = _started(client)
        with closing([writer]):
            before = client.status().anchor
            _write(writer, 50)
            after = client.status().anchor
            assert before is not None
            assert after is not None
            assert after.mode == "interval"
            assert after.commits - before.commits >= 50
            # Fifty answered writes inside one interval wear the TPM by one write at the most.
            assert after.writes - before.writes <= 1
            assert "60 s" in after.window
        client.stop("web")
        stopped = client.status().anchor
        assert stopped is not None
        assert stopped.unanchored_s == 0


def _until_open(client: ManagerClient) -> None:
    """Ask until the manager has looked at the store again, which it does every two seconds at most."""
    deadline = time.monotonic() + 20
    while True:
        try:
            client.list()
            return
        except StateError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
