"""The door to Xen's libraries: libxenstore, libxenevtchn and libxengnttab, through ctypes, loaded when first needed.

Nothing of them is loaded by an import, and nothing is compiled against them, so that a host without Xen needs neither.
What each function takes is written down here from its C header; ctypes checks nothing more. Decision record 28.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_uint, c_uint32, c_ulong, c_void_p
from typing import Any, NamedTuple, NoReturn

from vtpm.errors import UnavailableError


class _Function(NamedTuple):
    returns: Any
    takes: Sequence[Any]


class _Library(NamedTuple):
    package: str
    functions: Mapping[str, _Function]


_XS = [c_void_p, c_uint32]
_XS_PATH = [*_XS, c_char_p]
_WATCH = _Function(c_bool, [c_void_p, c_char_p, c_char_p])

_LIBRARIES = {
    # xenstore.h
    "libxenstore.so.4": _Library(
        "libxenstore4",
        {
            "xs_open": _Function(c_void_p, [c_ulong]),
            "xs_close": _Function(None, [c_void_p]),
            "xs_fileno": _Function(c_int, [c_void_p]),
            "xs_check_watch": _Function(c_void_p, [c_void_p]),
            "xs_watch": _WATCH,
            "xs_unwatch": _WATCH,
            "xs_read": _Function(c_void_p, [*_XS_PATH, POINTER(c_uint)]),
            "xs_directory": _Function(c_void_p, [*_XS_PATH, POINTER(c_uint)]),
            "xs_write": _Function(c_bool, [*_XS_PATH, c_char_p, c_uint]),
            "xs_rm": _Function(c_bool, _XS_PATH),
            "xs_transaction_start": _Function(c_uint32, [c_void_p]),
            "xs_transaction_end": _Function(c_bool, [*_XS, c_bool]),
        },
    ),
    # xenevtchn.h
    "libxenevtchn.so.1": _Library(
        "libxenevtchn1",
        {
            "xenevtchn_open": _Function(c_void_p, [c_void_p, c_uint]),
            "xenevtchn_close": _Function(c_int, [c_void_p]),
            "xenevtchn_fd": _Function(c_int, [c_void_p]),
            "xenevtchn_bind_interdomain": _Function(c_int, [c_void_p, c_uint32, c_uint32]),
            "xenevtchn_unbind": _Function(c_int, [c_void_p, c_uint32]),
            "xenevtchn_notify": _Function(c_int, [c_void_p, c_uint32]),
            "xenevtchn_pending": _Function(c_int, [c_void_p]),
            "xenevtchn_unmask": _Function(c_int, [c_void_p, c_uint32]),
        },
    ),
    # xengnttab.h
    "libxengnttab.so.1": _Library(
        "libxengnttab1",
        {
            "xengnttab_open": _Function(c_void_p, [c_void_p, c_uint]),
            "xengnttab_close": _Function(c_int, [c_void_p]),
            "xengnttab_map_grant_ref": _Function(c_void_p, [c_void_p, c_uint32, c_uint32, c_int]),
            "xengnttab_unmap": _Function(c_int, [c_void_p, c_void_p, c_uint32]),
        },
    ),
}


@functools.cache
def load(name: str) -> Any:
    """Return one of the three libraries, its functions declared.

    Raises:
        UnavailableError: it is not there, or lacks a function.
    """
    package, functions = _LIBRARIES[name]
    try:
        library = ctypes.CDLL(name, use_errno=True)
        for function, (returns, takes) in functions.items():
            symbol = getattr(library, function)
            symbol.restype, symbol.argtypes = returns, takes
    except (OSError, AttributeError) as error:
        raise UnavailableError(
            f"Xen's library {name} cannot be used: {error}",
            next_step=f"On Debian 12 install {package}; a back-end of Xen's PV TPM runs in a Xen domain alone",
        ) from error
    return library


def last_error() -> OSError:
    """Return what the last call of this thread into a library left in errno."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def cannot_open(what: str, path: str) -> NoReturn:
    """Raise UnavailableError for a service of the hypervisor that could not be opened, after errno."""
    raise UnavailableError(
        f"{what} cannot be opened: {last_error().strerror}",
        next_step=f"This must run in a Xen domain, with {path} there and open to it",
    )


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.free.restype, libc.free.argtypes = None, [c_void_p]
    return libc


@contextlib.contextmanager
def freed(pointer: int) -> Iterator[int]:
    """Memory that a library has allocated for its caller; freed at the end."""
    try:
        yield pointer
    finally:
        _libc().free(pointer)
