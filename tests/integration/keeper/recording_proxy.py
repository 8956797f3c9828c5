"""An eavesdropper on the bus: forwards both sockets of a swtpm and keeps every byte that crosses."""

from __future__ import annotations

import os
import select
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_SELECT_TIMEOUT_S = 10.0


class RecordingProxy:
    """Serves `path` and `path`.ctrl, forwarding to a TPM's sockets.

    Args:
        path: of the proxy's data socket.
        target: of the TPM's data socket.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.tcti = f"swtpm:path={path}"
        self.recorded = bytearray()
        self.forged: tuple[bytes, bytes] | None = None
        """What is replaced in the TPM's answers, by what of the same length: then this is no mere listener."""
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        for suffix in ("", ".ctrl"):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"{path}{suffix}")
            listener.listen(4)
            self._listeners[listener.fileno()] = (listener, f"{target}{suffix}")
        self._wake, self._woken = os.pipe()
        self._accepting = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._woken)
        for thread in (self._accepting, *self._threads):
            thread.join(_SELECT_TIMEOUT_S)
            assert not thread.is_alive()
        os.close(self._wake)
        for listener, _ in self._listeners.values():
            listener.close()

    def _accept(self) -> None:
        while True:
            readable, _, _ = select.select([self._wake, *self._listeners], [], [])
            if self._wake in readable:
                return
            for fd in readable:
                listener, target = self._listeners[fd]
                client, _ = listener.accept()
                thread = threading.Thread(target=self._forward, args=(client, target))
                self._threads.append(thread)
                thread.start()

    def _forward(self, client: socket.socket, target: str) -> None:
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tpm:
            tpm.connect(target)
            while True:
                readable, _, _ = select.select([client, tpm, self._wake], [], [])
                for source, sink in ((client, tpm), (tpm, client)):
                    if source in readable:
                        data = source.recv(65536)
                        if not data:
                            return
                        with self._lock:
                            self.recorded += data
                        if source is tpm and self.forged is not None:
                            data = data.replace(*self.forged)
                        sink.sendall(data)
                if self._wake in readable:
                    return
