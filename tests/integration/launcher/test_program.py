"""What vtpm-launcher does to its surroundings when it starts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.integration.launcher.program import launcher, run_dir

pytestmark = pytest.mark.timeout(60)


def test_owners_reach_their_sockets_when_the_launcher_was_started_under_a_strict_umask(tmp_path: Path) -> None:
    run = run_dir(tmp_path, "run")
    with launcher("--run-dir", run, umask=0o077):
        assert stat.S_IMODE((run / "guests").stat().st_mode) == 0o755
