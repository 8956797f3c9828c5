"""Work on vTPMs that is done to its end, whoever asked for it and has gone; on one vTPM, one thing after the other."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

from vtpm.errors import UnavailableError, VtpmError
from vtpm.tpm.types import VtpmId

MAX_WAITING = 4
"""Pieces of work on one vTPM that nobody waits for any more, and whose data is kept: up to a megabyte each."""
_log = logging.getLogger("vtpm.manager")
T = TypeVar("T")


class Ordered:
    """See the module. A lock of asyncio's is given in the order in which it was asked for."""

    def __init__(self) -> None:
        self._locks: dict[VtpmId, asyncio.Lock] = {}
        self._waiting: Counter[VtpmId] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    def lock(self, vtpm_id: VtpmId) -> asyncio.Lock:
        """Return the lock of a vTPM of this host; it is kept for good."""
        return self._locks.setdefault(vtpm_id, asyncio.Lock())

    async def to_its_end(self, vtpm_id: VtpmId, work: Coroutine[Any, Any, T]) -> T:
        """Have work on a vTPM done, and wait for it as long as the caller likes.

        Raises UnavailableError: MAX_WAITING are under way for it already, whose callers have gone.
        """
        if self._waiting[vtpm_id] >= MAX_WAITING:
            work.close()
            raise UnavailableError("too much is asked at once; what was asked before is still being done")
        self._waiting[vtpm_id] += 1
        task = self._begin(work)
        task.add_done_callback(lambda _: self._waiting.subtract((vtpm_id,)))
        return await asyncio.shield(task)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have work done that nobody waits for; what goes wrong is logged."""
        task = self._begin(work)
        task.add_done_callback(_finished)
        return task

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """End all of it: what is durable says how to go on."""
        for task in self._tasks:
            task.cancel()


def _finished(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("background work failed: %s", error, exc_info=None if isinstance(error, VtpmError) else error)
