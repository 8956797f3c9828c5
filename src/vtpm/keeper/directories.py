"""The keeper's directories and its socket, made while it may still be root. For the keeper alone."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection
from pathlib import Path

from vtpm.errors import AccessDeniedError, StoreError
from vtpm.wire.daemon import make_directory
from vtpm.wire.unix_socket import bind_unix_socket


def prepare_directory(path: Path, uid: int, gid: int, *, mode: int = 0o700, other_owners: Collection[int] = ()) -> None:
    """Make a directory of the keeper's, or check one that is there.

    Args:
        uid, gid, mode: of a new one.
        other_owners: uids that may own it as well as `uid`.
    Raises:
        AccessDeniedError: it belongs to somebody else, or others may write to it.
        StoreError: it cannot be made.
    """
    try:
        if make_directory(path, mode) and os.geteuid() == 0:
            os.chown(path, uid, gid)
        status = path.stat()
    except OSError as error:
        raise StoreError(f"the directory {path} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is no directory", next_step="Move it away")
    if status.st_uid not in {uid, *other_owners}:
        raise AccessDeniedError(
            f"the directory {path} belongs to user id {status.st_uid}, not {uid}",
            next_step=f"Choose another, or run: chown {uid} {path}",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise AccessDeniedError(f"others may write to the directory {path}", next_step=f"Run: chmod go-w {path}")


def bind_socket(path: Path, manager_uid: int) -> socket.socket:
    """Bind the keeper's socket in place of a stale one; the caller holds the ServiceLock.

    It refuses connections until `listen` is called: a keeper that has no root key yet is not there.

    Args:
        path: of the socket.
        manager_uid: who may connect, beside root.
    Raises:
        ConflictError: something that is no socket is there.
        UsageError: the path is too long.
        UnavailableError: it cannot be made.
    """
    if os.geteuid() == 0:
        return bind_unix_socket(path, socket.SOCK_SEQPACKET, mode=0o600, owner_uid=manager_uid, backlog=None)
    # An ordinary user cannot give the socket away; the check of each peer's user id stands alone then.
    mode = 0o600 if manager_uid == os.geteuid() else 0o666
    return bind_unix_socket(path, socket.SOCK_SEQPACKET, mode=mode, backlog=None)
