"""Small files that must not be lost: read whole or not at all, replaced whole or not at all. For services."""

from __future__ import annotations

import os
from pathlib import Path

from vtpm.errors import StateError, StoreError


def read_file(path: Path, what: str, max_bytes: int) -> bytes | None:
    """Return the file's content, at most `max_bytes` + 1; None when there is no such file, and never anything else.

    Args:
        what: the file in words, for the error.
    Raises:
        StateError: it cannot be read, or something else is in its place (a link, a folder).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"the {what} {path} cannot be read: {error.strerror}") from error


def write_new(path: Path, data: bytes) -> None:
    """Write a file and sync it, in place of what a start that was cut short left there.

    Raises:
        OSError: it is not durable.
    """
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def replace_file(path: Path, what: str, data: bytes) -> None:
    """Put this content in the place of what is there; after a crash it is the one or the other.

    Raises:
        StoreError: it is not durable; after a crash it may be all the same.
    """
    temporary = path.with_name(f"{path.name}.next")
    try:
        write_new(temporary, data)
    except OSError as error:
        raise _not_written(path, what, error) from error
    rename_file(temporary, what, path)


def rename_file(source: Path, what: str, path: Path) -> None:
    """Put a file that is durable in the place of what is there, in one folder; as replace_file. Raises StoreError."""
    try:
        source.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _not_written(path, what, error) from error


def _not_written(path: Path, what: str, error: OSError) -> StoreError:
    return StoreError(f"the {what} {path} cannot be written: {error.strerror}", next_step="Make room on the disk")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
