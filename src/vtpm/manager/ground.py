"""What a mover stands on in this host: vault, keeper and launcher; see migration.mover.Ground. The manager's alone.

Its methods are called in threads other than the manager's loop, which they ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from vtpm.errors import ConflictError, StateError, UnavailableError
from vtpm.manager.launcher_link import LauncherLink
from vtpm.manager.storage import VaultDoor
from vtpm.migration.mover import Place
from vtpm.migration.payload import Payload
from vtpm.secret import Secret
from vtpm.tpm.types import VtpmId
from vtpm.vault.records import DomainKind, VtpmRecord
from vtpm.vault.store import Store
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.launcher import LauncherStatus, NoArgs
from vtpm.wire.migration import Mode

PATIENCE_S = 30.0
"""How long the manager's loop, store or launcher may take; a hardware TPM's anchor is among it."""
T = TypeVar("T")


class Waiting(Protocol):
    """Instances that wait for vTPMs with their guests."""

    def expects(self, vtpm_id: VtpmId) -> bool:
        """Whether one waits for this vTPM."""

    def place(self, payload: Payload, mode: Mode) -> Place:
        """Return the place of one that arrives so. Raises VtpmError: there is none, or it is another's."""


class HostGround:
    """See the module.

    Args:
        loop: the manager's.
        door: to the vault.
        keeper: of the mover's threads alone.
        launcher: asked which kinds of domain there are.
        waiting: set before anything is asked.
    """

    waiting: Waiting

    def __init__(
        self, loop: asyncio.AbstractEventLoop, door: VaultDoor, keeper: KeeperClient, launcher: LauncherLink
    ) -> None:
        self._loop = loop
        self._door = door
        self._keeper = keeper
        self._launcher = launcher

    def store(self, operation: Callable[[Store], T]) -> T:
        """See Ground. Raises UnavailableError: it has not answered; the operation may take effect yet."""
        return self._ask(lambda: self._door.run(operation), "the store")

    def key(self, record: VtpmRecord) -> Secret:
        """See Ground."""
        if record.wrapped_key is None:
            raise StateError(f"vTPM {record.name} has no key")
        return Secret(self._keeper.unwrap_key(record.id, record.wrapped_key).key)

    def new_key(self, vtpm_id: VtpmId) -> tuple[bytes, Secret]:
        """See Ground."""
        made = self._keeper.new_key(vtpm_id)
        return made.wrapped, Secret(made.key)

    def place(self, payload: Payload, mode: Mode) -> Place:
        """Return the place that waits for it with its guest; or its kind, or the first of its make that is here."""
        if mode is not Mode.STOPPED or self.waiting.expects(payload.vtpm.vtpm_id):
            return self.waiting.place(payload, mode)
        status: LauncherStatus = self._ask(lambda: self._launcher.call("status", NoArgs()), "the launcher")[0]
        kinds: tuple[DomainKind, ...] = (payload.kind, *DomainKind)
        for kind in kinds:
            if kind.make is payload.kind.make and kind in status.domains:
                return Place(kind)
        raise ConflictError(f"this host runs no vTPMs of the make {payload.kind.make}")

    def _ask(self, question: Callable[[], Awaitable[T]], whom: str) -> T:
        async def asked() -> T:
            return await question()

        answer = asyncio.run_coroutine_threadsafe(asked(), self._loop)
        try:
            return answer.result(PATIENCE_S)
        except TimeoutError as error:
            answer.cancel()
            raise UnavailableError(f"{whom} did not answer within {PATIENCE_S:g} s") from error
