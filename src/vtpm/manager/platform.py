"""What administrators ask of the keeper through the manager: the root key's policy and its recovery.

Each change leaves an audit event. Keys pass through here and are kept nowhere. The manager's alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vtpm.manager.access import Caller
from vtpm.manager.noted import Note, host_event, noted
from vtpm.recovery_key import RecoveryKey, RecoveryPublicKey
from vtpm.vault.records import Event
from vtpm.wire.api import AllowPcrs, ConfirmRecoveryKey, NewRecoveryKey, PcrSet, Policy, RecoveryKeyText
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper import PolicyState
from vtpm.wire.keeper_client import KeeperClient


class PlatformService:
    """See the module.

    Args:
        keeper: asked in one of the threads, for it blocks and may hang.
        threads: of these calls alone.
        note: appends to the audit log.
        accept: opens the vault once the keeper has the root key again, and notes the operator's decision in it.
    """

    def __init__(
        self,
        keeper: KeeperClient,
        threads: CallThreads,
        note: Note,
        accept: Callable[[Event | None], Awaitable[None]],
    ) -> None:
        self._keeper = keeper
        self._threads = threads
        self._note = note
        self._accept = accept

    async def policy(self, caller: Caller) -> Policy:
        """Return the PCR values under which the root key opens."""
        caller.require_admin("see the root key's policy")
        return _policy(await self._threads.run(self._keeper.policy))

    async def allow(self, wanted: AllowPcrs, caller: Caller) -> Policy:
        """Have the root key open under further PCR values."""
        caller.require_admin("change the root key's policy")
        detail = {"label": wanted.label, "values": " ".join(wanted.values)}
        async with noted(self._note, caller, "policy_allow", "policy_allowed", **detail):
            return _policy(await self._threads.run(self._keeper.policy_allow, wanted.label, tuple(wanted.values)))

    async def drop(self, label: str, caller: Caller) -> Policy:
        """Have the root key open under these PCR values no more."""
        caller.require_admin("change the root key's policy")
        async with noted(self._note, caller, "policy_drop", "policy_dropped", label=label):
            return _policy(await self._threads.run(self._keeper.policy_drop, label))

    async def new_recovery_key(self, caller: Caller) -> NewRecoveryKey:
        """Make a recovery key; one that was made before counts until this one is confirmed."""
        caller.require_admin("make a recovery key")
        # Before it is made: there is none of which the audit log does not know.
        await self._note(host_event(caller, "recovery_key_made"))
        text = await self._threads.run(self._keeper.new_recovery_key)
        public = RecoveryKey.from_text(text).public
        return NewRecoveryKey(text, public.to_text(), public.fingerprint)

    async def confirm_recovery_key(self, given: ConfirmRecoveryKey, caller: Caller) -> None:
        """Let the recovery key that was made last count, and no other: somebody has it."""
        caller.require_admin("confirm a recovery key")
        public = RecoveryPublicKey.from_text(given.public_key)
        async with noted(
            self._note, caller, "recovery_key_confirm", "recovery_key_confirmed", fingerprint=public.fingerprint
        ):
            await self._threads.run(self._keeper.confirm_recovery_key, public.to_text())

    async def recover(self, given: RecoveryKeyText, caller: Caller) -> None:
        """Open the vault by the recovery key, on the platform as it is now."""
        caller.require_admin("recover the vault")
        anchor_kept = await self._threads.run(self._keeper.recover, given.recovery_key)
        # Only if the anchor went with the TPM is the store taken for the newest, and notes that itself.
        await self._accept(None if anchor_kept else host_event(caller, "store_accepted"))
        await self._note(host_event(caller, "recovered"))
        await self._threads.run(self._keeper.recovery_noted)


def _policy(state: PolicyState) -> Policy:
    sets = [PcrSet(found.label, [*found.values], found.matches) for found in state.sets]
    return Policy(state.selection, sets, [*state.current])
