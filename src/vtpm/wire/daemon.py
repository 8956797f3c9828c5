"""What every service does the same way: logging, readiness for systemd, waiting for the signal to end.

For the services' entry modules.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Iterable


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


async def end_when_signalled(signals: Iterable[int], ending: asyncio.Event | None = None) -> None:
    """Wait until one of the signals comes, or `ending` is set otherwise."""
    ending = ending or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, ending.set)
    await ending.wait()
