"""A canned manager and the vtpm command, in this process, as a program of its own, and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import pytest

from tests.unit.client.canned_manager import RUNNING, CannedManager, serve
from vtpm.cli.main import main

TIMEOUT_S = 20.0
PATIENCE_S = 1.0
PROGRAM = [sys.executable, "-m", "vtpm.cli.main"]


@dataclass(frozen=True)
class Ended:
    """What a use of the command left behind."""

    status: int
    out: str
    err: str


Cli = Callable[..., Ended]


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedManager]:
    canned = CannedManager(tmp_path / "m", vtpms={"web1": RUNNING})
    monkeypatch.setenv("VTPM_SOCKET", str(canned.socket_path))
    with serve(canned):
        yield canned


@pytest.fixture
def cli(manager: CannedManager, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command in this process, its manager the canned one, its input no terminal."""

    def run(*words: str) -> Ended:
        status = main(words)
        out, err = capfd.readouterr()
        return Ended(status, out, err)

    return run


def start_program(*words: str) -> subprocess.Popen[str]:
    """Start the command as a program of its own."""
    return subprocess.Popen(
        [*PROGRAM, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # So that what it starts can be ended with it.
        start_new_session=True,
    )


def finish(program: subprocess.Popen[str], text: str | None = None) -> Ended:
    """Wait for a program's end, feeding it a text; kill it and what it started if it takes too long."""
    with program:
        try:
            out, err = program.communicate(text, TIMEOUT_S)
        except BaseException:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    return Ended(program.returncode, out, err)


def on_terminal(*words: str, typed: str = "", typed_again: str = "") -> Ended:
    """Run the command on a terminal of its own; `out` is all that is seen.

    Args:
        typed: what is typed once it has asked.
        typed_again: what is typed whenever nothing happens after that.
    """
    ours, theirs = pty.openpty()
    seen = bytearray()
    program = subprocess.Popen(
        ["setsid", "--ctty", *PROGRAM, *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    with program, open(ours, "rb+", buffering=0) as terminal:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            unanswered = typed
            while True:
                if select.select([terminal], [], [], PATIENCE_S)[0]:
                    chunk = read_terminal(terminal)
                    if not chunk:
                        break
                    seen += chunk
                elif b"[y/N]: " in seen:
                    unanswered = typed_again
                if unanswered and b"[y/N]: " in seen:
                    terminal.write(unanswered.encode())
                    unanswered = ""
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not ended after {TIMEOUT_S} s: {seen!r}")
            status = program.wait(TIMEOUT_S)
        except BaseException:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    return Ended(status, seen.decode(), "")


def read_terminal(terminal: FileIO) -> bytes:
    """Return what a terminal has shown next, or nothing when its other side is closed."""
    try:
        return terminal.read(4096)
    except OSError:
        # EIO: the other side is closed.
        return b""
