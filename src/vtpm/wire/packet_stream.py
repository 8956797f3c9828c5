"""Packets and descriptors on SOCK_SEQPACKET sockets, blocking and under asyncio: what packet_socket is made of."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import AccessDeniedError, ProtocolError, UnavailableError
from vtpm.wire.service import MAX_PACKET_BYTES, Interface

MAX_FDS = 8
"""Bound on the descriptors beside one packet. Even, so that the ancillary buffer has no room for one more."""

MAX_QUEUED_PACKETS = 256
"""Bound on packets that wait for a peer to read; one that reads nothing is cut off."""

_UCRED = struct.Struct("iII")


@dataclass(frozen=True)
class Peer:
    """Who connected, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end of a unix socket."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)


def send_packet(connection: socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    """Send one packet with duplicates of descriptors; raises OSError as the socket does."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    connection.sendmsg([packet], ancillary)


def check_fds(fds: Sequence[int]) -> None:
    """Refuse more descriptors than a packet carries.

    Raises:
        ProtocolError: more than MAX_FDS.
    """
    if len(fds) > MAX_FDS:
        raise ProtocolError(f"{len(fds)} descriptors are too many for a message, {MAX_FDS} are allowed")


def receive_packet(connection: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """Return the next packet and its descriptors, close-on-exec; no bytes at the end.

    Raises:
        ProtocolError: it, or the number of its descriptors, is too large; none of them stays open.
        OSError: as the socket does.
    """
    packet, ancillary, flags, _ = connection.recvmsg(
        MAX_PACKET_BYTES, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not packet:
        close_fds(fds)
        fds.clear()
    if flags & socket.MSG_TRUNC:
        raise ProtocolError(f"a message is larger than {MAX_PACKET_BYTES} bytes")
    if flags & socket.MSG_CTRUNC:
        raise ProtocolError(f"a message has more than {MAX_FDS} descriptors, or more than this process can open")
    return packet, tuple(fds)


def connect_service(interface: Interface, path: Path, timeout_s: float) -> socket.socket:
    """Return a connected blocking socket, or raise what a user can act on."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # A unix socket with a full backlog answers EAGAIN to a non-blocking connect and never says when to try again;
        # a blocking one waits, as long as its send limit.
        seconds, fraction = divmod(max(timeout_s, 0.001), 1.0)
        limit = struct.pack("@ll", int(seconds), int(fraction * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.connect(os.fspath(path))
    except PermissionError:
        connection.close()
        raise AccessDeniedError(f"{interface.name} at {path} may not be used by uid {os.geteuid()}") from None
    except OSError as error:
        connection.close()
        raise unavailable(interface, f"does not answer at {path}: {error.strerror or error}") from error
    return connection


def unavailable(interface: Interface, what: str) -> UnavailableError:
    """Return the error that says what a service did not do."""
    return UnavailableError(f"{interface.name} {what}", next_step=f"See the log of {interface.name}")


def is_alive(connection: socket.socket) -> bool:
    """Say whether the peer is still there; packets that wait do not hide its end."""
    poller = select.poll()
    poller.register(connection, 0)
    return not poller.poll(0)


class PacketStream:
    """One connection under asyncio: whole packets in, a bounded queue of packets out.

    Args:
        connection: connected; the stream's from now on.
        on_packet: takes each packet and its descriptors, which are then its own.
        on_end: called once, with the reason, when the connection is closed from either side.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_packet: Callable[[bytes, tuple[int, ...]], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._on_packet = on_packet
        self._on_end = on_end
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop = asyncio.get_running_loop()
        self.is_open = True
        connection.setblocking(False)
        self.resume()

    def pause(self) -> None:
        """Take no further packet for now; the peer waits in its send."""
        if self.is_open:
            self._loop.remove_reader(self._connection)

    def resume(self) -> None:
        """Take packets (again)."""
        if self.is_open:
            self._loop.add_reader(self._connection, self._read)

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send a packet with duplicates of descriptors, now or when the peer reads; to a closed stream, nothing.

        Raises:
            ProtocolError: too many descriptors.
        """
        check_fds(fds)
        if not self.is_open or (not self._queue and self._sent(packet, fds)) or not self.is_open:
            return
        if len(self._queue) >= MAX_QUEUED_PACKETS:
            self.close("it does not read what it is sent")
            return
        kept: list[int] = []
        try:
            kept.extend(map(os.dup, fds))
        except OSError as error:
            # Out of descriptors. Without these the packet would be another one, and leaving it out would go unseen.
            close_fds(kept)
            self.close(f"a packet cannot be kept for it: {error.strerror}")
            return
        self._queue.append((packet, tuple(kept)))
        self._loop.add_writer(self._connection, self._write)

    def close(self, reason: str) -> None:
        """Close the connection; what is queued is not sent."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        while self._queue:
            close_fds(self._queue.popleft()[1])
        self._on_end(reason)

    def _read(self) -> None:
        try:
            packet, fds = receive_packet(self._connection)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or str(error))
        except ProtocolError as error:
            self.close(error.message)
        else:
            if packet:
                self._on_packet(packet, fds)
            else:
                self.close("the other side closed it")

    def _sent(self, packet: bytes, fds: Sequence[int]) -> bool:
        try:
            send_packet(self._connection, packet, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(error.strerror or str(error))
            return False
        return True

    def _write(self) -> None:
        while self._queue and self._sent(*self._queue[0]):
            close_fds(self._queue.popleft()[1])
        if self.is_open and not self._queue:
            self._loop.remove_writer(self._connection)
