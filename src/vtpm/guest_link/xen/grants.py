"""Granted pages over libxengnttab. See `hypervisor.Grants`."""

from __future__ import annotations

import ctypes
import mmap
import os
from types import TracebackType
from typing import Any, Self

from vtpm.errors import UnavailableError
from vtpm.guest_link.xen.libraries import cannot_open, last_error, load
from vtpm.wire.xen_ring import PAGE_BYTES

_MACHINE = "x86_64"


class LibGrants:
    """Other domains' pages in this process. Used by one thread; after a fork by the parent alone.

    Raises:
        UnavailableError: no library, no Xen below this kernel, or a processor whose accesses are not in order.
    """

    def __init__(self) -> None:
        # Its loads are seen in order, and so are its stores; elsewhere the page would need barriers that Python lacks.
        if (machine := os.uname().machine) != _MACHINE:
            raise UnavailableError(
                f"a page shared with another domain cannot be accessed in order on {machine}",
                next_step=f"Run it on {_MACHINE}",
            )
        self._lib = load("libxengnttab.so.1")
        self._handle = self._lib.xengnttab_open(None, 0)
        if not self._handle:
            cannot_open("grants", "/dev/xen/gntdev")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what is still mapped."""
        self._lib.xengnttab_close(self._handle)

    def map(self, domain: int, reference: int) -> LibMappedPage:
        """See Grants."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = self._lib.xengnttab_map_grant_ref(self._handle, domain, reference, protection)
        if not address:
            raise last_error()
        return LibMappedPage(self._lib, self._handle, address)


class LibMappedPage:
    """One page; see `hypervisor.MappedPage`. To be closed before what it was mapped with."""

    def __init__(self, lib: Any, handle: int, address: int) -> None:
        self._lib = lib
        self._handle = handle
        self._address: int | None = address

    def read(self, offset: int, count: int) -> bytes:
        """See Page."""
        return ctypes.string_at(self._at(offset, count), count)

    def write(self, offset: int, data: bytes) -> None:
        """See Page."""
        ctypes.memmove(self._at(offset, len(data)), data, len(data))

    def close(self) -> None:
        """See MappedPage."""
        address, self._address = self._address, None
        if address is not None and self._lib.xengnttab_unmap(self._handle, address, 1) != 0:
            raise UnavailableError(f"a page of another domain cannot be unmapped: {last_error().strerror}")

    def _at(self, offset: int, count: int) -> int:
        """Where an access begins that stays inside the page: past it is memory of this process."""
        if self._address is None:
            raise ValueError("the page is not mapped any more")
        if not 0 <= offset <= offset + count <= PAGE_BYTES:
            raise ValueError(f"{count} bytes at {offset} are outside the page")
        return self._address + offset
