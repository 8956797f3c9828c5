"""The back-end of one vTPM: finds its device in xenstore, connects its front-end and serves one command at a time.

Which guest it serves follows from its own domain's xenstore directory, which the toolstack writes, and from Xen, which
maps a page and binds a channel of the domain that is named there or of none. What the front-end's domain writes is
bounded by `vtpm.wire.xenbus` and `vtpm.wire.xen_ring`; at worst that guest has no TPM. While a page of a domain is
mapped, Xen gives that domain's id to no other. Decision record 28. Used by one thread.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self
from uuid import UUID

from vtpm.guest_link.refusals import Complaints
from vtpm.guest_link.xen.device import Device, Execute
from vtpm.guest_link.xen.hypervisor import Hypervisor
from vtpm.wire.xenbus import BACKENDS, DeviceId, belongs

_MOST_EVENTS = 256
_BACKENDS_TOKEN, _FRONTEND_TOKEN = "backends", "frontend"


class PvTpmBackend:
    """See the module. Closing it lets go of everything and writes nothing: a back-end that comes after it goes on.

    Args:
        xen: the hypervisor's services; stay the caller's.
        uuid: of the vTPM. A device with it is served; one after the other, where there are several.
        execute: runs one command. What it raises comes out of `serve`, and ends this back-end.
        say: takes a line for the log. No more lines come than an allowance, whatever guests do.
    Raises:
        UnavailableError: xenstore does not answer.
    """

    def __init__(self, xen: Hypervisor, uuid: UUID, execute: Execute, say: Callable[[str], None]) -> None:
        self._xen = xen
        self._uuid = uuid
        self._execute = execute
        self._notes = Complaints(say)
        self._device: Device | None = None
        self._more_events = False
        xen.xenstore.watch(BACKENDS, _BACKENDS_TOKEN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of page, channel and watches."""
        if self._device is not None:
            self._leave(self._device)
        self._xen.xenstore.unwatch(BACKENDS, _BACKENDS_TOKEN)

    @property
    def serves(self) -> DeviceId | None:
        """The device that is served; None when there is none."""
        return None if self._device is None else self._device.id

    def filenos(self) -> tuple[int, int]:
        """Descriptors of which one is readable when `serve` has something to do."""
        return self._xen.xenstore.fileno(), self._xen.channels.fileno()

    def serve(self, timeout_s: float | None = None) -> None:
        """Wait until something happens, or for the time limit, and follow it: changes in xenstore, one command.

        Args:
            timeout_s: None to wait for ever.
        Raises:
            UnavailableError: xenstore or the event channels do not answer any more.
        """
        self._wait(timeout_s)
        self._follow_xenstore()
        if self._device is not None:
            self._device.retire()
        port = self._xen.channels.pending()
        if port is not None and self._device is not None:
            self._device.answer(port)

    def _wait(self, timeout_s: float | None) -> None:
        limits_s = [0.0 if self._more_events else timeout_s, self._device.retires_in_s if self._device else None]
        limit_s = min((limit for limit in limits_s if limit is not None), default=None)
        poller = select.poll()
        for fd in self.filenos():
            poller.register(fd, select.POLLIN)
        poller.poll(None if limit_s is None else limit_s * 1000)

    def _follow_xenstore(self) -> None:
        """Take what waits, and look at each device that it is about once: a flood of changes is one change."""
        changed: set[DeviceId] = set()
        self._more_events = True
        for _ in range(_MOST_EVENTS):
            event = self._xen.xenstore.event()
            if event is None:
                self._more_events = False
                break
            path, token = event
            if token == _BACKENDS_TOKEN and (device := DeviceId.of_path(path)) is not None:
                changed.add(device)
                continue
            # The front-end's state, or what is above devices: one that was served may have gone with it.
            if self._device is not None:
                changed.add(self._device.id)
            if token == _BACKENDS_TOKEN:
                changed.update(self._devices())
        for device in changed:
            self._look(device)

    def _devices(self) -> Sequence[DeviceId]:
        children = self._xen.xenstore.children
        domains = [f"{BACKENDS}/{domain}" for domain in children(BACKENDS)]
        paths = [f"{domain}/{handle}" for domain in domains for handle in children(domain)]
        return [device for path in paths if (device := DeviceId.of_path(path)) is not None]

    def _look(self, id: DeviceId) -> None:
        read = self._xen.xenstore.read
        if self._device is not None and id == self._device.id:
            self._step(self._device)
        elif not belongs(read(f"{id.backend_path}/uuid"), read(f"{id.backend_path}/frontend-id"), id, self._uuid):
            return
        elif self._device is not None:
            self._notes.add(f"device {id.handle} of domain {id.domain} waits: the vTPM serves {self._device}")
        else:
            self._device = Device(self._xen, id, self._uuid, self._execute, self._notes)
            self._xen.xenstore.watch(f"{id.frontend_path}/state", _FRONTEND_TOKEN)
            self._step(self._device)

    def _step(self, device: Device) -> None:
        device.step()
        if device.gone:
            self._leave(device)
            # Another device of this vTPM may have waited for this one's end.
            for other in self._devices():
                self._look(other)

    def _leave(self, device: Device) -> None:
        device.close()
        self._xen.xenstore.unwatch(f"{device.id.frontend_path}/state", _FRONTEND_TOKEN)
        self._device = None
