"""Frames over a descriptor that never blocks: a stream socket, or a virtio-serial port in a virtual machine.

A port is a character device: it knows neither MSG_PEEK nor sendmsg, takes 32 KiB in one write at most, and when the
host's end is closed it is at its end, as a socket whose peer has gone. For both ends of the guest port; used by one
thread.
"""

from __future__ import annotations

import os

from vtpm.wire.framing import BadFrame, Deframer, encode_frame

CONGESTED_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024


class PortStream:
    """See the module. What is sent is kept until the other side takes it: look at `congested` before taking more in.

    Args:
        fd: made non-blocking; stays the caller's.
        max_body_bytes: bound on one body that comes.
    """

    def __init__(self, fd: int, max_body_bytes: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._deframer = Deframer(max_body_bytes)
        self._out = bytearray()

    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._fd

    @property
    def want_write(self) -> bool:
        """Whether bytes wait for the descriptor to take them."""
        return bool(self._out)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait for the descriptor to take them."""
        return len(self._out)

    @property
    def congested(self) -> bool:
        """Whether so much waits that nothing more should be taken on that leads to a message."""
        return len(self._out) > CONGESTED_BYTES

    def send(self, body: bytes) -> None:
        """Send a body after those that wait, now or when `flush` can. Raises OSError: the other side is gone."""
        self._out += encode_frame(body)
        self.flush()

    def flush(self) -> None:
        """Send what the descriptor takes. Raises OSError: the other side is gone."""
        while self._out:
            try:
                written = os.write(self._fd, self._out)
            except BlockingIOError:
                return
            del self._out[:written]

    def receive(self) -> list[bytes | BadFrame] | None:
        """Take what has come; None when the other side is gone. Raises OSError: likewise."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        return self._deframer.feed(data) if data else None
