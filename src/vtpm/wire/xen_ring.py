"""The shared page of Xen's PV TPM protocol, version 2, from the back-end's side: one page, one request at a time.

Another processor, of the front-end's domain, may change any byte of the page between any two accesses and while one
runs. So each field is copied out once, the copy is judged, the command is copied out by the copy's length, and only
then does anybody parse it: nothing is read again. Decision record 28; docs/protocols.md has the table.

Pure: the page is whatever has `Page`. For guest_link.
Source: Xen's public header io/tpmif.h (4.17), and how Linux 6.1 reads it, drivers/char/tpm/xen-tpmfront.c.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from vtpm.errors import ProtocolError
from vtpm.tpm.headers import HEADER_BYTES as TPM_HEADER_BYTES
from vtpm.tpm.headers import CommandHeader
from vtpm.tpm.types import MAX_LOCALITY

PAGE_BYTES = 4096
HEADER_BYTES = 8
GRANT_BYTES = 4
"""Each extra page has a grant reference between header and packet. No front-end is known to use one."""
MAX_PACKET_BYTES = PAGE_BYTES - HEADER_BYTES
"""Bound on a command and a response; what follows in extra pages is not taken."""

_LENGTH_AT, _LENGTH_BYTES = 0, 4
_STATE_AT = 4
_LOCALITY_AT = 5
_EXTRA_PAGES_AT = 7


class PageState(enum.IntEnum):
    """Whose turn it is. The front-end writes SUBMIT and CANCEL, the back-end IDLE and FINISH."""

    IDLE = 0
    SUBMIT = 1
    FINISH = 2
    CANCEL = 3


class Page(Protocol):
    """PAGE_BYTES of memory that the front-end changes as it likes."""

    def read(self, offset: int, count: int) -> bytes:
        """Copy bytes out, each of them once. No later access comes before it. Raises ValueError: outside the page."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in. The front-end sees writes in the order of the calls. Raises ValueError: outside the page."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One request, copied out of the page.

    Fields: command (whole, with the size that its header says; kept out of repr, for it can hold passwords), locality
    (0 to 4), packet_at (offset of the packet, where the response goes, too).
    """

    command: bytes = field(repr=False)
    locality: int
    packet_at: int


@dataclass(frozen=True, slots=True)
class Settled:
    """The page was given back as IDLE, which the front-end must be notified of. Linux then says ECANCELED.

    Fields: refusal (why its request was not taken, for logs; empty where it cancelled by itself).
    """

    refusal: str


class BackendRing:
    """The back-end's side of one page. After each answer the front-end must be notified.

    Args:
        page: mapped; stays the caller's.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self._taken: Request | None = None

    def take(self) -> Request | Settled | None:
        """Look at the page, once: to be called when the front-end has notified, and after the page was mapped.

        Returns:
            A request, to be answered by `finish` or `abandon`; Settled; or None when there is nothing to do. While a
            request is under way the page is not looked at, for a front-end that cancels it gets the response.
        """
        if self._taken is not None:
            return None
        state = self._page.read(_STATE_AT, 1)[0]
        if state == PageState.CANCEL:
            self._answer(PageState.IDLE)
            return Settled("")
        if state != PageState.SUBMIT:
            return None
        # The state comes first: whoever sees SUBMIT also sees what a well-behaved front-end wrote before it.
        try:
            self._taken = self._copy_out()
        except ProtocolError as error:
            self._answer(PageState.IDLE)
            return Settled(error.message)
        return self._taken

    def finish(self, response: bytes) -> None:
        """Answer the request under way: the response, then its length, then FINISH, so that who sees FINISH sees all.

        Args:
            response: whole TPM response.
        Raises:
            ProtocolError: it has fewer bytes than a header, or does not fit the page. The request is still under way.
            ValueError: no request is under way.
        """
        request = self._under_way()
        room = PAGE_BYTES - request.packet_at
        if not TPM_HEADER_BYTES <= len(response) <= room:
            raise ProtocolError(f"TPM response has {len(response)} bytes; {TPM_HEADER_BYTES} to {room} fit the page")
        self._page.write(request.packet_at, response)
        self._page.write(_LENGTH_AT, len(response).to_bytes(_LENGTH_BYTES, "little"))
        self._answer(PageState.FINISH)

    def abandon(self) -> None:
        """Give the page back as IDLE, without a response. Raises ValueError: no request is under way."""
        self._under_way()
        self._answer(PageState.IDLE)

    def _under_way(self) -> Request:
        if self._taken is None:
            raise ValueError("no request of the front-end is under way")
        return self._taken

    def _copy_out(self) -> Request:
        length = int.from_bytes(self._page.read(_LENGTH_AT, _LENGTH_BYTES), "little")
        locality = self._page.read(_LOCALITY_AT, 1)[0]
        extra_pages = self._page.read(_EXTRA_PAGES_AT, 1)[0]
        packet_at = HEADER_BYTES + GRANT_BYTES * extra_pages
        room = PAGE_BYTES - packet_at
        if locality > MAX_LOCALITY:
            raise ProtocolError(f"TPM command asks for locality {locality}; 0 to {MAX_LOCALITY} are allowed")
        if not TPM_HEADER_BYTES <= length <= room:
            raise ProtocolError(
                f"TPM command has {length} bytes; {TPM_HEADER_BYTES} to {room} fit a page with {extra_pages} extra ones"
            )
        command = self._page.read(packet_at, length)
        claimed = CommandHeader.parse(command).size_bytes
        if claimed != length:
            raise ProtocolError(f"TPM command claims {claimed} bytes and its page {length}")
        return Request(command, locality, packet_at)

    def _answer(self, state: PageState) -> None:
        self._page.write(_STATE_AT, bytes((state,)))
        self._taken = None
