"""The platform TPM loses its power, or is put back, while the host's services go on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.support.host import Host
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform, booted_platform
from vtpm.errors import PlatformTpmError
from vtpm.keeper.custody import Custody
from vtpm.keeper.platforms import HardwarePlatform
from vtpm.keeper.root_key import NewRoot
from vtpm.platform_tpm.anchor import Anchor
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import ZeroPcrs
from vtpm.secret import Secret

pytestmark = pytest.mark.timeout(120)
ROOT = Secret(bytes(range(100, 132)))
OLD, NEW = Anchor(1, b"o" * 32), Anchor(2, b"n" * 32)
RESTARTS = 3


@pytest.fixture
def platform() -> Iterator[SwtpmPlatform]:
    """See booted_platform."""
    with booted_platform() as platform:
        yield platform


def test_anchor_is_intact_and_resets_are_reported_when_the_tpm_restarts_under_a_running_host(
    platform: SwtpmPlatform,
) -> None:
    with Host(platform.tcti, settings='anchor = "each-commit"\n') as host, host.client() as client:
        client.create("web")
        with closing([writer := Writer(data_socket(client.start("web").tcti))]):
            writer.start()
            for restart in range(1, RESTARTS + 1):
                writer.await_writes(5 * restart)
                # No TPM2_Shutdown before, nothing measured after: as a TPM that was reset alone.
                platform.stop()
                platform.start()
            writer.await_writes(5 * (RESTARTS + 1))
            assert writer.stop(), writer.error
            status = client.status()
            assert status.platform is not None and status.platform.resets == RESTARTS
            assert any("was reset under this host, 3 times" in warning for warning in status.warnings)
            assert status.anchor is not None and status.anchor.unanchored_s == 0
            client.stop("web")
            host.shut_down()
            # The store is still the anchored one, for a keeper that reads the anchor in another boot.
            platform.reboot()
            host.start()
            client.start("web")
            writer.reconnect()
            writer.check()


def test_older_anchor_is_not_accepted_when_the_tpms_own_state_was_put_back_under_a_keeper(tmp_path: Path) -> None:
    """No defence of a host's own, but a keeper that runs has seen the later one."""
    with short_directory() as folder, SwtpmPlatform(folder) as swtpm, PlatformTpm(swtpm.tcti) as tpm:
        swtpm.reboot()
        blob = tpm.seal_root(ROOT, tpm.pcr_set("set-up", DEFAULT_PCRS), lambda _: None)
        with tpm.open_anchor(blob, ROOT) as anchor:
            anchor.write(OLD)
            shutil.copytree(swtpm.state_dir, tmp_path / "state")
            anchor.write(NEW)
            swtpm.stop()
            shutil.rmtree(swtpm.state_dir)
            shutil.copytree(tmp_path / "state", swtpm.state_dir)
            swtpm.start()
            for use in (anchor.read, lambda: anchor.write(Anchor(3, bytes(32)))):
                with pytest.raises(PlatformTpmError, match="went back from version 2 to 1"):
                    use()


def test_older_anchor_is_not_accepted_when_the_keeper_connects_anew_to_a_tpm_whose_state_was_put_back(
    tmp_path: Path,
) -> None:
    with short_directory() as folder, SwtpmPlatform(folder) as swtpm:
        swtpm.reboot()
        (tmp_path / "keeper").mkdir()
        custody = Custody(tmp_path / "keeper", HardwarePlatform(swtpm.tcti), NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
        custody.open()
        custody.write_anchor(OLD)
        shutil.copytree(swtpm.state_dir, tmp_path / "state")
        custody.write_anchor(NEW)
        swtpm.stop()
        shutil.rmtree(swtpm.state_dir)
        shutil.copytree(tmp_path / "state", swtpm.state_dir)
        swtpm.start()
        for use in (custody.read_anchor, custody.read_anchor, lambda: custody.write_anchor(Anchor(3, bytes(32)))):
            with pytest.raises(PlatformTpmError, match="went back from version 2 to 1"):
                use()
        custody.close()
