"""The link journal: what a successor must know of the one request that its predecessor had taken.

A journal is a memfd that the launcher creates, and that an instance and, after its death, its successor map (decision
record 1). It holds one request and one reply at a time, for the emulator protocol is strictly request and response.
The reply leaves with sendfile(2) from the memfd: the kernel moves the file offset in the system call that moves the
bytes, so the offset says exactly how much of a reply has left, at whatever instant the sender was killed.

What a journal holds was written by an instance that may have been taken over; its successor reads it with bounds and
gives it no more meaning than the guest could give by itself. Imported by guest_link and instance.
"""

from __future__ import annotations

import enum
import mmap
import os
import select
import socket

from vtpm.wire.instance_spec import JOURNAL_BYTES

HEADER_BYTES = 64
REQUEST_AT = HEADER_BYTES
REQUEST_BYTES = 64
"""Only the head of a request is kept: enough to tell which command it was."""
REPLY_AT = 4096
REPLY_BYTES = JOURNAL_BYTES - REPLY_AT


class LinkState(enum.IntEnum):
    """How far the one request of the link has come."""

    IDLE = 0
    BUSY = 1
    REPLYING = 2


class JournaledPower(enum.IntEnum):
    """Power of the TPM as the guest knows it; kept so that a successor knows whether it must fail."""

    OFF = 0
    ON = 1


class Journal:
    """One channel's journal, mapped.

    Args:
        fd: memfd of JOURNAL_BYTES, made by `create_journal`; shared with the predecessor and the launcher.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, JOURNAL_BYTES)

    # -- what a successor reads -------------------------------------------------------------------------------------
    @property
    def state(self) -> LinkState:
        """State as last written; an unknown value counts as BUSY, which leads to an error answer at most."""
        value = self._map[0]
        return LinkState(value) if value in LinkState._value2member_map_ else LinkState.BUSY

    @property
    def request(self) -> bytes:
        """Head of the request under way, at most REQUEST_BYTES."""
        length = min(int.from_bytes(self._map[4:8], "big"), REQUEST_BYTES)
        return self._map[REQUEST_AT : REQUEST_AT + length]

    @property
    def reply_left(self) -> int:
        """Bytes of the reply that have not left yet, 0 to REPLY_BYTES."""
        total = min(int.from_bytes(self._map[8:12], "big"), REPLY_BYTES)
        sent = os.lseek(self._fd, 0, os.SEEK_CUR) - REPLY_AT
        return max(0, total - sent) if sent >= 0 else 0

    @property
    def reply_is_lost(self) -> bool:
        """Whether the reply under way was one of `reply_unkept`: nobody has the rest of it."""
        return self.state is LinkState.REPLYING and int.from_bytes(self._map[8:12], "big") > REPLY_BYTES

    # -- facts of the link that outlive the instance ----------------------------------------------------------------
    @property
    def power(self) -> JournaledPower:
        """Whether the guest was left with a TPM that is powered on."""
        return JournaledPower.OFF if self._map[1] == JournaledPower.OFF else JournaledPower.ON

    @power.setter
    def power(self, value: JournaledPower) -> None:
        self._map[1] = value

    @property
    def locality(self) -> int:
        """Locality that the control channel set last, 0 to 4."""
        return min(self._map[2], 4)

    @locality.setter
    def locality(self, value: int) -> None:
        self._map[2] = value

    # -- one turn ---------------------------------------------------------------------------------------------------
    def begin(self, request: bytes | memoryview) -> None:
        """Note that a request is about to be taken from the socket. `request` is its head, as peeked."""
        head = bytes(request[:REQUEST_BYTES])
        self._map[4:8] = len(head).to_bytes(4, "big")
        self._map[REQUEST_AT : REQUEST_AT + len(head)] = head
        self._map[0] = LinkState.BUSY

    def reply(self, sock: socket.socket, reply: bytes, timeout_s: float) -> None:
        """Send the reply and end the turn.

        Raises:
            OSError: the peer is gone, or did not take the reply in time.
            ValueError: the reply is longer than REPLY_BYTES.
        """
        if len(reply) > REPLY_BYTES:
            raise ValueError(f"a reply of {len(reply)} bytes does not fit a journal of {REPLY_BYTES}")
        self._map[8:12] = len(reply).to_bytes(4, "big")
        self._map[REPLY_AT : REPLY_AT + len(reply)] = reply
        os.lseek(self._fd, REPLY_AT, os.SEEK_SET)
        self._map[0] = LinkState.REPLYING
        self.send_rest(sock, timeout_s)

    def reply_unkept(self, sock: socket.socket, reply: bytes) -> None:
        """Send a reply that is longer than REPLY_BYTES, and end the turn. No successor can end it: `reply_is_lost`.

        Raises:
            OSError: the peer is gone, or did not take the reply within the socket's time limit.
        """
        self._map[8:12] = len(reply).to_bytes(4, "big")
        self._map[0] = LinkState.REPLYING
        sock.sendall(reply)
        self._map[0] = LinkState.IDLE

    def send_rest(self, sock: socket.socket, timeout_s: float) -> None:
        """Send what has not left of the reply, and end the turn. Raises OSError as `reply` does."""
        while left := self.reply_left:
            try:
                sent = os.sendfile(sock.fileno(), self._fd, None, left)
            except BlockingIOError:
                poller = select.poll()
                poller.register(sock, select.POLLOUT)
                if not poller.poll(timeout_s * 1000):
                    raise TimeoutError(f"the guest's side took no reply for {timeout_s} s") from None
                continue
            if sent == 0:
                raise BrokenPipeError("the guest's side took no more of the reply")
        self._map[0] = LinkState.IDLE

    def end(self) -> None:
        """End a turn that has no reply (the peer is gone)."""
        self._map[0] = LinkState.IDLE

    def reset(self) -> None:
        """Forget the link's turn and facts: its peer is gone and the next one begins anew."""
        self._map[0:REQUEST_AT] = bytes(REQUEST_AT)
