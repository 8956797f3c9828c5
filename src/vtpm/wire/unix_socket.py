"""Makes unix sockets: a service's, whole or not at all, and pairs. For the services' entry modules and the launcher."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from vtpm.errors import ConflictError, UnavailableError, UsageError, VtpmError

BACKLOG = 128


def bind_unix_socket(
    path: Path, kind: socket.SocketKind, *, mode: int, owner_uid: int | None = None, backlog: int | None = BACKLOG
) -> socket.socket:
    """Return a socket at a path, in place of a stale one; the caller holds the lock that says that it is stale.

    It is renamed into place when it has its mode and owner and listens, so that no client sees it half made.

    Args:
        path: at most 107 bytes with its temporary suffix.
        kind: SOCK_STREAM or SOCK_SEQPACKET.
        mode: permission bits, such as 0o600.
        owner_uid: who it belongs to; only root can give it to another.
        backlog: of listen(2); None leaves it refusing connections until the caller listens.
    Raises:
        ConflictError: something that is no socket is at the path.
        UsageError: the path is too long.
        UnavailableError: the directory does not take it.
    """
    temporary = path.with_name(f"{path.name}.new")
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConflictError(f"{path} is no socket", next_step="Move it away")
        temporary.unlink(missing_ok=True)
        bound.bind(os.fspath(temporary))
        temporary.chmod(mode)
        if owner_uid is not None:
            os.chown(temporary, owner_uid, -1)
        if backlog is not None:
            bound.listen(backlog)
        temporary.replace(path)
    except OSError as error:
        bound.close()
        if error.errno is None:
            raise UsageError(f"the socket's path {path} is too long", next_step="Choose another run-dir") from error
        raise UnavailableError(f"the socket {path} cannot be made: {error.strerror}") from error
    except VtpmError:
        bound.close()
        raise
    return bound


def enter_socket_pair(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack, kind: socket.SocketKind = socket.SOCK_STREAM
) -> tuple[socket.socket, socket.socket]:
    """Return a connected pair of unix sockets, each closed with the stack that it was entered into.

    Args:
        ours: for the first end, which this process keeps.
        theirs: for the second end, which another process is given.
        kind: SOCK_STREAM or SOCK_SEQPACKET.
    Raises:
        OSError: there are no more descriptors.
    """
    our_end, their_end = socket.socketpair(socket.AF_UNIX, kind)
    return ours.enter_context(our_end), theirs.enter_context(their_end)
