"""Says that the user ids of a range are this launcher's to give to instances. For the launcher's entry module.

Two instances with the same user id could reach one another, so two launchers on a host, each root with a state of its
own, must not give out the same one.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from vtpm.errors import ConflictError, UnavailableError

UIDS_FILE = Path("/run/vtpm-uids.lock")
"""Byte n stands for user id n. In a folder that belongs to root, whatever the run directories are."""
# <fcntl.h>, struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("@hhqqi4x")


class UidRange:
    """A lock on a range of user ids, until the process ends.

    It is a record lock of fcntl(2): ranges that overlap exclude one another, wherever they begin; the kernel drops it
    with the process, and children made by fork do not have it.

    Args:
        base: first user id.
        count: how many.
        path: the file; it is made if it is not there, and holds nothing.
    Raises:
        ConflictError: another process has some of them; its pid is named.
        UnavailableError: the file cannot be made.
    """

    def __init__(self, base: int, count: int, path: Path = UIDS_FILE) -> None:
        try:
            # Closing any descriptor of the file in this process would drop the lock: it is opened here alone.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UnavailableError(f"the lock file {path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, count, base)
        except (BlockingIOError, PermissionError):
            holder = self._holder(base, count)
            os.close(self._fd)
            raise ConflictError(
                f"another launcher on this host, its pid is {holder}, gives its instances user ids from {base} to "
                f"{base + count - 1} or some of them",
                next_step="Set uid_base in the configuration to a range that is free, or end the other host's services "
                "with `vtpm shutdown`",
            ) from None

    def _holder(self, base: int, count: int) -> str:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, base, count, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        return "not known any more" if kind == fcntl.F_UNLCK else str(pid)

    def release(self) -> None:
        """Drop the lock before the process ends; for tests."""
        os.close(self._fd)
