"""The manager links of one session on one side of the port: sockets here, numbered streams there. For both ends.

What waits is bounded for each link, and one that its reader leaves alone holds up no other: either side sends
WINDOW_BYTES on a link, and more only as the other side says that it has handed on what came.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from vtpm.errors import ProtocolError
from vtpm.wire.launcher_port import CHUNK_BYTES, WINDOW_BYTES, Close, Data, Message, Taken

MAX_LINKS = 4096
"""Bound on the links that are open at once; twice what a launcher's instances make, and some."""
_TELL_BYTES = WINDOW_BYTES // 4
"""How much is taken before the other side is told."""


class Links:
    """See the module.

    Args:
        send: sends a message to the other side.
        congested: whether the port has enough to send; see `resume`.
    """

    def __init__(self, send: Callable[[Message], None], congested: Callable[[], bool]) -> None:
        self._send = send
        self._congested = congested
        self._links: dict[int, _Link] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._links)

    @property
    def following(self) -> int:
        """Number of the link that is opened next."""
        return self._last + 1

    def open(self, end: socket.socket) -> None:
        """Open the next link, whose end on this side is this socket and the link's from now on.

        Raises:
            ProtocolError: too many are open; the socket is closed.
        """
        if len(self._links) >= MAX_LINKS:
            end.close()
            raise ProtocolError(f"{MAX_LINKS} manager links are open, which is the most")
        self._last += 1
        number = self._last
        self._links[number] = _Link(
            number,
            end,
            self._send,
            self._congested,
            on_read=lambda: self._put_last(number),
            on_closed=lambda: self._links.pop(number),
        )

    def skip(self, count: int) -> None:
        """Say of the next links that they are closed: nobody takes them."""
        for _ in range(count):
            self._last += 1
            self._send(Close(self._last))

    def follow(self, message: Data | Taken | Close) -> None:
        """Follow a message about a link. Raises ProtocolError: it was never opened, or more came than was to."""
        link = self._links.get(message.link)
        if link is not None:
            link.follow(message)
        elif message.link > self._last:
            raise ProtocolError(f"the link {message.link} was never opened")

    def resume(self) -> None:
        """Go on reading: the port is congested no more. Whose turn was longest ago comes first.

        Else some that send without end would fill the port again before the others are looked at, each time.
        """
        for link in tuple(self._links.values()):
            link.look()

    def _put_last(self, number: int) -> None:
        self._links[number] = self._links.pop(number)

    def close(self) -> None:
        """Close all, and say nothing: the session is over."""
        while self._links:
            self._links.popitem()[1].close()


class _Link:
    """One link. `on_read` is called when it has had its turn, `on_closed` when nothing of it is left on this side."""

    def __init__(
        self,
        number: int,
        end: socket.socket,
        send: Callable[[Message], None],
        congested: Callable[[], bool],
        *,
        on_read: Callable[[], object],
        on_closed: Callable[[], object],
    ) -> None:
        end.setblocking(False)
        self._number = number
        self._end = end
        self._send = send
        self._congested = congested
        self._on_read = on_read
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._may_send = WINDOW_BYTES
        self._may_come = WINDOW_BYTES
        self._untold = 0
        self._out = bytearray()
        self._ending = False
        self.look()

    def look(self) -> None:
        """Read on, or not for now."""
        if self._may_send and not self._ending and not self._congested():
            self._loop.add_reader(self._end, self._read)
        else:
            self._loop.remove_reader(self._end)

    def follow(self, message: Data | Taken | Close) -> None:
        """See Links."""
        match message:
            case Data(data=data):
                if len(data) > self._may_come:
                    raise ProtocolError(f"more came on the link {self._number} than was to")
                self._may_come -= len(data)
                self._out += data
                self._write()
            case Taken(count=count):
                if self._may_send + count > WINDOW_BYTES:
                    raise ProtocolError(f"more was taken on the link {self._number} than was sent")
                self._may_send += count
                self.look()
            case Close():
                # What came before is handed on first.
                self._ending = True
                self.look()
                self._write()

    def close(self) -> None:
        """Let go of the socket."""
        self._loop.remove_reader(self._end)
        self._loop.remove_writer(self._end)
        self._end.close()

    def _end_here(self) -> None:
        self.close()
        self._on_closed()
        if not self._ending:
            self._send(Close(self._number))

    def _read(self) -> None:
        if self._congested():
            self.look()
            return
        try:
            data = self._end.recv(min(CHUNK_BYTES, self._may_send))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end_here()
            return
        self._may_send -= len(data)
        self._on_read()
        self._send(Data(self._number, data))
        self.look()

    def _write(self) -> None:
        try:
            while self._out:
                sent = self._end.send(self._out)
                del self._out[:sent]
                self._taken(sent)
        except BlockingIOError:
            self._loop.add_writer(self._end, self._write)
            return
        except OSError:
            # Its peer has closed it; what that wrote last is still to be read, and then the end shows.
            self._taken(len(self._out))
            self._out.clear()
        self._loop.remove_writer(self._end)
        if self._ending:
            self._end_here()

    def _taken(self, count: int) -> None:
        self._may_come += count
        self._untold += count
        if self._untold >= _TELL_BYTES and not self._ending:
            self._send(Taken(self._number, self._untold))
            self._untold = 0
