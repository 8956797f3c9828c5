"""How `vtpm migrate --qmp` moves a running guest: the client drives both QEMUs, and here is shown how far it is.

One line that is rewritten on a terminal; elsewhere a line for each change, and about one a second; nothing with JSON.
The driver takes long to import, so this module imports it when a guest is moved.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from vtpm.cli.output import Output, print_message, printable

if TYPE_CHECKING:
    from vtpm.client.qemu_monitor import Progress

LINE_EVERY_S = 1.0
_MEBIBYTE = 1 << 20


def drive_guest(
    name: str,
    qmp: str,
    peer_qmp: str,
    uri: str,
    *,
    departing: Callable[[], None],
    arrived: Callable[[], None],
    vm_uuid: UUID | None,
    limit_s: float,
    output: Output,
) -> None:
    """Move the running guest of the vTPM `name`, and show how far it is.

    Args:
        qmp: its QEMU's monitor: path of a unix socket, or HOST:PORT.
        peer_qmp: that of the QEMU that waits for it.
        uri: QEMU's migration URI, such as tcp:HOST:PORT.
        departing, arrived: see live_migration.drive; they show nothing by themselves.
        vm_uuid: of the machine that the vTPM belongs to, if it belongs to one.
        limit_s: within which the guest has to have left.
    Raises:
        UsageError: an address is none. All others: see live_migration.drive.
    """
    from vtpm.client.live_migration import drive
    from vtpm.client.qemu_monitor import QmpAddress

    source, destination = QmpAddress.parse(qmp), QmpAddress.parse(peer_qmp)
    with _shown(output) as show:

        def depart() -> None:
            show(f"Moving {name}: both hosts prove what they are", True)
            departing()

        def arrive() -> None:
            show(f"Moving {name}: its guest waits, paused, for the vTPM to arrive", True)
            arrived()

        last = ""

        def progress(now: Progress) -> None:
            nonlocal last
            show(f"Moving {name}: {_described(now)}", now.status != last)
            last = now.status

        drive(
            source,
            destination,
            uri,
            departing=depart,
            arrived=arrive,
            progress=progress,
            limit_s=limit_s,
            vm_uuid=vm_uuid,
        )


def _described(progress: Progress) -> str:
    if not progress.total_bytes:
        return progress.status
    sent, left, total = (
        f"{size // _MEBIBYTE}" for size in (progress.transferred_bytes, progress.remaining_bytes, progress.total_bytes)
    )
    # More may be sent than there is: the guest goes on writing.
    return f"{progress.status}, {left} of {total} MiB to go, {sent} MiB sent"


@contextlib.contextmanager
def _shown(output: Output) -> Iterator[Callable[[str, bool], None]]:
    """Give what shows a text; its second argument says that the text is no mere change of numbers."""
    if output is Output.JSON:
        yield lambda text, new: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status("") as line:
            yield lambda text, new: line.update(Text(printable(text)))
    else:
        yield _Lines().show


class _Lines:
    def __init__(self) -> None:
        self._next_s = 0.0

    def show(self, text: str, new: bool) -> None:
        """Print the text, unless it is about numbers of which some were printed just now."""
        if not new and time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + LINE_EVERY_S
        # That nobody reads it any more is no reason to leave a guest half-way.
        with contextlib.suppress(OSError):
            print_message(text)
