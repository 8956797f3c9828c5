"""The bridge's program refuses what it cannot work with, and says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vtpm.errors import ConflictError, UnavailableError
from vtpm.wire.service_lock import ServiceLock

OTHER_UID = os.geteuid() or 0x10000001
LIMIT_S = 20


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-m", "vtpm.bridge.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )


def test_port_is_named_when_there_is_none(tmp_path: Path) -> None:
    device = tmp_path / "vport0p1"
    done = _run("--run-dir", tmp_path, "--port", device, "--manager-uid", OTHER_UID)
    assert done.returncode == UnavailableError.exit_status
    assert f"{device} cannot be used: No such file or directory" in done.stderr


@pytest.mark.parametrize(("service", "side"), [("launcher", "--port"), ("bridge", "--machine")])
def test_second_one_is_refused_when_one_serves(tmp_path: Path, service: str, side: str) -> None:
    lock = ServiceLock(tmp_path, service)
    try:
        done = _run("--run-dir", tmp_path, side, tmp_path / "port", "--manager-uid", OTHER_UID)
    finally:
        lock.release()
    assert done.returncode == ConflictError.exit_status
    assert f"its pid is {os.getpid()}" in done.stderr


def test_root_is_refused_when_it_is_to_be_the_manager(tmp_path: Path) -> None:
    done = _run("--run-dir", tmp_path, "--machine", tmp_path / "port", "--manager-uid", 0)
    assert done.returncode == 2
    assert "must name a user that is not root" in done.stderr


def test_side_is_asked_for_when_none_or_both_are_named(tmp_path: Path) -> None:
    own = ("--run-dir", tmp_path, "--manager-uid", OTHER_UID)
    assert "is required" in _run(*own).stderr
    assert "not allowed with" in _run(*own, "--port", "a", "--machine", "b").stderr
