"""A guest's driver on a hypervisor of ours: it does in its turn what Linux 6.1's xen-tpmfront does.

Nothing runs beside the test: the back-end is let serve, then the guest looks, until neither has anything to do.
"""

from __future__ import annotations

import itertools
import select

from tests.support.fake_xen import FakeXen
from tests.support.xen_page import NotedPage, fill
from vtpm.guest_link.xen.backend import PvTpmBackend
from vtpm.wire.xen_ring import PageState
from vtpm.wire.xenbus import XenbusState

_numbers = itertools.count(100)


class LinuxFrontend:
    """The driver of one device of one domain.

    Args:
        xen: with the domain created and the device attached.
    """

    def __init__(self, xen: FakeXen, domain: int, handle: int = 0) -> None:
        self._xen = xen
        self._domain = xen.domains[domain]
        self.path = f"/local/domain/{domain}/device/vtpm/{handle}"
        self.backend_path = f"backend/vtpm/{domain}/{handle}"
        self.page = NotedPage()
        self.port = 0
        self.notified = 0

    # -- xenbus -----------------------------------------------------------------------------------------------------
    def write(self, **keys: int | str | bytes) -> None:
        """Write keys of its own directory; an underscore stands for a dash."""
        self._xen.xenstore.put(
            {
                f"{self.path}/{name.replace('_', '-')}": value if isinstance(value, bytes) else str(value).encode()
                for name, value in keys.items()
            }
        )

    def probe(self) -> None:
        """Grant a page, offer a channel, write the keys, and go to Initialised (setup_ring)."""
        self.page = NotedPage()
        ring_ref, self.port = next(_numbers), next(_numbers)
        self._domain.pages[ring_ref] = self.page
        self._domain.ports[self.port] = self._interrupt
        self.write(ring_ref=ring_ref, event_channel=self.port, feature_protocol_v2=1)
        self.write(state=int(XenbusState.INITIALISED))

    def look(self) -> None:
        """Follow the back-end's state (backend_changed)."""
        match self.backend_state:
            case XenbusState.CONNECTED if self.state is XenbusState.INITIALISED:
                assert self._xen.xenstore.read(f"{self.backend_path}/feature-protocol-v2") == b"1"
                self.write(state=int(XenbusState.CONNECTED))
            case XenbusState.CLOSING | XenbusState.CLOSED if self.state not in (None, XenbusState.CLOSED):
                self.write(state=int(XenbusState.CLOSED))
            case _:
                pass

    @property
    def state(self) -> XenbusState | None:
        """Its own state; None when its directory is gone."""
        return _state(self._xen.xenstore.read(f"{self.path}/state"))

    @property
    def backend_state(self) -> XenbusState | None:
        """That of the back-end; None when its directory is gone."""
        return _state(self._xen.xenstore.read(f"{self.backend_path}/state"))

    # -- the page ---------------------------------------------------------------------------------------------------
    def send(self, command: bytes, locality: int = 0) -> None:
        """Submit a command (vtpm_send)."""
        assert self.page.memory[4] in (PageState.IDLE, PageState.FINISH)
        fill(self.page.memory, command, locality=locality)
        self.notify()

    def cancel(self) -> None:
        """Ask that what is under way be given up (vtpm_cancel)."""
        self.page.memory[4] = PageState.CANCEL
        self.notify()

    def notify(self) -> None:
        """Send an event to the back-end."""
        self._xen.channels.send(self._domain.number, self.port)

    def receive(self) -> bytes | None:
        """Return the response; None for ECANCELED (vtpm_recv)."""
        state = self.page.memory[4]
        if state == PageState.IDLE:
            return None
        assert state == PageState.FINISH, f"the page is in state {state}"
        return bytes(self.page.memory[8 : 8 + int.from_bytes(self.page.memory[:4], "little")])

    def _interrupt(self) -> None:
        self.notified += 1


def settle(backend: PvTpmBackend, *frontends: LinuxFrontend) -> None:
    """Let both sides go on until neither has anything to do."""
    poller = select.poll()
    for fd in backend.filenos():
        poller.register(fd, select.POLLIN)
    for _ in range(100):
        for frontend in frontends:
            frontend.look()
        if not poller.poll(0):
            return
        backend.serve(0)
    raise AssertionError("the back-end never comes to rest")


def _state(value: bytes | None) -> XenbusState | None:
    return None if value is None else XenbusState(int(value))
