"""A hardware TPM whose NV takes its time: Debian's swtpm behind a relay that holds each answer to a write."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.swtpm import SwtpmPlatform, booted_platform

WRITE_S = 0.05
_NV_INCREMENT, _NV_WRITE = 0x134, 0x137
_READ_BYTES = 65536


class SlowPlatform(SwtpmPlatform):
    """What hosts are told of it: the relay's socket.

    Args:
        behind: the TPM.
    """

    def __init__(self, behind: SwtpmPlatform) -> None:
        super().__init__(behind.socket_path.parent)
        self._behind = behind
        self.socket_path = behind.socket_path.with_name("slow")


@contextlib.contextmanager
def slow_platform() -> Iterator[SwtpmPlatform]:
    """Yield one that takes WRITE_S for each NV write, and is as fast as swtpm else."""
    with booted_platform() as behind, contextlib.ExitStack() as relays:
        slow = SlowPlatform(behind)
        for suffix in ("", ".ctrl"):
            listener = relays.enter_context(_listening(Path(f"{slow.socket_path}{suffix}")))
            thread = threading.Thread(target=_serve, args=(listener, f"{behind.socket_path}{suffix}"))
            thread.start()
            relays.callback(thread.join)
            # Ends the thread's accept; closing alone would not.
            relays.callback(listener.shutdown, socket.SHUT_RDWR)
        yield slow


def _listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(path))
    path.chmod(0o666)
    listener.listen(8)
    return listener


def _serve(listener: socket.socket, path: str) -> None:
    passing = []
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            break
        thread = threading.Thread(target=_pass_on, args=(client, path), daemon=True)
        thread.start()
        passing.append(thread)


def _pass_on(client: socket.socket, path: str) -> None:
    with (
        client,
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        selectors.DefaultSelector() as ready,
    ):
        server.connect(path)
        ready.register(client, selectors.EVENT_READ, server)
        ready.register(server, selectors.EVENT_READ, client)
        slow = False
        while True:
            for key, _ in ready.select():
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(_READ_BYTES)
                if not data:
                    return
                if key.fileobj is client:
                    slow = int.from_bytes(data[6:10]) in (_NV_WRITE, _NV_INCREMENT)
                elif slow:
                    time.sleep(WRITE_S)
                key.data.sendall(data)
