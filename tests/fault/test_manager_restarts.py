"""The manager restarted again and again under vTPMs that are written to without pause: they wait a little, no more."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.support.host import Host
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform

RESTARTS = 50
VTPMS = 8
LONGEST_STALL_S = 1.0
"""Half of what Linux gives most TPM commands."""


@pytest.fixture(params=["embedded", "sealed"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Over the embedded TPM, and over one that the services are measured into at each start."""
    with ExitStack() as stack:
        tcti = "embedded"
        if request.param == "sealed":
            folder = stack.enter_context(short_directory())
            platform = stack.enter_context(SwtpmPlatform(folder))
            platform.extend(0, "firmware")
            tcti = platform.tcti
        yield stack.enter_context(Host(tcti))


@pytest.mark.timeout(300)
def test_no_write_fails_or_is_lost_when_the_manager_restarts_under_eight_vtpms(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    with host.client() as client:
        names = [f"vtpm{number}" for number in range(VTPMS)]
        writers: list[Writer] = []
        for name in names:
            client.create(name)
            writers.append(Writer(data_socket(client.start(name).tcti)))
        pids = [client.show(name).pid for name in names]
        with closing(writers):
            for writer in writers:
                writer.start()
            # In turn as an upgrade does it, and as a crash does.
            for end in itertools.islice(itertools.cycle((host.stop_manager, lambda: host.kill("manager"))), RESTARTS):
                for writer in writers:
                    writer.await_writes(1)
                end()
                host.start()
            for name, writer in zip(names, writers, strict=True):
                writer.await_writes(1)
                assert writer.stop(), f"{name}: a write failed: {writer.error}"
                writer.check()
        assert [client.show(name).pid for name in names] == pids
        longest_s = max(writer.longest_s for writer in writers)
        with capsys.disabled():
            writes = sum(writer.answered for writer in writers)
            print(f"\n{RESTARTS} restarts, {writes} writes answered, longest stall {longest_s * 1e3:.0f} ms")
        assert longest_s < LONGEST_STALL_S
