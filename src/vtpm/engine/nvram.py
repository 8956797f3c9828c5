"""What libtpms sees as its NVRAM: blobs it may load, and the caller's store behind what it writes.

Holds the rule that only a permit to manufacture lets libtpms hear "there is no permanent state". May be
imported by `engine` alone; knows the compiled extension by the `ffi` and `lib` it is given.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from vtpm.errors import EngineError
from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind

Store = Callable[[StateKind, bytes], None]
"""Makes one blob durable, or raises; an empty blob means that the kind is deleted."""

# From libtpms/tpm_nvfilename.h.
_KINDS = {
    b"permall": StateKind.PERMANENT,
    b"volatilestate": StateKind.VOLATILE,
    b"savestate": StateKind.SAVESTATE,
}


class Origin(enum.Enum):
    """Where the state of a TPM that is powered on comes from."""

    SAVED = "saved"
    MANUFACTURE = "manufacture"


class Retention(enum.Enum):
    """How long blobs are kept in memory for libtpms to load.

    TPM 2.0 loads while it is powered on and never again. TPM 1.2 also loads later: its savestate at
    TPM_Startup, and its permanent state as last stored when it rolls back a command that failed half-way.
    """

    UNTIL_POWERED = "until powered"
    WHILE_POWERED = "while powered"


class Nvram:
    """The nvram callbacks of libtpms.

    Args:
        ffi, lib: of the compiled extension; the callbacks are registered with them.
        store: called in the thread that called libtpms. What it raises reaches libtpms as TPM_FAIL.
    """

    def __init__(self, ffi: Any, lib: Any, store: Store, retention: Retention) -> None:
        self._ffi = ffi
        self._lib = lib
        self._store = store
        self._retention = retention
        self._origin = Origin.SAVED
        self._keeping = False
        self._blobs: dict[StateKind, bytes] = {}
        self.error: BaseException | None = None
        """What the store raised since `offer`, or None."""
        for name, function in (
            ("vtpm_load", self._load),
            ("vtpm_store", self._store_blob),
            ("vtpm_delete", self._delete),
        ):
            ffi.def_extern(name=name, error=Rc12.TPM_FAIL, onerror=self._on_error)(function)
        lib.vtpm_register()

    def offer(self, state: Mapping[StateKind, bytes], origin: Origin) -> None:
        """Have these blobs ready for the power-on that follows; forget earlier ones and `error`."""
        self._blobs = dict(state)
        self._origin = origin
        self._keeping = True
        self.error = None

    def settle(self) -> None:
        """The TPM is powered on: keep only what it may load later, and the permit to manufacture is spent."""
        self._origin = Origin.SAVED
        self._blobs.pop(StateKind.VOLATILE, None)
        if self._retention is Retention.UNTIL_POWERED:
            self.clear()

    def clear(self) -> None:
        """Forget all blobs: libtpms can load nothing, least of all "none"."""
        self._origin = Origin.SAVED
        self._keeping = False
        self._blobs = {}

    def stored(self, kind: StateKind) -> bytes:
        """Return the blob of a kind as libtpms would load it now, empty if there is none."""
        return self._blobs.get(kind, b"")

    # The functions below run inside libtpms. What they raise ends in _on_error, and libtpms sees TPM_FAIL.

    def _load(self, data: Any, length: Any, name: Any) -> int:
        kind = _KINDS.get(self._ffi.string(name))
        if kind is None:
            return Rc12.TPM_FAIL
        blob = self._blobs.get(kind)
        if blob is None:
            may_be_absent = kind is not StateKind.PERMANENT or self._origin is Origin.MANUFACTURE
            return Rc12.TPM_RETRY if may_be_absent else Rc12.TPM_FAIL
        copy = self._lib.malloc(len(blob))  # libtpms frees it
        if copy == self._ffi.NULL:
            return Rc12.TPM_SIZE
        self._ffi.memmove(copy, blob, len(blob))
        data[0] = self._ffi.cast("unsigned char *", copy)
        length[0] = len(blob)
        return Rc12.TPM_SUCCESS

    def _store_blob(self, data: Any, length: int, name: Any) -> int:
        kind = _KINDS.get(self._ffi.string(name))
        if kind is None or not 0 < length <= MAX_STATE_BYTES:
            raise EngineError(f"libtpms wants to store {length} bytes under {self._ffi.string(name)!r}")
        blob = bytes(self._ffi.buffer(data, length))
        self._store(kind, blob)
        if self._keeping:
            self._blobs[kind] = blob
        return Rc12.TPM_SUCCESS

    def _delete(self, name: Any, must_exist: bool) -> int:
        kind = _KINDS.get(self._ffi.string(name))
        if kind is None or kind is StateKind.PERMANENT:
            raise EngineError(f"libtpms wants to delete {self._ffi.string(name)!r}")
        if kind not in self._blobs:
            return Rc12.TPM_FAIL if must_exist else Rc12.TPM_SUCCESS
        self._store(kind, b"")
        del self._blobs[kind]
        return Rc12.TPM_SUCCESS

    def _on_error(self, kind: type[BaseException], error: BaseException, traceback: TracebackType) -> None:
        self.error = error
