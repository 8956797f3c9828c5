"""The vault as the manager opens it: store, anchor and committer together; perhaps later, perhaps again.

The manager's alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vtpm.config import EMBEDDED, Config
from vtpm.errors import ConflictError, StateError, UnavailableError, VtpmError
from vtpm.secret import Secret
from vtpm.vault.anchor import AnchorPolicy, AnchorStats
from vtpm.vault.committer import Committer
from vtpm.vault.records import Event
from vtpm.vault.root_record import AnchorValue
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store
from vtpm.vault.vault import Vault
from vtpm.wire.keeper import AnchorState
from vtpm.wire.keeper_client import KeeperClient

ANCHOR_TIMEOUT_S = 5.0
"""Of one exchange about the anchor; a save that waits for it has given up by then."""
REOPEN_S = 2.0
"""How long a vault that does not open is left alone."""
T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """An open vault."""

    committer: Committer
    vault: Vault

    def close(self) -> None:
        """Finish what is under way, forget all keys, and let go of the store."""
        self.vault.close()
        self.committer.close()


class KeeperAnchor:
    """The anchor as the keeper writes it; see vault.anchor.AnchorKeeper.

    Args:
        keeper: used by the committer alone.
    """

    def __init__(self, keeper: KeeperClient) -> None:
        self._keeper = keeper

    def read(self) -> AnchorValue:
        """See AnchorKeeper."""
        state = self._keeper.read_anchor()
        return AnchorValue(state.version, state.digest)

    def write(self, value: AnchorValue) -> None:
        """See AnchorKeeper."""
        try:
            self._keeper.write_anchor(AnchorState(value.version, value.digest))
        except StateError as error:
            # The keeper's root key is locked: that may pass, and says nothing of the anchor.
            raise UnavailableError(error.message, next_step=error.next_step) from error
        except ConflictError as error:
            there = self.read()
            if there != value:
                raise StateError(
                    f"the platform TPM has anchored {there}, so the store's {value} is not the newest",
                    next_step="Another manager wrote to this store's anchor: keep the files, and start no vTPM",
                ) from error


def anchor_policy(config: Config) -> AnchorPolicy:
    """Return when changes are anchored in the platform TPM."""
    each = config.anchor == "each-commit" or (config.anchor == "auto" and config.platform_tpm == EMBEDDED)
    return AnchorPolicy(None if each else float(config.anchor_interval_s))


def open_storage(vault_dir: Path, run_dir: Path, policy: AnchorPolicy, accepting: Event | None = None) -> Storage:
    """Open the vault of a host whose keeper has the root key. Blocks.

    Args:
        accepting: the audit event of an operator's decision to take the store as it is for the newest, after the anchor
            was lost; None refuses a store that the anchor does not vouch for.
    Raises:
        PlatformTpmError, UnavailableError: the keeper has no root key, or does not answer.
        StateError: the store is older than the anchor, forked, edited or foreign; nothing was changed.
        StoreError: it cannot be read or written.
    """
    keeper = KeeperClient(run_dir, timeout_s=ANCHOR_TIMEOUT_S)
    try:
        anchor = KeeperAnchor(keeper)
        key = Secret(keeper.anchor_key())
        store = SqliteStore(vault_dir, key, anchor, accepting=accepting)
        try:
            committer = Committer(store, anchor, policy)
        except BaseException:
            store.close()
            raise
    except BaseException:
        keeper.close()
        raise
    return Storage(committer, Vault(committer))


class VaultDoor:
    """A vault that may be locked: the keeper has no root key yet, or the store is refused.

    Args:
        open_storage: opens it, blocking; with an event, as the operator's decision to take the store as it is.
        take_up: called when it has been opened, before anybody else gets in.
    """

    def __init__(self, open_storage: Callable[[Event | None], Storage], take_up: Callable[[], Awaitable[None]]) -> None:
        self._open_storage = open_storage
        self._take_up = take_up
        self._storage: Storage | None = None
        self._trouble: VtpmError = UnavailableError("the vault is not open yet")
        self._tried_at = 0.0
        self._opening = asyncio.Lock()
        self._taken_up = False

    @property
    def is_open(self) -> bool:
        """Whether it is open, and what runs was taken up."""
        return self._taken_up

    @property
    def vault(self) -> Vault:
        """The vault. Raises VtpmError: why it is not open."""
        return self._opened().vault

    def stats(self) -> AnchorStats | None:
        """Return what there is to say of the anchor; None while it is not open."""
        return self._storage.committer.stats() if self._storage is not None else None

    async def open(self, accepting: Event | None = None) -> None:
        """Open it, if it is not open.

        Args:
            accepting: see `open_storage`.
        Raises:
            VtpmError: it does not open; from now on that is why.
        """
        async with self._opening:
            if self._taken_up:
                return
            self._tried_at = asyncio.get_running_loop().time()
            try:
                if self._storage is None:
                    self._storage = await asyncio.to_thread(self._open_storage, accepting)
                await self._take_up()
            except VtpmError as error:
                self._trouble = error
                raise
            self._taken_up = True

    async def opened(self) -> None:
        """Return once it is open and taken up; one that did not open is tried again, now and then.

        Raises:
            VtpmError: why it is not open.
        """
        if not self._taken_up and asyncio.get_running_loop().time() - self._tried_at >= REOPEN_S:
            # The keeper may have the root key by now, or the store may have been put right.
            await self.open()
        async with self._opening:
            if not self._taken_up:
                raise self._trouble

    async def run(self, operation: Callable[[Store], T]) -> T:
        """Have the store do something. Raises VtpmError: as the operation does, or why the vault is not open."""
        return await asyncio.wrap_future(self._opened().committer.run(operation))

    async def close(self) -> None:
        """Let go of it, if it is open."""
        if self._storage is not None:
            await asyncio.to_thread(self._storage.close)

    def _opened(self) -> Storage:
        if self._storage is None:
            raise self._trouble
        return self._storage
