"""Where clients of the guest link come from. For whoever serves them: an instance, or the relay in front of one."""

from __future__ import annotations

import socket
from typing import Protocol

from vtpm.guest_link.refusals import Client


class Listener(Protocol):
    """See the module."""

    def fileno(self) -> int:
        """Descriptor that is readable while a client waits."""
        ...

    def accept(self) -> Client | None:
        """Take the next client; None when it has gone again."""
        ...


class SocketListener:
    """A listening socket.

    Args:
        sock: listens; made non-blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def fileno(self) -> int:
        """See Listener."""
        return self._sock.fileno()

    def accept(self) -> Client | None:
        """See Listener."""
        try:
            connection, _ = self._sock.accept()
        except OSError:
            return None
        return Client.of(connection)
