"""The data channel: TPM commands in, responses out, over a connected stream socket.

Two kinds: the plain one that `swtpm:path=` clients connect to, and the one that QEMU hands over with SET_DATAFD, whose
turns are journaled so that a successor neither loses nor doubles an answer (decision record 1). Used by one thread.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

from vtpm.guest_link.journal import Journal, LinkState
from vtpm.tpm.headers import MAX_COMMAND_BYTES
from vtpm.wire.tpm_stream import BadCommand, CommandFramer, TpmCommand, frame_response

_RECEIVE_BYTES = MAX_COMMAND_BYTES + 64
_REPLY_TIMEOUT_S = 5.0


class DataLink:
    """A plain data connection: whoever speaks TPM commands over a unix socket.

    Args:
        sock: connected; closed by `close`.
    """

    def __init__(self, sock: socket.socket) -> None:
        # Non-blocking, and waited for here: with a time limit of Python's own, each recv and send costs a poll more.
        sock.setblocking(False)
        self._sock = sock
        self._framer = CommandFramer(MAX_COMMAND_BYTES)
        self.alive = True
        """False once the peer has gone or has sent what cannot be followed; then close it."""
        self.waits_for_rest = False
        """Half a command was left in the socket, which stays readable: wait for a change, not for what is there."""

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._sock.fileno()

    @property
    def between_commands(self) -> bool:
        """Whether its plain commands may be taken from the descriptor itself, for nothing of one is here."""
        return not self._framer.buffered_bytes

    def receive(self) -> Sequence[TpmCommand | BadCommand]:
        """Take what has come and return whole commands. To be called when readable.

        After a BadCommand there is no telling where the next command begins: `alive` is then False.

        Returns:
            Nothing, too, when nothing has come after all.
        Raises:
            OSError: the connection broke.
        """
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return ()
        return self.take(data)

    def take(self, data: bytes) -> Sequence[TpmCommand | BadCommand]:
        """As `receive`, with what somebody else has read from the descriptor; empty at the end of the stream."""
        if not data:
            self.alive = False
            return ()
        items = self._framer.feed(data)
        if items and isinstance(items[-1], BadCommand):
            self.alive = False
        return items

    def respond(self, response: bytes, to: TpmCommand | BadCommand) -> None:
        """Send the response to one command. Raises OSError: the peer is gone or does not read."""
        self.send(frame_response(response, prefixed=True) if to.prefixed else response)

    def send(self, reply: bytes) -> None:
        """Send a framed response, or the rest of one. Raises OSError: the peer is gone or does not read."""
        self._send(reply)

    def _send(self, reply: bytes) -> None:
        try:
            sent = self._sock.send(reply)
        except BlockingIOError:
            sent = 0
        if sent < len(reply):
            # For this alone the time limit; it bounds the whole rest, as sendall does.
            self._sock.settimeout(_REPLY_TIMEOUT_S)
            self._sock.sendall(memoryview(reply)[sent:])
            self._sock.setblocking(False)

    def peer_gone(self) -> bool:
        """Whether the peer has hung up. May be asked from any thread."""
        poller = select.poll()
        try:
            poller.register(self._sock, select.POLLHUP)
        except ValueError:
            # The TPM thread has closed it between the caller's look at it and this one.
            return True
        return bool(poller.poll(0))

    def close(self) -> None:
        """Close this side."""
        self.alive = False
        self._sock.close()


class EmulatorDataLink(DataLink):
    """QEMU's data connection.

    Args:
        sock: the descriptor of SET_DATAFD, or the parked one.
        journal: of this channel; perhaps a predecessor's.
    """

    def __init__(self, sock: socket.socket, journal: Journal) -> None:
        super().__init__(sock)
        self._journal = journal

    @property
    def between_commands(self) -> bool:
        """Never: each turn must be in the journal before it is taken."""
        return False

    def settle(self, failure: bytes) -> None:
        """End the turn that a predecessor left: the rest of its reply, or `failure` for a request it had taken.

        Raises:
            OSError: QEMU is gone.
        """
        if self._journal.state is LinkState.REPLYING:
            self._journal.send_rest(self._sock, _REPLY_TIMEOUT_S)
        elif self._journal.state is LinkState.BUSY:
            # QEMU never sends ahead: what can still be read was not taken, and is served like any command.
            if _polled(self._sock, select.POLLIN):
                self._journal.end()
            else:
                self._send(failure)

    def receive(self) -> Sequence[TpmCommand | BadCommand]:
        """As DataLink.receive, noted in the journal before the request leaves the socket.

        Half a command stays in the socket, where a successor finds it with its other half, and the journal says nothing
        of it: BUSY stands for a whole one alone. `waits_for_rest` is then True.
        """
        self.waits_for_rest = False
        try:
            waiting = self._sock.recv(_RECEIVE_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return ()
        framer = CommandFramer(MAX_COMMAND_BYTES)
        items = framer.feed(waiting)
        if items:
            self._journal.begin(b"")
            self._sock.recv(len(waiting) - framer.buffered_bytes)
            self.alive = not isinstance(items[-1], BadCommand)
        else:
            self.alive = bool(waiting) and not _polled(self._sock, select.POLLRDHUP)
            self.waits_for_rest = self.alive
        return items

    def _send(self, reply: bytes) -> None:
        self._journal.reply(self._sock, reply, _REPLY_TIMEOUT_S)


def _polled(sock: socket.socket, event: int) -> bool:
    poller = select.poll()
    poller.register(sock, event)
    return any(events & event for _, events in poller.poll(0))
