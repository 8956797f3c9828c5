"""Event channels over libxenevtchn. See `hypervisor.EventChannels`."""

from __future__ import annotations

import select
from types import TracebackType
from typing import Any, Self

from vtpm.errors import UnavailableError
from vtpm.guest_link.xen.libraries import cannot_open, last_error, load


class LibEventChannels:
    """The event channels of this process. Used by one thread; after a fork by the parent alone.

    Raises:
        UnavailableError: no library, or no Xen below this kernel.
    """

    def __init__(self) -> None:
        self._lib = load("libxenevtchn.so.1")
        self._handle = self._lib.xenevtchn_open(None, 0)
        if not self._handle:
            cannot_open("event channels", "/dev/xen/evtchn")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all channels."""
        self._lib.xenevtchn_close(self._handle)

    def fileno(self) -> int:
        """See EventChannels."""
        return int(self._lib.xenevtchn_fd(self._handle))

    def pending(self) -> int | None:
        """See EventChannels."""
        # The library's call waits where there is nothing, even on a descriptor that does not.
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        if not poller.poll(0):
            return None
        if (port := int(self._lib.xenevtchn_pending(self._handle))) < 0:
            raise UnavailableError(f"no event can be taken from Xen: {last_error().strerror}")
        return port

    def bind(self, domain: int, port: int) -> LibChannel:
        """See EventChannels."""
        return LibChannel(
            self._lib, self._handle, _checked(self._lib.xenevtchn_bind_interdomain(self._handle, domain, port))
        )


class LibChannel:
    """One channel; see `hypervisor.Channel`. To be closed before what it was bound with."""

    def __init__(self, lib: Any, handle: int, port: int) -> None:
        self._lib = lib
        self._handle = handle
        self._port = port

    @property
    def port(self) -> int:
        """See Channel."""
        return self._port

    def notify(self) -> None:
        """See Channel."""
        _checked(self._lib.xenevtchn_notify(self._handle, self._port))

    def unmask(self) -> None:
        """See Channel."""
        _checked(self._lib.xenevtchn_unmask(self._handle, self._port))

    def close(self) -> None:
        """See Channel."""
        if self._lib.xenevtchn_unbind(self._handle, self._port) < 0:
            raise UnavailableError(f"event channel {self._port} cannot be unbound: {last_error().strerror}")


def _checked(result: int) -> int:
    if result < 0:
        raise last_error()
    return result
