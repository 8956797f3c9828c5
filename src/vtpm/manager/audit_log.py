"""The audit log as the manager uses it: events are appended, listed, and waited for. The manager's alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from functools import partial

import vtpm.manager.describe as describe
from vtpm.manager.access import Caller
from vtpm.manager.storage import VaultDoor
from vtpm.tpm.types import VtpmId
from vtpm.vault.records import Event
from vtpm.vault.store import Store
from vtpm.wire.api import AuditEvent

PAGE_EVENTS = 100
"""In one piece; guests' saves wait for no more."""


class AuditLog:
    """See the module.

    Args:
        door: to the vault that keeps it.
    """

    def __init__(self, door: VaultDoor) -> None:
        self._door = door
        self._changed = asyncio.Condition()

    async def append(self, event: Event) -> None:
        """Append an event."""
        await self._door.run(lambda store: store.append_event(event))
        await self.came()

    async def came(self) -> None:
        """Wake who waits for events: one was appended with the change that it tells of."""
        async with self._changed:
            self._changed.notify_all()

    async def list(self, after_id: int, limit: int, wait_s: float, caller: Caller) -> Sequence[AuditEvent]:
        """Return the caller's events after an id, at most PAGE_EVENTS; waits for the first one up to wait_s."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            found, mine = await self._door.run(partial(_page, after_id, min(limit, PAGE_EVENTS), caller))
            seen = [
                describe.audit_event(event)
                for event in found
                if caller.is_admin or event.vtpm_id in mine or event.actor_uid == caller.uid
            ]
            if seen:
                return seen
            if found:
                # None of them is the caller's to see; an empty answer would say that there are no more.
                after_id = found[-1].event_id
                continue
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return []
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    return []


def _page(after_id: int, limit: int, caller: Caller, store: Store) -> tuple[Sequence[Event], Set[VtpmId]]:
    """Return events, and which of the vTPMs that they are about are the caller's."""
    found = store.list_events(after_id, limit)
    if caller.is_admin:
        return found, frozenset()
    return found, store.owned_by(caller.uid, {event.vtpm_id for event in found if event.vtpm_id is not None})
