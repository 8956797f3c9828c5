"""A page of memory that notes each access, and that somebody may change just before any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vtpm.wire.xen_ring import GRANT_BYTES, HEADER_BYTES, PAGE_BYTES, PageState


@dataclass(frozen=True)
class Access:
    """One access of the back-end; `data` is what it read or wrote."""

    wrote: bool
    offset: int
    data: bytes


class NotedPage:
    """See the module.

    Args:
        before: called with the page's memory before each access of the back-end.
    """

    def __init__(self, before: Callable[[bytearray], None] | None = None) -> None:
        self.memory = bytearray(PAGE_BYTES)
        self.accesses: list[Access] = []
        self.before = before or (lambda memory: None)

    def read(self, offset: int, count: int) -> bytes:
        """See Page."""
        self._check(offset, count)
        self.before(self.memory)
        data = bytes(self.memory[offset : offset + count])
        self.accesses.append(Access(False, offset, data))
        return data

    def write(self, offset: int, data: bytes) -> None:
        """See Page."""
        self._check(offset, len(data))
        self.before(self.memory)
        self.memory[offset : offset + len(data)] = data
        self.accesses.append(Access(True, offset, data))

    @property
    def reads(self) -> list[Access]:
        """Those of the back-end so far."""
        return [access for access in self.accesses if not access.wrote]

    @property
    def writes(self) -> list[Access]:
        """Those of the back-end so far."""
        return [access for access in self.accesses if access.wrote]

    @staticmethod
    def _check(offset: int, count: int) -> None:
        if not 0 <= offset <= offset + count <= PAGE_BYTES:
            raise ValueError(f"{count} bytes at {offset} are outside the page")


def fill(
    memory: bytearray, packet: bytes, *, state: int = PageState.SUBMIT, locality: int = 0, extra_pages: int = 0
) -> None:
    """Put a packet in the page as a front-end does, whatever it is; what does not fit is left out."""
    at = HEADER_BYTES + GRANT_BYTES * extra_pages
    memory[at:] = (packet + bytes(memory[at + len(packet) :]))[: PAGE_BYTES - at]
    memory[:HEADER_BYTES] = len(packet).to_bytes(4, "little") + bytes((state, locality, 0, extra_pages))
