"""What vtpm-launcher does to its surroundings when it starts."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.launcher.program import folder, launcher
from vtpm.launcher.descriptors import PER_INSTANCE
from vtpm.tpm.types import TpmVersion, VtpmId
from vtpm.wire.launcher import LAUNCHER, LAUNCHER_SOCKET, KindArgs, NoArgs, StartArgs, VtpmArgs
from vtpm.wire.packet_socket import PacketClient, close_fds

pytestmark = pytest.mark.timeout(60)
CALL_TIMEOUT_S = 30.0


def test_owners_reach_their_sockets_when_the_launcher_was_started_under_a_strict_umask(tmp_path: Path) -> None:
    run, state = folder(tmp_path, "run"), folder(tmp_path, "state")
    with launcher("--run-dir", run, "--state-dir", state, umask=0o077):
        assert stat.S_IMODE((run / "guests").stat().st_mode) == 0o755


def test_an_instance_takes_no_more_descriptors_than_are_counted_for_it(tmp_path: Path) -> None:
    run, state = folder(tmp_path, "run"), folder(tmp_path, "state")
    with (
        launcher("--run-dir", run, "--state-dir", state) as process,
        contextlib.closing(PacketClient(LAUNCHER, run / LAUNCHER_SOCKET)) as client,
    ):
        client.call("status", NoArgs(), timeout_s=CALL_TIMEOUT_S)
        opened = Path(f"/proc/{process.pid}/fd")
        before = len(list(opened.iterdir()))
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        ((soft, hard),) = re.findall(r"Max open files +(\w+) +(\w+)", limits)
        assert soft == hard
        measured, _ = client.call("measure", KindArgs("process"), timeout_s=CALL_TIMEOUT_S)
        ids = [VtpmId(uuid4()) for _ in range(3)]
        for number, vtpm_id in enumerate(ids):
            owner = os.getuid(), os.getgid()
            args = StartArgs(vtpm_id, f"web{number}", TpmVersion.V2_0, "process", *owner, measured.measurement)
            _, fds = client.call("start", args, timeout_s=CALL_TIMEOUT_S)
            close_fds(fds)
        # Nothing is parked: no guest is there.
        assert len(list(opened.iterdir())) - before == len(ids) * (PER_INSTANCE - 2)
        for vtpm_id in ids:
            client.call("stop", VtpmArgs(vtpm_id), timeout_s=CALL_TIMEOUT_S)
        assert len(list(opened.iterdir())) == before
