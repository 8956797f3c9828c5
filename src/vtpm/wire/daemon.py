"""What every service does the same way: logging, readiness for systemd, its folders, waiting for the signal to end.

For the services' entry modules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path


def set_up_logging(program: str) -> None:
    """Log to stderr, one line each; systemd adds the time."""
    form = f"{program}: %(levelname)s %(message)s"
    if "JOURNAL_STREAM" not in os.environ:
        form = f"%(asctime)s {form}"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form)


def ready() -> None:
    """Tell systemd that the service is ready (sd_notify), where it asked for that."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.send(b"READY=1")


def make_directory(path: Path, mode: int) -> bool:
    """Make a directory, with the folders above it where they are missing, and make their names last; whether it is new.

    A power loss would otherwise take the folder with all that was flushed into it. The folder above one that is there
    already is flushed as well, for whoever made it may have been killed just then, unless this user may not read it.

    Raises:
        OSError: it cannot be made, or not be made to last.
    """
    missing = [found for found in (path, *path.parents) if not found.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing or [path]:
        try:
            fd = os.open(made.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            if missing:
                raise
            continue
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return bool(missing)


async def end_when_signalled(signals: Iterable[int], ending: asyncio.Event | None = None) -> None:
    """Wait until one of the signals comes, or `ending` is set otherwise."""
    ending = ending or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, ending.set)
    await ending.wait()
