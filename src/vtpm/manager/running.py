"""What the manager holds of a vTPM that has an instance, and the audit events about one. The manager's alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

from vtpm.manager.instance_link import InstanceLink
from vtpm.vault.records import Event, VtpmRecord
from vtpm.wire.allowance import Allowance
from vtpm.wire.launcher import InstanceInfo
from vtpm.wire.manager_link import ClientKind


@dataclass
class Running:
    """What the manager holds of a vTPM that has an instance."""

    record: VtpmRecord
    info: InstanceInfo
    link: InstanceLink
    reason: str = ""
    following: bool = False
    """Whether `_follow_power` is at work on it."""
    notes: Allowance = field(default_factory=Allowance)
    """What the audit log takes of the instance's notes: it may have been taken over and write without end."""
    locked_since: int = 0
    """`since` of the lockout that was noted last; unix time in seconds."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _let_go: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_emulator(self) -> bool:
        """Whether a virtual machine uses it."""
        client = self.link.facts.client
        return client is not None and client.client is ClientKind.EMULATOR

    def note_client(self) -> None:
        """The instance may have said that its client has come or gone."""
        if self.has_emulator:
            self._let_go.clear()
        else:
            self._let_go.set()

    async def wait_let_go(self, timeout_s: float) -> None:
        """Wait until no virtual machine uses it, or time is up."""
        with contextlib.suppress(TimeoutError):
            if self.has_emulator:
                await asyncio.wait_for(self._let_go.wait(), timeout_s)


def event_of(actor_uid: int | None, kind: str, record: VtpmRecord, **detail: object) -> Event:
    """Return an event about a vTPM, with its details as texts; actor_uid is None for what happened by itself."""
    texts = {key: str(value) for key, value in detail.items()}
    return Event(datetime.now(UTC), actor_uid, kind, record.name, record.id, json.dumps(texts))
