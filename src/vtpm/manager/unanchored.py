"""A store whose root record is anchored in a file beside it: whole, durable, and with no protection against rollback.

Whoever puts an older store back puts this file back with it. Stands where the platform TPM's anchor is to stand.
Imported by the manager's entry alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from vtpm.errors import StateError, StoreError
from vtpm.secret import KEY_BYTES, Secret
from vtpm.vault.root_record import NOTHING_ANCHORED, AnchorValue

PUBLIC_MAC_KEY = Secret(bytes(KEY_BYTES))
"""No secret: with no anchor worth the name, a MAC would not protect the root record either."""


class UnanchoredStore:
    """An AnchorKeeper in a file.

    Args:
        path: its folder exists and belongs to the manager.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> AnchorValue:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return NOTHING_ANCHORED
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error
        if len(content) != 40:
            raise StateError(f"{self._path} is damaged: {len(content)} bytes")
        return AnchorValue(int.from_bytes(content[:8], "big"), content[8:])

    def write(self, value: AnchorValue) -> None:
        present = self.read()
        if value == present:
            return
        if value.version <= present.version:
            raise StateError(f"{self._path} has {present}; {value} is not later")
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            with open(draft, "wb", opener=_private) as file:
                file.write(value.version.to_bytes(8, "big") + value.digest)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}; nothing was acknowledged") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
