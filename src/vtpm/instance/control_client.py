"""One client of the control channel, from its connection to its end: its requests, strictly one after the other.

All that is under way for a client is in its own object, so a job that is done when its client has gone answers nobody,
least of all the next client. Used by the main thread alone.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from vtpm.guest_link.control_link import ControlLink, Received, close_descriptors
from vtpm.guest_link.journal import Journal
from vtpm.instance.control import ControlSession
from vtpm.instance.worker import Worker
from vtpm.wire.emulator import Command, Init, Malformed, Request


class ControlHost(Protocol):
    """What a client needs of the instance's main loop."""

    def watch(self, link: ControlLink, call: Callable[[], None]) -> None:
        """Call back whenever the link is readable."""
        ...

    def unwatch(self, link: ControlLink) -> None:
        """Call back no more."""
        ...

    def post(self, call: Callable[[], None]) -> None:
        """Have this run in the main thread; from any thread."""
        ...

    def set_datafd(self, fd: int | None) -> bytes:
        """Carry SET_DATAFD out with the descriptor that came, and return the reply."""
        ...

    def on_control_spent(self) -> None:
        """INIT came and this engine cannot carry it out: a successor must."""
        ...

    def on_control_ended(self) -> None:
        """The client has gone; its link is closed."""
        ...

    def complain(self, text: str) -> None:
        """Take a line for the log."""
        ...


class _Phase(enum.Enum):
    READING = enum.auto()
    PARTIAL = enum.auto()
    """Half a request is in the socket, which stays readable: not to be waited on until a little later."""
    WORKING = enum.auto()
    """The TPM thread carries a request out; nothing is read meanwhile."""
    OVER = enum.auto()


class ControlClient:
    """See the module.

    Args:
        link: its connection; closed at its end.
        journal: of the control channel.
        session: what its requests do.
        worker: the TPM.
        host: see ControlHost.
    """

    def __init__(
        self, link: ControlLink, journal: Journal, session: ControlSession, worker: Worker, host: ControlHost
    ) -> None:
        self.link = link
        self._journal = journal
        self._session = session
        self._worker = worker
        self._host = host
        self._queued: deque[Request | Malformed] = deque()
        """What it sent ahead."""
        self._phase = _Phase.READING
        host.watch(link, self._on_readable)

    @property
    def is_partial(self) -> bool:
        """Whether `look_for_rest` is to be called in a little while."""
        return self._phase is _Phase.PARTIAL

    def look_for_rest(self) -> None:
        """See whether the rest of a request has come."""
        if self.is_partial:
            self._enter(_Phase.READING)

    def settle(self) -> None:
        """End the turn that a predecessor left."""
        try:
            command = self.link.unfinished()
            if command is Command.INIT:
                # The guest is in reset and waits for this: no TPM it knows is replaced behind its back.
                self._carry_out(Init(0))
            elif command is not None:
                self.link.fail_unfinished(ControlSession.FAIL)
        except OSError:
            self._end()

    def _on_readable(self) -> None:
        try:
            received = self.link.receive()
        except OSError:
            self._end()
            return
        try:
            self._take(received)
        finally:
            close_descriptors(received)

    def _take(self, received: Received) -> None:
        if received.ended:
            self._end()
        elif not received.requests and not received.descriptors:
            self._enter(_Phase.PARTIAL)
        for request in received.requests:
            if self._phase is _Phase.READING and request.command is Command.SET_DATAFD:
                self._answer(self._host.set_datafd(received.take_descriptor()))
            elif self._phase is not _Phase.OVER:
                self._queued.append(request)
                self._carry_out_queued()

    def _carry_out_queued(self) -> None:
        while self._queued and self._phase is _Phase.READING:
            self._carry_out(self._queued.popleft())

    def _carry_out(self, request: Request | Malformed) -> None:
        """Answer a request at once, or when the TPM thread has done it."""
        if isinstance(request, Init) and self._worker.spent:
            # The journal goes on saying that INIT is open, and the client waits: both are the successor's.
            self._enter(_Phase.OVER)
            self._host.on_control_spent()
            return
        outcome = self._session.handle(request)
        if outcome.cancel:
            self._worker.cancel()
        if outcome.job is None:
            self._answer(outcome.reply)
            return
        self._enter(_Phase.WORKING)
        job = outcome.job

        def run() -> None:
            reply = job()
            self._host.post(partial(self._on_done, request, reply))

        self._worker.submit(run)

    def _on_done(self, request: Request | Malformed, reply: bytes) -> None:
        if isinstance(request, Init) and self._worker.spent:
            self._host.complain("the TPM could not be powered on")
        if self._phase is _Phase.OVER:
            return
        self._enter(_Phase.READING)
        self._answer(reply)
        self._carry_out_queued()

    def _answer(self, reply: bytes) -> None:
        self._journal.locality = self._worker.locality
        try:
            self.link.reply(reply)
        except OSError:
            self._end()

    def _end(self) -> None:
        self._enter(_Phase.OVER)
        self._queued.clear()
        self.link.close()
        self._host.on_control_ended()

    def _enter(self, phase: _Phase) -> None:
        if self._phase is _Phase.READING and phase is not _Phase.READING:
            self._host.unwatch(self.link)
        elif self._phase is not _Phase.READING and phase is _Phase.READING:
            self._host.watch(self.link, self._on_readable)
        self._phase = phase
