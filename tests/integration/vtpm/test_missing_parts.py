"""Something that is needed is not there: a clear error, nothing lost, siblings undisturbed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.support.host import Host
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError, StoreError, UnavailableError, VtpmError
from vtpm.wire.api import LifeState

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def platform() -> Iterator[SwtpmPlatform]:
    with short_directory() as folder, SwtpmPlatform(folder) as platform:
        platform.extend(0, "firmware")
        yield platform


def test_start_says_what_is_missing_when_there_is_no_libtpms(platform: SwtpmPlatform) -> None:
    (library,) = {path.resolve() for path in Path("/usr/lib").glob("*/libtpms.so.0")}
    # In a mount namespace of its own, as if the package were not there.
    hide = f'mount --bind /dev/null {library} && exec "$0" "$@"'
    with (
        Host(platform.tcti, keep=True, command_prefix=("unshare", "--mount", "sh", "-c", hide)) as host,
        host.client() as client,
    ):
        client.create("web")
        with pytest.raises(VtpmError, match="libtpms"):
            client.start("web")
        assert client.show("web").state is LifeState.STOPPED
        done = host.cli("start", "web", check=False)
        assert done.returncode not in (0, 1)
        assert "libtpms" in done.stderr
        assert client.status().services
        # With the library there the vTPM is what it would have been.
        host.shut_down()
    with Host(platform.tcti, folder=host.folder) as host, host.client() as client:
        assert client.start("web").state is LifeState.RUNNING


def test_running_vtpms_go_on_and_others_are_refused_clearly_when_the_platform_tpm_went_away(
    platform: SwtpmPlatform,
) -> None:
    with Host(platform.tcti) as host, host.client() as client, ExitStack() as stack:
        client.create("web")
        writer = Writer(data_socket(client.start("web").tcti))
        stack.enter_context(closing([writer]))
        platform.stop()
        writer.start()
        writer.await_writes(10)
        with pytest.raises((PlatformTpmError, StoreError, UnavailableError)) as refused:
            client.create("other")
        assert "anchor" in str(refused.value)
        status = client.status()
        assert status.platform is not None
        assert not status.platform.reachable
        assert any("does not answer" in warning for warning in status.warnings)
        # Inside the window of interval mode nobody who runs already notices.
        writer.await_writes(10)
        platform.start()
        writer.await_writes(10)
        assert writer.stop(), writer.error
        writer.check()
        names = [vtpm.name for vtpm in client.list()]
        if "other" not in names:
            client.create("other")
        assert client.start("other").state is LifeState.RUNNING


@pytest.mark.parametrize("vault_open", [True, False])
def test_status_answers_in_two_seconds_when_the_platform_tpm_hangs(platform: SwtpmPlatform, vault_open: bool) -> None:
    with Host(platform.tcti) as host, host.client() as client, ExitStack() as stack:
        client.create("web")
        client.start("web")
        if not vault_open:
            host.kill("manager")
        os.kill(platform.pid, signal.SIGSTOP)
        stack.callback(os.kill, platform.pid, signal.SIGCONT)
        if not vault_open:
            host.start()
        # Many who want what needs the TPM, and do not get it.
        pool = stack.enter_context(ThreadPoolExecutor(16))
        waiting = [pool.submit(_refused, host) for _ in range(16)]
        for _ in range(4):
            began = time.monotonic()
            status = client.status()
            assert time.monotonic() - began < 2
            assert any("platform TPM does not answer" in warning for warning in status.warnings), status.warnings
        assert sum(not done.done() for done in waiting) > 1
        os.kill(platform.pid, signal.SIGCONT)
        for done in waiting:
            done.result(90)
        deadline = time.monotonic() + 60
        while client.status().platform is None or any("not open" in warning for warning in client.status().warnings):
            assert time.monotonic() < deadline
        assert client.show("web").state is LifeState.RUNNING


def _refused(host: Host) -> None:
    with host.client() as client, suppress(VtpmError):
        client.policy()
