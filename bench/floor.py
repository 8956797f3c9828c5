"""What no TPM behind a socket can go under: libtpms called in this process, and a socket with nothing behind it.

`python -m bench.floor FD` is the echo server: it answers every command with a success of the size that it is told.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from bench.client import Exchange, succeed
from bench.commands import STARTUP_CLEAR
from vtpm.engine.engine import Engine, Origin
from vtpm.tpm.types import TpmVersion

_RESPONSE = bytes.fromhex("8001 0000003e 00000000") + bytes(52)


@contextlib.contextmanager
def in_process() -> Iterator[Exchange]:
    """Yield the engine's own `process`; its state goes nowhere."""
    with Engine(TpmVersion.V2_0, lambda kind, data: None) as engine:
        engine.power_on({}, origin=Origin.MANUFACTURE)
        succeed(engine.process, STARTUP_CLEAR)
        yield engine.process


@contextlib.contextmanager
def echo() -> Iterator[Exchange]:
    """Yield an exchange with a Python process that only receives and sends, over a unix stream socket."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near, far:
        process = subprocess.Popen([sys.executable, "-m", "bench.floor", str(far.fileno())], pass_fds=(far.fileno(),))
        far.close()

        def exchange(command: bytes) -> bytes:
            near.send(command)
            return near.recv(4096)

        try:
            yield exchange
        finally:
            near.close()
            process.wait(10)


def _serve(fd: int) -> None:
    with socket.socket(fileno=fd) as sock:
        while sock.recv(4096):
            sock.send(_RESPONSE)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
