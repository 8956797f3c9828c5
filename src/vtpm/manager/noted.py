"""Audit events about the host itself, and changes outside the vault, noted before and after. The manager's alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

from vtpm.errors import VtpmError
from vtpm.manager.access import Caller
from vtpm.vault.records import Event

Note = Callable[[Event], Awaitable[None]]
"""Appends to the audit log."""


def host_event(caller: Caller, kind: str, **detail: str) -> Event:
    """Return an event about the host."""
    return Event(datetime.now(UTC), caller.uid, kind, detail=json.dumps(detail))


@contextlib.asynccontextmanager
async def noted(note: Note, caller: Caller, what: str, done: str, **detail: str) -> AsyncIterator[None]:
    """Note a change before it is made and after: no end of the manager leaves it out.

    An intent without an outcome says that the manager died meanwhile. As after a failure for want of an answer, the
    change may be made then.

    Args:
        what: the intent is `{what}_asked`, a failure `{what}_failed`.
        done: the word for the change that was made.
    """
    await note(host_event(caller, f"{what}_asked", **detail))
    try:
        yield
    except VtpmError as error:
        await note(host_event(caller, f"{what}_failed", **detail, why=error.message))
        raise
    await note(host_event(caller, done, **detail))
