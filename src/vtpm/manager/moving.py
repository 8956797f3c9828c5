"""All of the manager that moves vTPMs between hosts, put together. Slow to load; the manager's alone."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from functools import partial
from typing import Any

from vtpm.config import Config
from vtpm.manager.attester import PlatformAttester
from vtpm.manager.conversations import Conversations
from vtpm.manager.enrolment import EnrolmentService
from vtpm.manager.ground import HostGround
from vtpm.manager.guest_moves import GuestMoves
from vtpm.manager.measured import services_of_boot
from vtpm.manager.migrations import MigrationService
from vtpm.manager.peering import Peering
from vtpm.manager.service import ManagerService
from vtpm.manager.services import Layout
from vtpm.migration.mover import Mover
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper_client import KeeperClient

KEEPER_TIMEOUT_S = 60.0
"""Of a quote or key that a move asks for: a hardware TPM takes its time, and others are before it."""
THREADS = 4
"""How many vTPMs' moves may be waited for at once."""
_log = logging.getLogger("vtpm.manager")


class Moving:
    """See the module. Made in the manager's loop.

    Args:
        listener: where peers come; None: nobody is let in.
    """

    def __init__(self, config: Config, layout: Layout, vtpms: ManagerService, listener: socket.socket | None) -> None:
        keeper = KeeperClient(config.run_dir, timeout_s=KEEPER_TIMEOUT_S)
        # A connection of its own: a vTPM's key is not to wait for peers' quotes.
        keys = KeeperClient(config.run_dir, timeout_s=KEEPER_TIMEOUT_S)
        ground = HostGround(asyncio.get_running_loop(), vtpms.door, keys, vtpms.launcher)
        attester = PlatformAttester(
            keeper, layout.platform_dir, partial(services_of_boot, config), config.platform_policy, config.authorities
        )
        self.peering = Peering(layout.peers_dir, KeeperClient(config.run_dir), vtpms.audit.append)
        talk = Conversations(
            Mover(ground, attester), CallThreads("mover", THREADS), CallThreads("guest-mover", THREADS)
        )
        self._guests = GuestMoves(vtpms, talk, self.peering)
        ground.waiting = self._guests.arrivals
        vtpms.live_moves = self._guests
        vtpms.images.waiting = self._guests.arrivals.images
        self.migrations = MigrationService(vtpms, talk, self._guests, self.peering, config.migration_retry_s)
        self.enrolment = EnrolmentService(
            layout.platform_dir,
            keeper,
            CallThreads("enrolment", 1),
            vtpms.audit.append,
            attester,
            vtpms.images.launchable,
        )
        self._listener = listener
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Follow up what is not decided, and let peers in."""
        self._begin(self._follow())
        if self._listener is not None:
            self._begin(self.peering.serve(self._listener, self.migrations))

    async def _follow(self) -> None:
        await self._guests.take_up()
        await self.migrations.follow()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def end(self) -> None:
        """Let go of everything."""
        self._guests.close()
        for task in self._tasks:
            task.cancel()
        for done in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(done, Exception):
                _log.error("moves between hosts had ended: %s", done, exc_info=done)
