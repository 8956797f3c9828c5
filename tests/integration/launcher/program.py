"""vtpm-launcher as a program of its own, started as the manager or systemd starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.uids import own_uid_base

START_TIMEOUT_S = 20.0
END_TIMEOUT_S = 20.0


@contextlib.contextmanager
def launcher(*arguments: object, uid_base: int | None = None, umask: int = -1) -> Iterator[subprocess.Popen[str]]:
    """Run a launcher that is ready, with user ids of its own unless told; it is ended afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="vtpm-notify-") as notify_dir,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
    ):
        path = f"{notify_dir}/notify"
        notify.bind(path)
        notify.settimeout(START_TIMEOUT_S)
        process = subprocess.Popen(
            _command(arguments, uid_base),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "NOTIFY_SOCKET": path},
            text=True,
            umask=umask,
        )
        assert process.stderr is not None
        try:
            assert notify.recv(64) == b"READY=1"
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=END_TIMEOUT_S)


def refused(*arguments: object, uid_base: int | None = None) -> str:
    """Run a launcher that does not start; return its last line."""
    done = subprocess.run(
        _command(arguments, uid_base),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": os.defpath},
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


def folder(parent: Path, name: str) -> Path:
    """Make a directory for a launcher."""
    path = parent / name
    path.mkdir()
    return path


def _command(arguments: Sequence[object], uid_base: int | None) -> list[str]:
    base = own_uid_base() if uid_base is None else uid_base
    return [sys.executable, "-I", "-m", "vtpm.launcher.main", *map(str, arguments), "--uid-base", str(base)]
