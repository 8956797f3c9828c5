"""One client of the control channel, as the relay has it: its requests, one at a time, and the replies to them.

Requests are decoded and written anew, and so are replies: what a client hears is one whole reply to what it asked,
whatever the virtual machine says. What is no request is refused here, as a vtpmd refuses it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Protocol

from vtpm.errors import ProtocolError
from vtpm.guest_link.control_link import ControlLink, Received, close_descriptors
from vtpm.guest_link.journal import Journal
from vtpm.guest_link.refusals import Client
from vtpm.relay.data_side import DataSide
from vtpm.relay.waiting import Waiting
from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import MAX_SEALED_BYTES
from vtpm.wire.emulator import (
    Command,
    GetStateBlob,
    Init,
    Malformed,
    Plain,
    Reply,
    Request,
    SetLocality,
    SetStateBlob,
    decode_reply,
    encode_reply,
    error_reply,
)
from vtpm.wire.guest_port import MAX_PIECE_BYTES, Control, DataFd

_MOST_PARTS_BYTES = MAX_SEALED_BYTES + 16


class ControlHost(Protocol):
    """What a client needs of the relay."""

    def send(self, message: Control | DataFd) -> None:
        """Send a message to the virtual machine."""
        ...

    def offer_data(self, fd: int | None) -> DataSide | int:
        """Take the descriptor of SET_DATAFD for a client of the data channel, or return the result that refuses it."""
        ...

    def attach(self, data: DataSide) -> None:
        """The vtpmd has taken the offered one: the control client is an emulator. Raises OSError: it cannot be kept."""
        ...

    def withdraw(self, data: DataSide) -> None:
        """The offered one is not taken."""
        ...


class ControlSide:
    """See the module.

    Args:
        client: its connection; closed by `close`.
        connection: its number on the guest port.
        journal: of the control channel.
        host: see ControlHost.
    """

    def __init__(self, client: Client, connection: int, journal: Journal, host: ControlHost) -> None:
        self.link = ControlLink(client.sock, journal)
        self.uid = client.uid
        self.connection = connection
        self.waiting = Waiting()
        self.over = False
        """Nothing more can be done for it; the relay closes it then."""
        self.closed = False
        """The vtpmd has said Closed."""
        self._journal = journal
        self._host = host
        self._queued: deque[Request | Malformed] = deque()
        """What it sent ahead."""
        self._asked: Request | None = None
        self._rest: SetStateBlob | None = None
        """What is still to be asked of it, when the piece before was taken."""
        self._parts = b""
        """What has come of a long reply."""
        self._offered: DataSide | None = None

    @property
    def wants_input(self) -> bool:
        """Whether to look at its connection."""
        return not (self.over or self._asked or self._queued)

    def settle(self) -> None:
        """End the turn that a predecessor left; an INIT is asked for again (decision record 1)."""
        try:
            command = self.link.unfinished()
            if command is Command.INIT:
                self._carry_out(Init(0))
            elif command is not None:
                self.link.fail_unfinished(Rc12.TPM_FAIL)
        except OSError:
            self.over = True

    def on_readable(self) -> None:
        """Take what has come, and ask the virtual machine."""
        try:
            received = self.link.receive()
        except OSError:
            self.over = True
            return
        try:
            self._take(received)
        finally:
            close_descriptors(received)

    def on_reply(self, data: bytes) -> bool:
        """Give the client its reply.

        Returns:
            False: it has asked nothing, and nothing is sent; or this is no reply to what it asked, which has failed.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            return False
        data, self._parts = self._parts + data, b""
        try:
            reply, is_reply = decode_reply(asked.command, data), True
        except ProtocolError:
            reply, is_reply = Reply(asked.command, int(Rc12.TPM_FAIL)), False
        if self._rest is not None and is_reply and reply.result == 0:
            self._ask(self._rest)
            return True
        try:
            self._follow(asked, reply.result)
        except OSError:
            self.over = True
            return is_reply
        self._answer(encode_reply(reply.command, reply.result, data=reply.data, **reply.fields))
        self._go_on()
        return is_reply

    def on_part(self, data: bytes) -> bool:
        """Keep a part of the reply to GET_STATEBLOB; False when none is due, or it is more than a reply can have."""
        is_due = isinstance(self._asked, GetStateBlob)
        if not is_due or len(self._parts) + len(data) > _MOST_PARTS_BYTES:
            return False
        self._parts += data
        return True

    def close(self) -> None:
        """Close the connection."""
        self.over = True
        if self._offered is not None:
            self._host.withdraw(self._offered)
        self.link.close()

    def _take(self, received: Received) -> None:
        if received.ended:
            self.over = True
        elif received.requests or received.descriptors:
            self.waiting.whole()
        else:
            self.waiting.half()
        for request in received.requests:
            if self.wants_input and request.command is Command.SET_DATAFD:
                self._offer(received.take_descriptor())
            else:
                self._queued.append(request)
                self._go_on()

    def _go_on(self) -> None:
        while self._queued and self._asked is None and not self.over:
            self._carry_out(self._queued.popleft())

    def _carry_out(self, request: Request | Malformed) -> None:
        if isinstance(request, Malformed):
            self._answer(request.reply)
        elif request.command is Command.SET_DATAFD:
            # Sent ahead of a reply, so that its descriptor is gone.
            self._answer(error_reply(request.command, Rc12.TPM_FAIL))
        else:
            self._ask(request)

    def _ask(self, request: Request) -> None:
        """Ask the virtual machine, piece by piece what goes over the port in no other way."""
        self._asked, self._rest, self._parts = request, None, b""
        if isinstance(request, SetStateBlob) and len(request.data) > MAX_PIECE_BYTES:
            self._rest = replace(request, data=request.data[MAX_PIECE_BYTES:])
            request = replace(request, data=request.data[:MAX_PIECE_BYTES])
        self._host.send(Control(self.connection, request))

    def _offer(self, fd: int | None) -> None:
        offered = self._host.offer_data(fd)
        if isinstance(offered, int):
            self._answer(error_reply(Command.SET_DATAFD, offered))
            return
        self._offered = offered
        self._asked = Plain(Command.SET_DATAFD)
        self._host.send(DataFd(self.connection, offered.connection))

    def _follow(self, asked: Request, result: int) -> None:
        """Keep what a successor must know of a request that was carried out."""
        offered, self._offered = self._offered, None
        if offered is not None and result == 0:
            self._host.attach(offered)
        elif offered is not None:
            self._host.withdraw(offered)
        elif isinstance(asked, SetLocality) and result == 0:
            self._journal.locality = asked.locality

    def _answer(self, reply: bytes) -> None:
        try:
            self.link.reply(reply)
        except OSError:
            self.over = True
