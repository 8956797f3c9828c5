"""The manager's store fails for a while: nothing may be stuck when it works again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.host import Host


@contextmanager
def _full_disk(host: Host) -> Generator[None, None, None]:
    """Let no file of the manager's grow, with its own user id: root need not have the right over others."""
    pid = host.pid("manager")
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    uid = int(next(line for line in status if line.startswith("Uid:")).split()[1])

    def limit(value: str) -> None:
        command = ["prlimit", "--pid", str(pid), f"--fsize={value}:"]
        subprocess.run(command, user=uid, group=uid, check=True, timeout=10)

    limit("0")
    try:
        yield
    finally:
        limit("unlimited")


def _await_log(host: Host, text: str) -> None:
    deadline_s = time.monotonic() + 20
    while text not in host.log():
        assert time.monotonic() < deadline_s, host.log()
        time.sleep(0.05)


def test_vtpm_can_be_started_and_stopped_when_the_store_failed_before() -> None:
    with Host() as host:
        host.cli("create", "web1")
        with _full_disk(host):
            assert host.cli("start", "web1", check=False).returncode != 0
        host.cli("start", "web1")
        with _full_disk(host):
            assert host.cli("stop", "web1", check=False).returncode != 0
        host.cli("stop", "web1")
        host.cli("delete", "web1", "--yes")


def test_vtpm_can_be_started_when_its_end_could_not_be_noted() -> None:
    with Host() as host:
        host.cli("create", "web1")
        host.cli("start", "web1")
        with _full_disk(host):
            host.kill("launcher")
            _await_log(host, "its end was not noted")
        host.stop_manager()
        host.start()
        host.cli("start", "web1")
        host.cli("stop", "web1")
