"""Xenstore over libxenstore. See `hypervisor.Xenstore`; paths and values go through as they are."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn, Self

from vtpm.errors import UnavailableError
from vtpm.guest_link.xen.libraries import cannot_open, freed, last_error, load

_NO_TRANSACTION = 0
_MOST_TRIES = 100
"""Of a transaction that other clients' changes cross."""


class LibXenstore:
    """One connection. Used by one thread; after a fork by neither process.

    Raises:
        UnavailableError: no library, or no xenstore that answers.
    """

    def __init__(self) -> None:
        self._lib = load("libxenstore.so.4")
        self._handle = self._lib.xs_open(0)
        if not self._handle:
            cannot_open("xenstore", "/dev/xen/xenbus, or xenstored's socket,")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and all its watches."""
        self._lib.xs_close(self._handle)

    def fileno(self) -> int:
        """See Xenstore."""
        return int(self._lib.xs_fileno(self._handle))

    def event(self) -> tuple[str, str] | None:
        """See Xenstore."""
        found = self._lib.xs_check_watch(self._handle)
        if not found:
            error = last_error()
            if error.errno == errno.EAGAIN:
                return None
            _lost("an event", error)
        with freed(found):
            path, token = (ctypes.c_char_p * 2).from_address(found)
            return _text(path), _text(token)

    def watch(self, path: str, token: str) -> None:
        """See Xenstore."""
        if not self._lib.xs_watch(self._handle, path.encode(), token.encode()):
            _lost(f"a watch of {path}", last_error())

    def unwatch(self, path: str, token: str) -> None:
        """See Xenstore."""
        if not self._lib.xs_unwatch(self._handle, path.encode(), token.encode()):
            _lost(f"the end of a watch of {path}", last_error())

    def read(self, path: str) -> bytes | None:
        """See Xenstore."""
        return self._read(_NO_TRANSACTION, path)

    def children(self, path: str) -> Sequence[str]:
        """See Xenstore."""
        count = ctypes.c_uint()
        found = self._lib.xs_directory(self._handle, _NO_TRANSACTION, path.encode(), ctypes.byref(count))
        if not found:
            _only_if_absent(path)
            return ()
        with freed(found):
            return [_text(name) for name in (ctypes.c_char_p * count.value).from_address(found)]

    def update(self, directory: str, keys: Mapping[str, bytes]) -> bool:
        """See Xenstore."""
        for _ in range(_MOST_TRIES):
            transaction = self._lib.xs_transaction_start(self._handle)
            if not transaction:
                _lost("a transaction", last_error())
            there = self._read(transaction, directory) is not None
            written = there and all(self._write(transaction, f"{directory}/{key}", keys[key]) for key in keys)
            error = last_error()
            ended = self._lib.xs_transaction_end(self._handle, transaction, not written)
            if not there:
                return False
            if not written:
                _lost(f"writing to {directory}", error)
            if ended:
                return True
            if (error := last_error()).errno != errno.EAGAIN:
                _lost(f"writing to {directory}", error)
        raise UnavailableError(
            f"xenstore took no change of {directory}: others changed it {_MOST_TRIES} times meanwhile"
        )

    def remove(self, directory: str) -> None:
        """See Xenstore."""
        if not self._lib.xs_rm(self._handle, _NO_TRANSACTION, directory.encode()):
            _only_if_absent(directory)

    def _read(self, transaction: int, path: str) -> bytes | None:
        length = ctypes.c_uint()
        found = self._lib.xs_read(self._handle, transaction, path.encode(), ctypes.byref(length))
        if not found:
            _only_if_absent(path)
            return None
        with freed(found):
            return ctypes.string_at(found, length.value)

    def _write(self, transaction: int, path: str, value: bytes) -> bool:
        return bool(self._lib.xs_write(self._handle, transaction, path.encode(), value, len(value)))


def _text(name: bytes | None) -> str:
    """What is no ASCII is no path or token of ours, and stays different from all of them."""
    return (name or b"").decode("ascii", "backslashreplace")


def _only_if_absent(path: str) -> None:
    """Return when the last call failed for want of a node, or of rights to it."""
    error = last_error()
    if error.errno not in (errno.ENOENT, errno.EACCES):
        _lost(path, error)


def _lost(what: str, error: OSError) -> NoReturn:
    raise UnavailableError(f"xenstore did not answer about {what}: {error.strerror}") from error
