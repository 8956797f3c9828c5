"""One device of the back-end: follows its keys, holds a page and a channel while it is connected, answers requests.

For `backend`. Used by one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from time import monotonic
from uuid import UUID

from vtpm.errors import ProtocolError
from vtpm.guest_link.refusals import Complaints
from vtpm.guest_link.xen.hypervisor import Channel, Hypervisor
from vtpm.wire.xen_ring import BackendRing, Request, Settled
from vtpm.wire.xenbus import Action, Connect, DeviceId, Disconnect, Handshake, Keys, Phase, Refuse, Retire, Write

Execute = Callable[[bytes, int], bytes]
"""Takes one whole command and its locality, 0 to 4; returns one whole response."""

RETIRE_AFTER_S = 1.0
"""A device that was detached is removed this long after it was closed: libxl first waits to see it closed, and fails
when it sees it gone."""


class _Connection:
    """What is held of a front-end's domain: one mapped page and one event channel.

    Raises:
        OSError: the domain has not granted the page, or not offered the channel; nothing is held then.
    """

    def __init__(self, xen: Hypervisor, domain: int, offer: Connect) -> None:
        with contextlib.ExitStack() as stack:
            page = xen.grants.map(domain, offer.ring_ref)
            stack.callback(page.close)
            self.channel: Channel = xen.channels.bind(domain, offer.event_channel)
            stack.callback(self.channel.close)
            self.ring = BackendRing(page)
            self._held = stack.pop_all()

    def close(self) -> None:
        """Let go of both, the channel first."""
        self._held.close()


class Device:
    """See the module.

    Args:
        xen: the hypervisor's services.
        id: of the device's directory.
        uuid: of the vTPM.
        execute: runs one command; what it raises comes out of `step` and `answer`.
        notes: what is worth a line.
    """

    def __init__(self, xen: Hypervisor, id: DeviceId, uuid: UUID, execute: Execute, notes: Complaints) -> None:
        self._xen = xen
        self.id = id
        self._handshake = Handshake(id, uuid)
        self._execute = execute
        self._notes = notes
        self._connection: _Connection | None = None
        self._retire_at: float | None = None

    def __str__(self) -> str:
        return f"device {self.id.handle} of domain {self.id.domain}"

    @property
    def gone(self) -> bool:
        """Whether its directory is gone, or another's; then nothing is held, and nothing more will happen."""
        return self._handshake.phase is Phase.GONE

    @property
    def retires_in_s(self) -> float | None:
        """How long from now `retire` has something to do; None when it has nothing."""
        return None if self._retire_at is None else max(0.0, self._retire_at - monotonic())

    def step(self) -> None:
        """Follow what the keys hold now."""
        read = self._xen.xenstore.read
        back, front = self.id.backend_path, self.id.frontend_path
        keys = Keys(
            *(read(f"{back}/{name}") for name in ("uuid", "frontend-id", "online")),
            *(read(f"{front}/{name}") for name in ("state", "ring-ref", "event-channel", "feature-protocol-v2")),
        )
        self._carry_out(self._handshake.step(keys))

    def retire(self) -> None:
        """Remove the directory, if its time has come."""
        if self.retires_in_s == 0:
            self._retire_at = None
            self._xen.xenstore.remove(self.id.backend_path)

    def answer(self, port: int) -> None:
        """Take and answer one request, if there is one and this port is the device's: it is the one with an event."""
        if self._connection is not None and port == self._connection.channel.port:
            self._take(self._connection)

    def close(self) -> None:
        """Let go of page and channel."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Write(keys):
                    self._xen.xenstore.update(self.id.backend_path, keys)
                case Connect():
                    self._connect(action)
                case Disconnect():
                    self.close()
                case Refuse(reason):
                    self._notes.add(f"{self} is refused: {reason}")
                case Retire():
                    self._retire_at = monotonic() + RETIRE_AFTER_S

    def _connect(self, offer: Connect) -> None:
        try:
            self._connection = _Connection(self._xen, self.id.domain, offer)
        except OSError as error:
            reason = f"its page or event channel cannot be connected: {error.strerror}"
            self._carry_out(self._handshake.refused(reason))
            return
        self._carry_out(self._handshake.connected())
        self._notes.add(f"{self} is connected")
        # Linux sends its first command without waiting for this, and then the event of it went nowhere.
        self._take(self._connection)

    def _take(self, connection: _Connection) -> None:
        # Before the page is looked at, so that whatever comes after the look is another event.
        if self._reach(connection.channel.unmask) and self._turn(connection.ring):
            self._reach(connection.channel.notify)

    def _reach(self, call: Callable[[], None]) -> bool:
        """Use the channel; where it is of no use any more, close the device."""
        try:
            call()
        except OSError as error:
            self._carry_out(self._handshake.refused(f"its event channel is of no use any more: {error.strerror}"))
            return False
        return True

    def _turn(self, ring: BackendRing) -> bool:
        """Say whether the page was written to."""
        match ring.take():
            case Request(command, locality):
                response = self._execute(command, locality)
                try:
                    ring.finish(response)
                except ProtocolError as error:
                    ring.abandon()
                    self._notes.add(f"a response to {self} was dropped: {error.message}")
            case Settled(refusal):
                if refusal:
                    self._notes.add(f"a request of {self} was refused: {refusal}")
            case None:
                return False
        return True
