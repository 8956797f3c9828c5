"""The port between the two ends of the bridge, under asyncio: whole messages in, messages out. For both ends."""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable

from vtpm.errors import ProtocolError
from vtpm.wire.framing import BadFrame
from vtpm.wire.launcher_port import MAX_BODY_BYTES, Direction, Message, decode_message, encode_message
from vtpm.wire.port_stream import PortStream

MAX_WAITING_BYTES = 1024 * 1024
"""Much more than two sides that read have waiting for one another: what goes past it is for one that does not."""
_log = logging.getLogger("vtpm.bridge")


class Port:
    """See the module. Callbacks come from the loop, one at a time.

    Args:
        fd: a virtio-serial port, or a stream socket; stays the caller's.
        sends: direction of what goes out; the other one comes in.
        on_message: takes what came.
        on_damage: called instead, with the reason, for what was no message.
        on_room: called when `congested` has become false again.
        on_gone: called once, when the other side is gone or reads nothing; the port is of no use any more.
    """

    def __init__(
        self,
        fd: int,
        sends: Direction,
        on_message: Callable[[Message], None],
        on_damage: Callable[[str], None],
        on_room: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._stream = PortStream(fd, MAX_BODY_BYTES)
        self._sends = sends
        (self._takes,) = set(Direction) - {sends}
        self._on_message, self._on_damage, self._on_room, self._on_gone = on_message, on_damage, on_room, on_gone
        self._loop = asyncio.get_running_loop()
        self._open = True
        # Whether it was congested since `on_room` was called last. Not asked of the stream where it is written to: what
        # is sent meanwhile may take the last of it along.
        self._was_congested = False
        self._loop.add_reader(fd, self._read)

    @property
    def congested(self) -> bool:
        """Whether nothing more should be taken on that leads to a message."""
        return self._stream.congested

    def send(self, message: Message) -> None:
        """Send a message, now or when the port takes it; to a port that is gone, nothing."""
        if not self._open:
            return
        try:
            self._stream.send(encode_message(message, self._sends))
        except OSError:
            # Told from the loop, and not in the middle of what the caller does.
            self._loop.call_soon(self._end)
            return
        if self._stream.waiting_bytes > MAX_WAITING_BYTES:
            _log.error("the other side of the port reads nothing")
            self._loop.call_soon(self._end)
        elif self._stream.want_write:
            self._was_congested |= self.congested
            self._loop.add_writer(self._stream.fileno(), self._write)

    def close(self) -> None:
        """Take and send nothing more."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._stream.fileno())
            self._loop.remove_writer(self._stream.fileno())

    def _end(self) -> None:
        if self._open:
            self.close()
            self._on_gone()

    def _read(self) -> None:
        try:
            bodies = self._stream.receive()
        except OSError:
            bodies = None
        if bodies is None:
            self._end()
            return
        for body in bodies:
            if not self._open:
                return
            self._take(body)

    def _take(self, body: bytes | BadFrame) -> None:
        try:
            if isinstance(body, BadFrame):
                raise ProtocolError(f"a frame was skipped: {body.damage.value}")
            message = decode_message(body, self._takes)
        except ProtocolError as error:
            self._on_damage(error.message)
        else:
            self._on_message(message)

    def _write(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._end()
            return
        if not self._stream.want_write:
            self._loop.remove_writer(self._stream.fileno())
        if self._was_congested and not self.congested:
            self._was_congested = False
            self._on_room()


async def connected(fd: int) -> None:
    """Wait until the host's end of a virtio-serial port is open; at once for a socket.

    Source: Linux drivers/char/virtio_console.c, port_fops_poll.
    """
    loop = asyncio.get_running_loop()
    with select.epoll() as edges:
        # Edge-triggered: a port that is hung up says so all the time, and once more when that changes.
        edges.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        said = False
        while all(event & select.EPOLLHUP for _, event in edges.poll(0)):
            if not said:
                _log.warning("the host's end of the port is not open")
            said = True
            changed: asyncio.Future[None] = loop.create_future()
            loop.add_reader(edges.fileno(), _set, changed)
            try:
                await changed
            finally:
                loop.remove_reader(edges.fileno())


def _set(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)
