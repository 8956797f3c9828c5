"""A link between two hosts that can be cut: a TCP relay that ends every connection after so many bytes one way."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Self

_POLL_BYTES = 4096
_WAIT_S = 10.0


class CutLink:
    """See the module. Passes everything until `cut_after` says otherwise.

    Args:
        target: address that connections are passed on to.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._left: int | None = None
        self._answers = False
        self.was_cut = False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ends the thread's accept; closing alone would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_WAIT_S)
        self._listener.close()

    def cut_after(self, count: int, *, answers: bool) -> None:
        """Pass so many bytes more, of what is answered or of what is asked, then nothing at all until `restore`."""
        with self._lock:
            self._left, self._answers, self.was_cut = count, answers, False

    def restore(self) -> None:
        """Pass everything again."""
        with self._lock:
            self._left = None

    def _serve(self) -> None:
        passing: list[threading.Thread] = []
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            thread = threading.Thread(target=self._pass_on, args=(client,))
            thread.start()
            passing.append(thread)
        for thread in passing:
            thread.join(_WAIT_S)

    def _pass_on(self, client: socket.socket) -> None:
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(self._target, _WAIT_S) as server,
            selectors.DefaultSelector() as ready,
        ):
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while events := ready.select(_WAIT_S):
                for key, _ in events:
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(_POLL_BYTES)
                    if not data or not self._may_pass(len(data), answers=key.fileobj is server):
                        return
                    key.data.sendall(data)

    def _may_pass(self, count: int, *, answers: bool) -> bool:
        with self._lock:
            if self._left is None or (answers is not self._answers and self._left >= 0):
                return True
            self._left -= count
            if self._left < 0:
                self.was_cut = True
            return self._left >= 0
