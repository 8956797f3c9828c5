"""Makes the listening sockets of a vTPM's guest link, owned by the vTPM's owner. For the launcher."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import DomainError, UsageError

_BACKLOG = 16
_MAX_PATH_BYTES = 107


@dataclass(frozen=True)
class GuestSockets:
    """The two listening sockets of one vTPM.

    Paths are those that tpm2-tss' `swtpm:path=` expects: the control channel is at the data socket's path + ".ctrl".
    """

    data: socket.socket
    control: socket.socket
    data_path: Path
    control_path: Path

    def close(self) -> None:
        """Close and remove both."""
        for sock, path in ((self.data, self.data_path), (self.control, self.control_path)):
            sock.close()
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def open_guest_sockets(folder: Path, name: str, owner_uid: int, owner_gid: int) -> GuestSockets:
    """Make both sockets, in place of stale ones.

    Args:
        folder: exists, writable by the launcher alone.
        name: of the vTPM; a valid one.
        owner_uid, owner_gid: who may connect; used where the launcher may change owners.
    Raises:
        UsageError: the paths would be too long for a unix socket.
        DomainError: the folder does not take them.
    """
    data_path = folder / f"{name}.sock"
    control_path = folder / f"{name}.sock.ctrl"
    if len(os.fsencode(control_path)) > _MAX_PATH_BYTES:
        raise UsageError(
            f"the socket path {control_path} is longer than {_MAX_PATH_BYTES} bytes",
            next_step="Use a shorter name, or a shorter --run-dir",
        )
    data = _listen(data_path, owner_uid, owner_gid)
    try:
        control = _listen(control_path, owner_uid, owner_gid)
    except DomainError:
        data.close()
        data_path.unlink()
        raise
    return GuestSockets(data, control, data_path, control_path)


def _listen(path: Path, uid: int, gid: int) -> socket.socket:
    old_mask = os.umask(0o177)
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            path.unlink(missing_ok=True)
            listener.bind(os.fspath(path))
            stack.callback(path.unlink)
            if os.geteuid() == 0:
                os.chown(path, uid, gid, follow_symlinks=False)
            listener.listen(_BACKLOG)
            stack.pop_all()
    except OSError as error:
        raise DomainError(f"the socket {path} cannot be made: {error.strerror}") from error
    finally:
        os.umask(old_mask)
    return listener
