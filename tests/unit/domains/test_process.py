"""A confined process as the launcher holds it."""

from __future__ import annotations

import asyncio
import os
import subprocess

from vtpm.confine.spawn import SpawnedProcess
from vtpm.domains.process import ConfinedProcess


def test_no_descriptor_is_left_when_a_process_is_reaped_that_never_reported() -> None:
    before = len(os.listdir("/proc/self/fd"))
    report_read, report_write = os.pipe()
    child = subprocess.Popen(["sleep", "60"])
    process = ConfinedProcess(SpawnedProcess(child.pid, os.pidfd_open(child.pid), 0, report_read))
    process.kill()
    assert asyncio.run(process.ended()) == "signal SIGKILL"
    child.returncode = -9
    os.close(report_write)
    assert len(os.listdir("/proc/self/fd")) == before
