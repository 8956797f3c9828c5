"""What instances write to stderr, in the launcher's log."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from tests.unit.launcher.fake_domain import Launcher, run
from vtpm.launcher.instance_log import BURST_LINES
from vtpm.wire.launcher import Replaced

pytestmark = pytest.mark.timeout(30)
LINES = 400


def test_launcher_log_stays_small_when_a_vtpm_writes_and_dies_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def test(launcher: Launcher) -> None:
        await launcher.start("web1")
        for death in range(3):
            running = launcher.domain.started[death]
            os.write(running.log, b"it is bad\n" * LINES)
            await asyncio.sleep(0)
            running.die()
            assert isinstance(await launcher.events.next(), Replaced)

    run(tmp_path, test)
    messages = [record.getMessage() for record in caplog.records]
    logged = [message for message in messages if message == "web1: it is bad"]
    dropped = [int(message.split()[1]) for message in messages if message.endswith(" lines dropped")]
    assert len(logged) == BURST_LINES
    assert sum(dropped) == 3 * LINES - BURST_LINES
