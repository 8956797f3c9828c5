"""One client of the data channel, as the relay has it: its TPM commands, one at a time, and the responses to them.

Where a command ends is all that is known of it here. What cannot be followed is refused here, as a vtpmd refuses it,
and never reaches the virtual machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from vtpm.guest_link.data_link import DataLink
from vtpm.guest_link.unpowered import Refusal, refuse
from vtpm.relay.waiting import Waiting
from vtpm.tpm.types import TpmVersion
from vtpm.wire.guest_port import TpmRequest
from vtpm.wire.tpm_stream import BadCommand, BadReason, TpmCommand


class DataSide:
    """See the module.

    Args:
        link: its connection; closed by `close`.
        connection: its number on the guest port.
        version: of the TPM.
        send: takes what goes to the virtual machine.
    """

    def __init__(
        self, link: DataLink, connection: int, version: TpmVersion, send: Callable[[TpmRequest], None]
    ) -> None:
        self.link = link
        self.connection = connection
        self.waiting = Waiting()
        self.over = False
        """Nothing more can be done for it; the relay closes it then."""
        self.closed = False
        """The vtpmd has said Closed."""
        self._version = version
        self._send = send
        self._queued: deque[TpmCommand | BadCommand] = deque()
        """What it sent ahead."""
        self._asked: TpmCommand | None = None

    @property
    def wants_input(self) -> bool:
        """Whether to look at its connection."""
        return not (self.over or self._asked or self._queued)

    def on_readable(self, refusal: Refusal | None = None) -> None:
        """Take what has come, and ask the virtual machine, or refuse it all here."""
        try:
            self._queued += self.link.receive()
        except OSError:
            self.over = True
            return
        if self.link.waits_for_rest:
            self.waiting.half()
            return
        self.waiting.whole()
        if refusal is None:
            self._go_on()
            return
        while self._queued:
            self._answer(self._queued.popleft(), refuse(self._version, refusal))

    def on_response(self, response: bytes) -> bool:
        """Give the client its response, which is whole; False, and nothing is sent, when it has asked nothing."""
        asked, self._asked = self._asked, None
        if asked is None:
            return False
        self._answer(asked, response)
        self._go_on()
        return True

    def close(self) -> None:
        """Close the connection."""
        self.over = True
        self.link.close()

    def _go_on(self) -> None:
        while self._queued and self._asked is None:
            command = self._queued.popleft()
            if isinstance(command, BadCommand):
                bad_locality = command.reason is BadReason.LOCALITY
                refusal = Refusal.BAD_LOCALITY if bad_locality else Refusal.BAD_SIZE
                self._answer(command, refuse(self._version, refusal))
            else:
                self._asked = command
                self._send(TpmRequest(self.connection, command.locality, command.data))
        if not self.link.alive and self._asked is None:
            self.over = True

    def _answer(self, command: TpmCommand | BadCommand, response: bytes) -> None:
        if self.over:
            return
        try:
            self.link.respond(response, command)
        except OSError:
            self.over = True
