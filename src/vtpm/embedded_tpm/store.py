"""The embedded TPM's durable store: one folder, one state file. For the embedded TPM alone.

`state` holds the TPM's permanent state behind a digest; `initialised` says that a TPM was manufactured here. The order
makes it impossible to end up with a second, blank TPM: manufacture writes `state`, then `initialised`, and only then is
the TPM reachable. So with `initialised` there must be a sound `state`, and without it nobody has ever used the TPM.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from vtpm.errors import StateError, StoreError
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind

STATE_NAME = "state"
MARKER_NAME = "initialised"

_MAGIC = b"vtpm embedded 1\n"
_DIGEST_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + _DIGEST_BYTES


class EmbeddedStore:
    """The folder; made if it is not there. Whoever opens it must be the only one (see ServiceLock).

    Args:
        directory: the folder, of this user's own.
    Raises:
        StoreError: it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            _sync_directory(directory.parent)
        except OSError as error:
            raise StoreError(f"the embedded TPM's store {directory} cannot be made: {error.strerror}") from error

    @property
    def is_initialised(self) -> bool:
        """Whether a TPM was manufactured here to its end."""
        return (self._directory / MARKER_NAME).exists()

    def mark_initialised(self) -> None:
        """Say for ever that a TPM was manufactured here.

        Raises:
            StoreError: not durable.
        """
        self._replace(MARKER_NAME, b"A TPM lives here. Without its state file it is lost; it is never made anew.\n")

    def load(self) -> bytes | None:
        """Return the TPM's permanent state; None if there was never a TPM.

        Raises:
            StateError: the state is missing though there was a TPM, or damaged; nothing is changed.
        """
        path = self._directory / STATE_NAME
        try:
            with path.open("rb") as file:
                content = file.read(_HEAD_BYTES + MAX_STATE_BYTES + 1)
        except FileNotFoundError:
            if self.is_initialised:
                raise _lost(path, "is missing") from None
            return None
        except OSError as error:
            raise _lost(path, f"cannot be read: {error.strerror}") from error
        blob = content[_HEAD_BYTES:]
        if not blob or not hmac.compare_digest(content[:_HEAD_BYTES], _head(blob)):
            raise _lost(path, "is damaged")
        return blob

    def save(self, kind: StateKind, blob: bytes) -> None:
        """Make a blob durable before it returns; only permanent state is kept. An engine's Store.

        Raises:
            StoreError: not durable; what was there before still is.
        """
        if kind is StateKind.PERMANENT:
            self._replace(STATE_NAME, _head(blob) + blob)

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: temporary file, fsync, rename, fsync of the folder."""
        path = self._directory / name
        temporary = self._directory / f"{name}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
            temporary.replace(path)
            _sync_directory(self._directory)
        except OSError as error:
            raise StoreError(
                f"the embedded TPM's {path} cannot be written: {error.strerror}", next_step="Make room on the disk"
            ) from error


def _head(blob: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(blob).digest()


def _lost(path: Path, why: str) -> StateError:
    return StateError(
        f"the embedded TPM's state {path} {why}; a new one is not made, for it could not open what this one sealed",
        next_step="Put the folder back from a backup",
    )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
