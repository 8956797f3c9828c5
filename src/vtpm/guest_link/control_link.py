"""The control channel: QEMU's emulator protocol over a connected stream socket, one request and one reply at a time.

Turns are journaled so that a successor can end one that its predecessor had begun (decision record 1). Each reply is
one write, since some clients (cloud-hypervisor) take it in one read. Used by the main thread alone.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vtpm.guest_link.journal import REPLY_BYTES, Journal, LinkState
from vtpm.wire.emulator import Command, ControlDecoder, Malformed, Request, command_of, error_reply

_RECEIVE_BYTES = 65536
_HEAD_BYTES = 64
_MAX_DESCRIPTORS = 4
_REPLY_TIMEOUT_S = 1.0
_PADDING_BYTES = 3
PARTIAL_RETRY_S = 0.005
"""How soon to look again for the rest of a request. Clients write a request at once, so this is rare."""
PARTIAL_TIMEOUT_S = 1.0
"""A client that takes longer for the rest is dropped."""


@dataclass
class Received:
    """What one read gave: requests, and the descriptors that came with them (SET_DATAFD)."""

    requests: Sequence[Request | Malformed]
    descriptors: list[int] = field(default_factory=list)
    ended: bool = False

    def take_descriptor(self) -> int | None:
        """Return the one descriptor and leave none; None if there was not exactly one (all are closed then)."""
        taken, self.descriptors = self.descriptors, []
        if len(taken) == 1:
            return taken[0]
        for fd in taken:
            os.close(fd)
        return None


class ControlLink:
    """One control connection.

    Args:
        sock: connected; closed by `close`.
        journal: of this channel; perhaps a predecessor's.
    """

    def __init__(self, sock: socket.socket, journal: Journal) -> None:
        sock.settimeout(_REPLY_TIMEOUT_S)
        self._sock = sock
        self._journal = journal
        self._decoder = ControlDecoder(after=command_of(journal.request))
        self._head = b""
        """First bytes of a request of which a part has been taken."""
        self._is_long = False
        """Part of a request has been taken; the rest is taken as it comes."""
        self._partial_since_s: float | None = None

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._sock.fileno()

    @property
    def socket(self) -> socket.socket:
        """The connection, to park it or to ask for its peer."""
        return self._sock

    def unfinished(self) -> Command | None:
        """End the turn that a predecessor left, as far as this can be done without knowing more.

        Returns:
            The command of a request that the predecessor took and did not answer; the caller carries it out or fails
            it. None when there is none.
        Raises:
            OSError: the peer is gone.
        """
        if self._journal.reply_is_lost:
            raise BrokenPipeError("a predecessor died within a reply that is too long to keep")
        if self._journal.state is LinkState.REPLYING:
            self._journal.send_rest(self._sock, _REPLY_TIMEOUT_S)
        elif self._journal.state is LinkState.BUSY:
            if _readable(self._sock):
                # The client never sends ahead: the request was not taken yet, and is read like any other.
                self._journal.end()
                return None
            command = command_of(self._journal.request)
            if command is None:
                self._journal.end()
            return command
        return None

    def receive(self) -> Received:
        """Take what has come, once it is a whole request. To be called when readable.

        Half a request stays in the socket, where a successor finds it with its other half, and the journal says nothing
        of it: BUSY stands for a whole request alone. Then there are no requests, and the end has not come either; the
        socket stays readable, so call again after PARTIAL_RETRY_S. The longest requests, of more than
        _RECEIVE_BYTES, are taken as they come.

        Raises:
            OSError: the connection broke.
        """
        waiting = self._sock.recv(_RECEIVE_BYTES, socket.MSG_PEEK)
        is_short = len(waiting) < _RECEIVE_BYTES and not self._is_long
        if waiting and is_short and not self._decoder.completes(waiting):
            return Received((), ended=self._given_up(waiting))
        self._partial_since_s = None
        self._head += waiting[: _HEAD_BYTES - len(self._head)]
        self._journal.begin(self._head)
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        # No more than was looked at: what has come since is not in the journal.
        data, ancillary, _, _ = self._sock.recvmsg(max(1, len(waiting)), room, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        if not data:
            self._journal.end()
            return Received((), list(descriptors), ended=True)
        requests = self._decoder.feed(data)
        # Its sender may be woken only when all of what it has sent is taken.
        self._is_long = not requests
        if requests:
            self._head = b""
        return Received(requests, list(descriptors))

    def _given_up(self, waiting: bytes) -> bool:
        """Whether the rest of a request that is half there will not come: its client is gone, or takes too long."""
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        if poller.poll(0):
            return True
        if len(waiting) <= _PADDING_BYTES and not any(waiting):
            # Perhaps padding of the request before, which may wait for the next one as long as it likes.
            return False
        now_s = time.monotonic()
        if self._partial_since_s is None:
            self._partial_since_s = now_s
        return now_s - self._partial_since_s > PARTIAL_TIMEOUT_S

    def reply(self, reply: bytes) -> None:
        """Answer the request and end the turn. Raises OSError: the peer is gone or does not read."""
        if len(reply) > REPLY_BYTES:
            self._journal.reply_unkept(self._sock, reply)
        else:
            self._journal.reply(self._sock, reply, _REPLY_TIMEOUT_S)
        self._decoder.replied()

    def fail_unfinished(self, result: int) -> None:
        """Answer a predecessor's request with an error. Raises OSError."""
        self.reply(error_reply(self._journal.request, result))

    def close(self) -> None:
        """Close this side and forget the turn."""
        self._journal.end()
        self._sock.close()


def close_descriptors(received: Received) -> None:
    """Close the descriptors that nobody has taken."""
    for fd in received.descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
    received.descriptors = []


def _readable(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return any(event & select.POLLIN for _, event in poller.poll(0))
