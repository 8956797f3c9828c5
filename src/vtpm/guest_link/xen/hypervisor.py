"""What a back-end needs of Xen, as Protocols. `libxen.open_hypervisor` has the real one; tests have their own.

Paths of xenstore are absolute, or relative to the home of the back-end's own domain. Domains, grants and ports are
numbers that `vtpm.wire.xenbus` has bounded. A call that Xen refuses raises OSError with Xen's own number, and leaves
nothing behind; `UnavailableError` means that Xen's service itself does not answer. Used by one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vtpm.wire.xen_ring import Page


class Xenstore(Protocol):
    """One connection to xenstore. Every call raises UnavailableError when xenstore does not answer."""

    def fileno(self) -> int:
        """Descriptor that is readable while an event waits; then ask `event` until it has none."""
        ...

    def event(self) -> tuple[str, str] | None:
        """Take the path and token of the next event of a watch; None when none waits."""
        ...

    def watch(self, path: str, token: str) -> None:
        """Have an event for each change of a node or what is below it, and one at once."""
        ...

    def unwatch(self, path: str, token: str) -> None:
        """Have none any more, but those that wait already."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return what a node holds; None when there is none, or it may not be read."""
        ...

    def children(self, path: str) -> Sequence[str]:
        """Return the names below a node; empty when there is none, or it may not be read."""
        ...

    def update(self, directory: str, keys: Mapping[str, bytes]) -> bool:
        """Write keys of a directory in this order, all or none; False, and nothing written, when it is not there."""
        ...

    def remove(self, directory: str) -> None:
        """Remove a directory and what is below it, if it is there and may be removed."""
        ...


class Channel(Protocol):
    """One event channel between this domain and another."""

    @property
    def port(self) -> int:
        """Its number on this side."""
        ...

    def notify(self) -> None:
        """Send an event to the other side. Raises OSError: the channel is of no use any more."""
        ...

    def unmask(self) -> None:
        """Let its next event come. Raises OSError as `notify` does."""
        ...

    def close(self) -> None:
        """Let go of it. Raises UnavailableError: it cannot be."""
        ...


class EventChannels(Protocol):
    """The event channels of this process."""

    def fileno(self) -> int:
        """Descriptor that is readable while an event waits."""
        ...

    def pending(self) -> int | None:
        """Take the port of the next event, which is then masked; None when none waits. Raises UnavailableError."""
        ...

    def bind(self, domain: int, port: int) -> Channel:
        """Connect to a port that a domain has offered to this one. Raises OSError: it has not."""
        ...


class MappedPage(Page, Protocol):
    """A page of another domain, mapped to be read and written."""

    def close(self) -> None:
        """Unmap it; no call may follow. Raises UnavailableError: it cannot be."""
        ...


class Grants(Protocol):
    """Pages that other domains have granted to this one."""

    def map(self, domain: int, reference: int) -> MappedPage:
        """Map one page. Raises OSError: the domain has not granted it."""
        ...


@dataclass(frozen=True)
class Hypervisor:
    """The three together."""

    xenstore: Xenstore
    channels: EventChannels
    grants: Grants
