"""Files that commands read and write on their caller's behalf: bounded, and private to the caller."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from vtpm.errors import StoreError, UsageError

MAX_SECRET_BYTES = 8 * 1024
"""Of a file with a key or a passphrase."""


class NewFile:
    """A new file that only the caller can read; a context manager that removes it again unless it was filled.

    Raises:
        UsageError: there is one of that name already, or none can be made there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._filled = False
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"the file {path} cannot be made: {error.strerror}", next_step="Name a new file"
            ) from error

    def fill(self, data: bytes) -> None:
        """Write the content, once; when this returns, it survives power loss.

        Raises:
            StoreError: it is not durable.
        """
        try:
            with open(self._fd, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(self._fd)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(f"the file {self._path} cannot be written: {error.strerror}") from error
        self._filled = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if not self._filled:
            with contextlib.suppress(OSError):
                self._path.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file that anybody may read: all of it, or the old content stays.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            draft = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                draft.chmod(0o644)
                draft.replace(path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StoreError(f"the file {path} cannot be written: {error.strerror}") from error


def read_bytes(what: str, path: Path, max_bytes: int) -> bytes:
    """Return a file's content.

    Raises:
        UsageError: it cannot be read, or has more than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"the {what} cannot be read from {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise UsageError(f"{path} is no {what}: it has more than {max_bytes} bytes")
    return data


def read_text(what: str, path: Path) -> str:
    """Return the text of a file with a key or passphrase, without the line break at its end.

    Raises:
        UsageError: it cannot be read, is too large or no UTF-8.
    """
    data = read_bytes(what, path, MAX_SECRET_BYTES)
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        # Its own message would show a part of it.
        raise UsageError(f"{path} is no {what}: it is not UTF-8") from None
