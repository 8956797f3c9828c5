"""One service of a name per run directory, and its socket. May be imported by host services."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from vtpm.errors import ConflictError, UnavailableError
from vtpm.wire.unix_socket import bind_unix_socket

_BACKLOG = 128


class ServiceLock:
    """Says that this process is the one service of its name in a run directory, until it ends.

    The lock is flock's: the kernel drops it with the process's last descriptor, however the process ends. A child made
    by fork without exec shares it.

    Args:
        run_dir: directory of the services' sockets; must exist.
        name: the service's, such as "keeper"; the file is NAME.lock.
    Raises:
        ConflictError: another process has it; its pid is named.
        UnavailableError: the file cannot be made.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        path = run_dir / f"{name}.lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UnavailableError(f"the lock file {path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 16, 0).decode(errors="replace").strip() or "not yet known"
            os.close(self._fd)
            raise ConflictError(
                f"a {name} already serves {run_dir}, its pid is {holder}", next_step="Use it, or stop it first"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def bind_service_socket(self, path: Path, mode: int, owner_uid: int | None = None) -> socket.socket:
        """Return a listening packet socket; see bind_unix_socket. Only the holder knows that an old one is stale."""
        return bind_unix_socket(path, socket.SOCK_SEQPACKET, mode=mode, owner_uid=owner_uid)

    def release(self) -> None:
        """Drop the lock before the process ends; for tests and orderly hand-overs."""
        os.close(self._fd)
