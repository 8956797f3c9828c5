"""Second clients, turned away with an answer to their first request; and how much is said of what clients cause.

For whoever accepts them: an instance, or the relay in front of one. Used by one thread.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from vtpm.wire.allowance import Allowance

_PEERCRED = struct.Struct("3i")
_MAX_WAITING = 4


def peer(connection: socket.socket) -> tuple[int, int]:
    """Pid and uid of a connected peer; the pid is 0 where the kernel does not say: from another PID namespace."""
    try:
        pid, uid, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    except OSError:
        return 0, 0
    return max(pid, 0), max(uid, 0)


@dataclass(frozen=True)
class Client:
    """Somebody who has connected, and who that is: pid (0: not known) and uid."""

    sock: socket.socket
    pid: int
    uid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """Take a connection for the kernel's word on its peer."""
        return cls(sock, *peer(sock))


class Complaints:
    """Lines about what clients do, who may do it without end: no more than an allowance; the rest is counted.

    Args:
        say: takes a line.
        allowance: of lines.
    """

    def __init__(self, say: Callable[[str], None], allowance: Allowance | None = None) -> None:
        self._say = say
        self._allowance = allowance or Allowance()
        self._dropped = 0

    def add(self, text: str) -> None:
        """Say this, or count it."""
        if not self._allowance.take():
            self._dropped += 1
            return
        dropped, self._dropped = self._dropped, 0
        self._say(f"{text} ({dropped} lines like this were dropped before it)" if dropped else text)


class Watcher(Protocol):
    """What is needed of the main loop."""

    def watch(self, connection: socket.socket, call: Callable[[], None]) -> None:
        """Call back whenever the connection is readable."""
        ...

    def unwatch(self, connection: socket.socket) -> None:
        """Call back no more."""
        ...


class Refusals:
    """See the module.

    Args:
        watcher: see Watcher.
        complaints: where each is noted.
    """

    def __init__(self, watcher: Watcher, complaints: Complaints) -> None:
        self._watcher = watcher
        self._complaints = complaints
        self._waiting: list[socket.socket] = []

    def refuse(self, client: Client, answer: bytes) -> None:
        """Answer a client's first request with a refusal, so that it can say why it was turned away, and hang up."""
        connection = client.sock
        who = f"pid {client.pid}, uid {client.uid}" if client.pid else f"uid {client.uid}"
        self._complaints.add(f"a second client ({who}) was refused: another one uses the TPM")
        while len(self._waiting) >= _MAX_WAITING:
            self._drop(self._waiting[0])
        connection.setblocking(False)
        self._waiting.append(connection)

        def answered() -> None:
            if connection not in self._waiting:
                # It was readable in the same round in which a newer one took its place.
                return
            with contextlib.suppress(OSError):
                connection.recv(65536)
                connection.send(answer)
            self._drop(connection)

        self._watcher.watch(connection, answered)

    def _drop(self, connection: socket.socket) -> None:
        self._waiting.remove(connection)
        self._watcher.unwatch(connection)
        connection.close()
