"""The guest link's connections inside a virtual machine: socket pairs between the pump and the vtpmd's own code.

To the vtpmd, which serves one end, each is a connection like any other. The other end is the pump's: it puts one
request in and takes one whole answer out.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable

from vtpm.errors import ProtocolError
from vtpm.guest_link.refusals import Client
from vtpm.tpm.headers import HEADER_BYTES, ResponseHeader
from vtpm.wire.emulator import Command, is_whole_reply

_RECEIVE_BYTES = 8192
_FRAME_BYTES = 4
"""Of each of the numbers around a response in the prefixed form; see tpm_stream."""

Whole = Callable[[bytes], bytes]
"""Gives the answer within what has come, once all of it has; b"" before."""


def whole_reply(command: Command) -> Whole:
    """For the reply to a control request."""
    return lambda data: data if is_whole_reply(command, data) else b""


def whole_response(*, prefixed: bool) -> Whole:
    """For the response to a TPM command."""
    before = _FRAME_BYTES if prefixed else 0

    def whole(data: bytes) -> bytes:
        if len(data) < before + HEADER_BYTES:
            return b""
        end = before + ResponseHeader.parse(data[before:]).size_bytes
        return data[before:end] if len(data) >= end + before else b""

    return whole


class HandedListener:
    """A listener whose clients are handed to it by one thread and accepted by another."""

    def __init__(self) -> None:
        self._waiting: deque[Client] = deque()
        self._count = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    def fileno(self) -> int:
        """See Listener."""
        return self._count

    def hand(self, client: Client) -> None:
        """Have a client accepted."""
        self._waiting.append(client)
        os.eventfd_write(self._count, 1)

    def accept(self) -> Client | None:
        """See Listener."""
        try:
            os.eventfd_read(self._count)
        except BlockingIOError:
            return None
        return self._waiting.popleft()


class Channel:
    """One connection, with both its ends. Used by the pump's thread.

    Args:
        connection: its number on the guest port.
    """

    def __init__(self, connection: int) -> None:
        self.connection = connection
        self.leaving = False
        """The client has gone, and the vtpmd has not let go of the connection yet."""
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ours.setblocking(False)
        self._came = b""
        self._whole: Whole | None = None

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._ours.fileno()

    def check_turn(self) -> None:
        """Raise ProtocolError if the request before has no answer yet, or the client has gone."""
        if self._whole is not None or self.leaving:
            raise ProtocolError(f"a request on connection {self.connection} before the answer to the last one")

    def put(self, request: bytes, whole: Whole, descriptor: socket.socket | None = None) -> None:
        """Put a request in.

        Args:
            request: one whole request, which the socket has room for.
            whole: how its answer ends.
            descriptor: goes with it, and is the vtpmd's alone from then on.
        Raises:
            ProtocolError: the one before has no answer yet; nothing is put in.
        """
        self.check_turn()
        self._whole = whole
        try:
            if descriptor is None:
                self._ours.sendall(request)
            else:
                with descriptor:
                    socket.send_fds(self._ours, [request], [descriptor.fileno()])
        except (BrokenPipeError, ConnectionResetError):
            # The vtpmd has just closed it, which shows when it is read.
            return

    def take(self) -> bytes | None:
        """Take what has come.

        Returns:
            The answer when it is whole, else b"". None: the vtpmd has closed the connection.
        Raises:
            ProtocolError: this is no answer; the connection is of no use any more.
        """
        try:
            data = self._ours.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            return None
        if not data:
            return None
        if self._whole is None:
            raise ProtocolError(f"an answer on connection {self.connection}, where nothing was asked")
        self._came += data
        answer = self._whole(self._came)
        if answer:
            self._came, self._whole = b"", None
        return answer

    def leave(self) -> None:
        """Say that the client has gone, and wait for the vtpmd to let go."""
        self.leaving = True
        self._ours.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the pump's end."""
        self._ours.close()
