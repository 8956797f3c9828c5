"""The raw client that all TPMs are timed with: one send, one recv, on a blocking socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 10
_RESPONSE_BYTES = 4096

Exchange = Callable[[bytes], bytes]


class RawClient:
    """A connection to a TPM's data socket. The time limit is the kernel's, so that it costs no system call."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        limit = TIMEOUT_S.to_bytes(8, "little") + bytes(8)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def exchange(self, command: bytes) -> bytes:
        """Send a command and return what one recv gives."""
        self.sock.send(command)
        return self.sock.recv(_RESPONSE_BYTES)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()


def succeed(exchange: Exchange, command: bytes) -> None:
    """Run a command that must succeed. Raises RuntimeError: the TPM said no."""
    response = exchange(command)
    if len(response) < 10 or response[6:10] != bytes(4):
        raise RuntimeError(f"command {command[6:10].hex()} was answered with {response[:10].hex()}")


def time_block(exchange: Exchange, command: Callable[[], bytes], round_trips: int) -> list[float]:
    """Return the times of a block of round trips, in seconds; every answer must be a success."""
    times = []
    clock = time.perf_counter
    for _ in range(round_trips):
        data = command()
        begin = clock()
        response = exchange(data)
        times.append(clock() - begin)
        if response[6:10] != bytes(4):
            raise RuntimeError(f"command {data[6:10].hex()} was answered with {response[:10].hex()}")
    return times
