"""Logs what an instance writes to stderr, within bounds: it may have been taken over and write without end.

For the launcher. How much at most goes to the log: `LINE_CHARS` for each line that an allowance gives, see `log_lines`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from vtpm.wire.allowance import Allowance

LINE_CHARS = 500
BURST_LINES = 100
LINES_PER_S = 1 / 60
READ_BYTES = 65536
"""As much as a pipe holds."""
PAUSE_S = 0.05
"""Between two reads, so that a writer without end costs the launcher little time."""
_log = logging.getLogger("vtpm.launcher")


def log_lines() -> Allowance:
    """Return what one vTPM may have logged, over all its instances: 1,540 lines on the first day, 1,440 on others."""
    return Allowance(BURST_LINES, LINES_PER_S)


class InstanceLog:
    """See the module. The pipe is always read on, for a full one would stop a vtpmd in the middle of a command.

    Args:
        name: the vTPM's.
        fd: reading end of the pipe; the log's from now on.
        allowance: one is taken for each line.
    """

    def __init__(self, name: str, fd: int, allowance: Allowance) -> None:
        self._name = name
        self._fd = fd
        self._allowance = allowance
        self._dropped = 0
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        os.set_blocking(fd, False)
        self._listen()

    def close(self) -> None:
        """Log what is left, and say how much was dropped."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._fd)
        with contextlib.suppress(BlockingIOError):
            self._take(os.read(self._fd, READ_BYTES))
        os.close(self._fd)
        self._tell_dropped()

    def _listen(self) -> None:
        self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        self._take(data)
        self._loop.remove_reader(self._fd)
        if data:
            self._pause = self._loop.call_later(PAUSE_S, self._listen)

    def _take(self, data: bytes) -> None:
        lines = data.splitlines()
        for number, line in enumerate(lines):
            if not self._allowance.take():
                self._dropped += len(lines) - number
                return
            self._tell_dropped()
            _log.info("%s: %s", self._name, _printable(line[:LINE_CHARS]))

    def _tell_dropped(self) -> None:
        if self._dropped:
            _log.info("%s: %d lines dropped", self._name, self._dropped)
            self._dropped = 0


def _printable(line: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in line)
