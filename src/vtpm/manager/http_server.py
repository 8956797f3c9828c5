"""uvicorn on the manager's unix socket, knowing each caller by SO_PEERCRED. The manager's alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Generator
from typing import ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_UCRED = struct.Struct("iII")
_MAX_HEADER_BYTES = 16 * 1024
_MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_UID = 64
MAX_USERS_CONNECTIONS = 384
"""Of all ordinary users together; the rest is root's."""
_IDLE_S = 30
REQUEST_S = 10
"""How long a request may take to come whole."""


class PeerProtocol(H11Protocol):
    """HTTP/1.1 whose `client` in the ASGI scope is ("uid:gid", pid) of the connected process.

    An ordinary user has a bounded number of connections, so that none of them keeps the others, or root, out.
    """

    connections_by_uid: ClassVar[Counter[int]] = Counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note who connected, as the kernel says."""
        super().connection_made(transport)
        peer: socket.socket = transport.get_extra_info("socket")
        pid, uid, gid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        self.client = (f"{uid}:{gid}", pid)
        self._counted_uid = uid
        self.connections_by_uid[uid] += 1
        users = self.connections_by_uid.total() - self.connections_by_uid[0]
        if uid != 0 and (self.connections_by_uid[uid] > MAX_CONNECTIONS_PER_UID or users > MAX_USERS_CONNECTIONS):
            transport.close()
        self._was_incomplete = False
        self._look = self.loop.call_later(REQUEST_S / 2, self._look_for_request)

    def _look_for_request(self) -> None:
        """Hang up on a client whose request has been incomplete at two looks."""
        cycle = self.cycle
        unread, _ = self.conn.trailing_data
        incomplete = cycle is None or bool(unread) or (cycle.more_body and not cycle.response_complete)
        if incomplete and self._was_incomplete:
            self.transport.close()
            return
        self._was_incomplete = incomplete
        self._look = self.loop.call_later(REQUEST_S / 2, self._look_for_request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection no more."""
        super().connection_lost(exc)
        self._look.cancel()
        self.connections_by_uid[self._counted_uid] -= 1


class ApiServer(uvicorn.Server):
    """Serves an application; signals are the caller's to handle."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PeerProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=5,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone."""
        yield
