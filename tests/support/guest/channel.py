"""Lines over a unix socket that QEMU connects to, every wait bounded and ended at once when QEMU dies.

The harness listens before QEMU starts, so there is no path to poll for. Used by `qmp` and `agent`.
"""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path


class GuestError(AssertionError):
    """The guest or its QEMU did not do what was asked in its time; the message ends with the logs' tails."""


class GuestEnded(GuestError):
    """QEMU ended, or closed the channel, while something was awaited from it."""


class Deadline:
    """A point in time that several waits share."""

    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        return max(0.0, self._end - time.monotonic())


class LineChannel:
    """One accepted connection, read line by line.

    Args:
        name: for messages, as "QMP".
        path: where to listen; at most 107 bytes.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._socket: socket.socket | None = None
        self._buffer = bytearray()

    def accept(self, process_id: int, deadline: Deadline) -> None:
        """Wait for QEMU to connect.

        Raises:
            GuestEnded: the process ended first.
            GuestError: nothing connected in time.
        """
        process = os.pidfd_open(process_id)
        try:
            waited = [self._listener.fileno(), process]
            ready, _, _ = select.select(waited, [], [], deadline.remaining_s())
        finally:
            os.close(process)
        if self._listener.fileno() in ready:
            self._socket, _ = self._listener.accept()
        elif ready:
            raise GuestEnded(f"QEMU ended before it connected its {self._name} channel")
        else:
            raise GuestError(f"QEMU did not connect its {self._name} channel in time")

    def send_line(self, line: bytes, deadline: Deadline) -> None:
        """Send one line; the newline is added here."""
        channel = self._connected()
        channel.settimeout(max(deadline.remaining_s(), 0.001))
        try:
            channel.sendall(line + b"\n")
        except TimeoutError as error:
            raise GuestError(f"the {self._name} channel took no data in time") from error
        except OSError as error:
            raise GuestEnded(f"the {self._name} channel is closed: {error}") from error

    def read_line(self, deadline: Deadline) -> bytes:
        """The next line without its newline.

        Raises:
            GuestEnded: the channel was closed.
            GuestError: no whole line arrived in time.
        """
        channel = self._connected()
        while (end := self._buffer.find(b"\n")) < 0:
            channel.settimeout(max(deadline.remaining_s(), 0.001))
            try:
                data = channel.recv(65536)
            except TimeoutError as error:
                raise GuestError(f"nothing came over the {self._name} channel in time") from error
            except OSError as error:
                raise GuestEnded(f"the {self._name} channel broke: {error}") from error
            if not data:
                raise GuestEnded(f"the {self._name} channel was closed")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise GuestError(f"the {self._name} channel was never connected")
        return self._socket
