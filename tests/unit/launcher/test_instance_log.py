"""An instance that writes to stderr without end fills no disk and stops neither itself nor the launcher."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator

import pytest

from vtpm.launcher import instance_log
from vtpm.launcher.instance_log import BURST_LINES, LINE_CHARS, InstanceLog, log_lines
from vtpm.wire.allowance import Allowance

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(write)


def _run(pipe: tuple[int, int], written: list[bytes], allowance: Allowance) -> None:
    """Write the parts one after the other, each once there is room, and close the log."""

    async def run() -> None:
        read, write = pipe
        log = InstanceLog("web1", read, allowance)
        os.set_blocking(write, False)
        loop = asyncio.get_running_loop()
        for part in written:
            left = part
            while left:
                room = asyncio.Event()
                loop.add_writer(write, room.set)
                await room.wait()
                loop.remove_writer(write)
                left = left[os.write(write, left) :]
        log.close()

    asyncio.run(run())


def test_every_line_is_logged_when_there_are_few(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _run(pipe, [b"one\ntwo\n", b"three"], log_lines())
    assert [record.getMessage() for record in caplog.records] == ["web1: one", "web1: two", "web1: three"]


def test_log_stays_small_when_an_instance_writes_without_end(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_log, "PAUSE_S", 0)
    caplog.set_level(logging.INFO)
    # More than the pipe holds, many times over: what is not logged must be read all the same.
    _run(pipe, [b"x" * 2000 + b"\n"] * 2000, Allowance(BURST_LINES, per_second=0))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == BURST_LINES + 1
    assert all(len(message) <= len("web1: ") + LINE_CHARS for message in messages)
    dropped = int(messages[-1].removeprefix("web1: ").removesuffix(" lines dropped"))
    # A line that comes in two reads counts twice.
    assert dropped >= 2000 - BURST_LINES


def test_dropped_lines_are_told_when_lines_are_logged_again(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    allowance = Allowance(2, 1, lambda: now)
    read, write = pipe

    async def run() -> None:
        nonlocal now
        log = InstanceLog("web1", read, allowance)
        os.write(write, b"1\n2\n3\n4\n")
        while len(caplog.records) < 2:
            await asyncio.sleep(0)
        now = 1.0
        os.write(write, b"5\n")
        log.close()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        "web1: 1",
        "web1: 2",
        "web1: 2 lines dropped",
        "web1: 5",
    ]


def test_a_log_line_holds_no_control_character_when_an_instance_writes_some(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _run(pipe, [b"\x1b[31m\x00\xff red\xc2\x9b\n"], log_lines())
    assert [record.getMessage() for record in caplog.records] == ["web1: ?[31m?? red??"]


def test_one_vtpm_logs_at_most_1_2_megabytes_a_day() -> None:
    now = 0.0
    allowance = Allowance(instance_log.BURST_LINES, instance_log.LINES_PER_S, lambda: now)
    lines = 0
    for second in range(86400):
        now = float(second)
        while allowance.take():
            lines += 1
    # Each at most with time and names, and with a line before it that says what was dropped.
    assert lines * (LINE_CHARS + 100 + 150) < 1_200_000
