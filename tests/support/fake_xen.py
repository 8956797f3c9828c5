"""A hypervisor of ours for one back-end: a xenstore with watches, grants, event channels, and domains that use them.

It keeps the rules that matter to a back-end: relative paths, events of watches, channels that are masked when their
event is taken, pages that stay mapped when their domain dies. It counts what is held, so that nothing can be leaked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.support.xen_page import NotedPage
from vtpm.guest_link.xen.hypervisor import Hypervisor

BACKEND_DOMAIN = 3
HOME = f"/local/domain/{BACKEND_DOMAIN}"


class Bell:
    """A descriptor that is readable while something waits."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self, waiting: bool) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        if waiting:
            os.eventfd_write(self.fd, 1)


class FakeXenstore:
    """See hypervisor.Xenstore; and what the toolstack and other domains do: `put`, `drop`."""

    def __init__(self) -> None:
        self.nodes: dict[str, bytes] = {}
        self.watches: list[tuple[str, str]] = []
        self.forbidden: set[str] = set()
        self.before_update: Callable[[], None] = lambda: None
        self._events: list[tuple[str, str]] = []
        self._bell = Bell()

    def fileno(self) -> int:
        return self._bell.fd

    def event(self) -> tuple[str, str] | None:
        event = self._events.pop(0) if self._events else None
        self._bell.set(bool(self._events))
        return event

    def watch(self, path: str, token: str) -> None:
        assert (path, token) not in self.watches
        self.watches.append((path, token))
        self._tell(path, token)

    def unwatch(self, path: str, token: str) -> None:
        self.watches.remove((path, token))

    def read(self, path: str) -> bytes | None:
        path = self.full(path)
        return None if path in self.forbidden else self.nodes.get(path)

    def children(self, path: str) -> Sequence[str]:
        below = self.full(path) + "/"
        return sorted({node[len(below) :].partition("/")[0] for node in self.nodes if node.startswith(below)})

    def update(self, directory: str, keys: Mapping[str, bytes]) -> bool:
        self.before_update()
        if self.full(directory) not in self.nodes:
            return False
        self.put({f"{directory}/{key}": value for key, value in keys.items()})
        return True

    def remove(self, directory: str) -> None:
        self.drop(directory)

    def put(self, keys: Mapping[str, bytes]) -> None:
        """Write nodes, and make what is above them."""
        for path, value in keys.items():
            path = self.full(path)
            parts = path.split("/")
            for end in range(2, len(parts)):
                self.nodes.setdefault("/".join(parts[:end]), b"")
            self.nodes[path] = value
            for watched, token in self.watches:
                above = self.full(watched)
                if path == above or path.startswith(above + "/"):
                    self._tell(path if watched.startswith("/") else path.removeprefix(HOME + "/"), token)

    def drop(self, path: str) -> None:
        """Remove a node and what is below it."""
        path = self.full(path)
        if path not in self.nodes:
            return
        for node in [node for node in self.nodes if node == path or node.startswith(path + "/")]:
            del self.nodes[node]
        for watched, token in self.watches:
            above = self.full(watched)
            if path.startswith(above + "/"):
                self._tell(path if watched.startswith("/") else path.removeprefix(HOME + "/"), token)
            elif above == path or above.startswith(path + "/"):
                self._tell(watched, token)

    @staticmethod
    def full(path: str) -> str:
        """The absolute form of a path."""
        return path if path.startswith("/") else f"{HOME}/{path}"

    def _tell(self, path: str, token: str) -> None:
        self._events.append((path, token))
        self._bell.set(True)


@dataclass
class Domain:
    """What a domain has granted and offered to the back-end's: pages by reference, ports with what they notify."""

    number: int
    pages: dict[int, NotedPage] = field(default_factory=dict)
    ports: dict[int, Callable[[], None]] = field(default_factory=dict)


@dataclass
class FakeChannel:
    """See hypervisor.Channel."""

    channels: FakeEventChannels
    port: int
    remote: tuple[int, int]
    masked: bool = False
    waiting: bool = False

    def notify(self) -> None:
        domain = self.channels.domains.get(self.remote[0])
        if self.channels.broken or domain is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self.channels.notified += 1
        domain.ports.get(self.remote[1], lambda: None)()

    def unmask(self) -> None:
        self.masked = False
        self.channels.ring()

    def close(self) -> None:
        del self.channels.bound[self.port]
        self.channels.ring()


class FakeEventChannels:
    """See hypervisor.EventChannels; `send` is what a front-end's notification does."""

    def __init__(self, domains: dict[int, Domain]) -> None:
        self.domains = domains
        self.bound: dict[int, FakeChannel] = {}
        self.notified = 0
        self.broken = False
        self._next = 40
        self._bell = Bell()

    def fileno(self) -> int:
        return self._bell.fd

    def pending(self) -> int | None:
        for channel in self.bound.values():
            if channel.waiting and not channel.masked:
                channel.waiting, channel.masked = False, True
                self.ring()
                return channel.port
        return None

    def bind(self, domain: int, port: int) -> FakeChannel:
        if domain not in self.domains or port not in self.domains[domain].ports:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._next += 1
        self.bound[self._next] = FakeChannel(self, self._next, (domain, port))
        return self.bound[self._next]

    def send(self, domain: int, port: int) -> None:
        """A notification of the front-end's side; lost while nobody is bound, as with Xen."""
        for channel in self.bound.values():
            if channel.remote == (domain, port):
                channel.waiting = True
        self.ring()

    def ring(self) -> None:
        self._bell.set(any(channel.waiting and not channel.masked for channel in self.bound.values()))


class FakeMapping:
    """See hypervisor.MappedPage."""

    def __init__(self, grants: FakeGrants, page: NotedPage) -> None:
        self._grants = grants
        self._page = page
        self._open = True

    def read(self, offset: int, count: int) -> bytes:
        assert self._open
        return self._page.read(offset, count)

    def write(self, offset: int, data: bytes) -> None:
        assert self._open
        self._page.write(offset, data)

    def close(self) -> None:
        assert self._open
        self._open = False
        self._grants.mapped -= 1


class FakeGrants:
    """See hypervisor.Grants."""

    def __init__(self, domains: dict[int, Domain]) -> None:
        self._domains = domains
        self.mapped = 0

    def map(self, domain: int, reference: int) -> FakeMapping:
        if domain not in self._domains or reference not in self._domains[domain].pages:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.mapped += 1
        return FakeMapping(self, self._domains[domain].pages[reference])


class FakeXen:
    """A host with no domain but the back-end's."""

    def __init__(self) -> None:
        self.domains: dict[int, Domain] = {}
        self.xenstore = FakeXenstore()
        self.channels = FakeEventChannels(self.domains)
        self.grants = FakeGrants(self.domains)
        self.hypervisor = Hypervisor(self.xenstore, self.channels, self.grants)

    @property
    def held(self) -> tuple[int, int]:
        """Pages mapped and channels bound."""
        return self.grants.mapped, len(self.channels.bound)

    def create_domain(self, number: int) -> Domain:
        """A guest that has nothing yet."""
        self.domains[number] = Domain(number)
        return self.domains[number]

    def attach(self, domain: int, uuid: str, handle: int = 0) -> None:
        """What libxl writes for `vtpm=["backend=…,uuid=…"]`."""
        back, front = f"backend/vtpm/{domain}/{handle}", f"/local/domain/{domain}/device/vtpm/{handle}"
        self.xenstore.put(
            {
                f"{front}/backend": f"{HOME}/{back}".encode(),
                f"{front}/backend-id": str(BACKEND_DOMAIN).encode(),
                f"{front}/handle": str(handle).encode(),
                f"{front}/state": b"1",
                f"{back}/frontend": front.encode(),
                f"{back}/frontend-id": str(domain).encode(),
                f"{back}/online": b"1",
                f"{back}/state": b"1",
                f"{back}/handle": str(handle).encode(),
                f"{back}/uuid": uuid.encode(),
            }
        )

    def detach(self, domain: int, handle: int = 0) -> None:
        """What `xl vtpm-detach` writes first; then it waits for state 6, and after that for the directory to go."""
        back = f"backend/vtpm/{domain}/{handle}"
        self.xenstore.put({f"{back}/online": b"0", f"{back}/state": b"5"})

    def destroy(self, number: int) -> None:
        """What `xl destroy` does: the front-end's directory goes, the device is detached, the domain dies."""
        for handle in self.xenstore.children(f"backend/vtpm/{number}"):
            self.xenstore.drop(f"/local/domain/{number}/device/vtpm/{handle}")
            self.detach(number, int(handle))
        self.xenstore.drop(f"/local/domain/{number}")
        del self.domains[number]

    def close(self) -> None:
        os.close(self.xenstore.fileno())
        os.close(self.channels.fileno())


@contextmanager
def fake_xen() -> Iterator[FakeXen]:
    """A host, at whose end nothing may be held or watched."""
    xen = FakeXen()
    try:
        yield xen
        assert xen.held == (0, 0) and xen.xenstore.watches == []
    finally:
        xen.close()
