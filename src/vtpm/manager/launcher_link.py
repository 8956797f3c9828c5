"""The manager's connection to the launcher, made again when the launcher is there again. The manager's alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vtpm.errors import UnavailableError, VtpmError
from vtpm.wire.launcher import LAUNCHER, LAUNCHER_SOCKET
from vtpm.wire.packet_socket import AsyncPacketClient

CALL_TIMEOUT_S = 10.0
RECONNECT_S = 0.5
_log = logging.getLogger("vtpm.manager")


class LauncherLink:
    """See the module.

    Args:
        run_dir: the services' run directory.
        on_event: called with the name, arguments and descriptors of each of the launcher's events.
        on_gone: called when the launcher is gone, and all instances with it.
        on_back: called when another one is there.
    """

    def __init__(
        self,
        run_dir: Path,
        on_event: Callable[[str, Any, tuple[int, ...]], None],
        on_gone: Callable[[], Awaitable[None]],
        on_back: Callable[[], Awaitable[None]],
    ) -> None:
        self._path = run_dir / LAUNCHER_SOCKET
        self._on_event = on_event
        self._on_gone = on_gone
        self._on_back = on_back
        self._client: AsyncPacketClient | None = None
        self._closing = False

    async def connect(self) -> None:
        """Connect. Raises UnavailableError: there is no launcher."""
        client = AsyncPacketClient(LAUNCHER, self._path, self._on_event)
        await client.connect(CALL_TIMEOUT_S)
        self._client = client

    async def follow(self) -> None:
        """See to the connection until `close`; to be run as a task once it is connected."""
        while self._client is not None:
            await self._client.closed
            if self._closing:
                return
            _log.error("the launcher is gone, and all instances with it; start vtpm-managerd again, or vtpm-launcher")
            self._client = None
            await self._on_gone()
            while self._client is None and not self._closing:
                try:
                    await self.connect()
                except VtpmError:
                    await asyncio.sleep(RECONNECT_S)
            if not self._closing:
                try:
                    await self._on_back()
                except VtpmError as error:
                    _log.error("what runs was not taken up: %s", error)

    async def call(self, op: str, args: object, timeout_s: float = CALL_TIMEOUT_S) -> tuple[Any, tuple[int, ...]]:
        """Have the launcher do something; returns its answer and the descriptors that came with it.

        Raises:
            UnavailableError: there is no launcher, or it does not answer.
            VtpmError: what it refuses with.
        """
        if self._client is None:
            raise UnavailableError(
                "the launcher is not running", next_step="Start vtpm-managerd again, or vtpm-launcher"
            )
        return await self._client.call(op, args, timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of it; what it holds stays."""
        self._closing = True
        if self._client is not None:
            self._client.close()
