"""How the host's services are, in a bounded time whatever hangs. The manager's alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vtpm.errors import VtpmError
from vtpm.manager.launcher_link import LauncherLink
from vtpm.manager.storage import VaultDoor
from vtpm.wire.call_threads import CallThreads, SharedCall
from vtpm.wire.keeper import KeeperStatus
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.launcher import LauncherStatus, NoArgs

LIMIT_S = 1.6
"""For each, all at once: `vtpm status` answers within 2 s. The keeper gives its platform TPM less."""
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What each said, or why it said nothing; how many vTPMs each owner has, by uid."""

    vtpms: Mapping[int, int] | VtpmError
    keeper: KeeperStatus | VtpmError
    launcher: LauncherStatus | VtpmError


class Health:
    """See the module.

    Args:
        run_dir: the services' run directory; the keeper is asked over a connection of its own.
        door: to the vault.
        launcher: the manager's connection to it.
    """

    def __init__(self, run_dir: Path, door: VaultDoor, launcher: LauncherLink) -> None:
        self._door = door
        self._launcher_link = launcher
        self._client = KeeperClient(run_dir, timeout_s=LIMIT_S)
        self._threads = CallThreads("keeper-status", 1)
        self._vault: SharedCall[Mapping[int, int]] = SharedCall(self._ask_vault, "the vault")
        self._keeper: SharedCall[KeeperStatus] = SharedCall(self._ask_keeper, "vtpm-keeper")
        self._launcher: SharedCall[LauncherStatus] = SharedCall(self._ask_launcher, "vtpm-launcher")

    async def ask(self) -> Found:
        """Ask all of them at once."""
        vtpms, keeper, launcher = await asyncio.gather(
            _answer(self._vault), _answer(self._keeper), _answer(self._launcher)
        )
        return Found(vtpms, keeper, launcher)

    def close(self) -> None:
        """Ask no more."""
        self._threads.close()

    async def _ask_vault(self) -> Mapping[int, int]:
        await self._door.opened()
        return await self._door.run(lambda store: store.count_vtpms())

    async def _ask_keeper(self) -> KeeperStatus:
        return await self._threads.run(self._client.status)

    async def _ask_launcher(self) -> LauncherStatus:
        status: LauncherStatus = (await self._launcher_link.call("status", NoArgs()))[0]
        return status


async def _answer(asked: SharedCall[T]) -> T | VtpmError:
    try:
        return await asked.within(LIMIT_S)
    except VtpmError as error:
        return error
