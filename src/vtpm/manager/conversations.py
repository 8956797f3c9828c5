"""Conversations with peers about one vTPM each: whose turn it is, and messages to and fro until nobody has more to say.

Each call of the mover runs in a thread, one after the other for one vTPM, and lasts until it has ended, whoever asked
for it and has gone. The manager's alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vtpm.errors import ProtocolError, VtpmError
from vtpm.migration.mover import Channel, Mover
from vtpm.migration.steps import Send
from vtpm.tpm.types import VtpmId
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.migration import Decline, Direction, FromSource, Refuse, decode_message, encode_message

MAX_EXCHANGES = 16
"""Of one conversation: no attempt has as many messages."""
_log = logging.getLogger("vtpm.manager")
T = TypeVar("T")


@dataclass(frozen=True)
class Party:
    """A peer, and how it is spoken to.

    Args:
        name: of the peer.
        channel: who is at both ends.
        exchange: sends a vTPM's message and returns the answers. Raises UnavailableError: nobody knows if it arrived;
            VtpmError: what the peer answered.
    """

    name: str
    channel: Channel
    exchange: Callable[[VtpmId, bytes], Awaitable[Sequence[bytes]]]


class Parties(Protocol):
    """Whom this host knows."""

    async def find(self, name: str) -> Party:
        """Return a peer by name or URL. Raises NotFoundError: nobody has named it here."""


class _Turn:
    """Lets calls about one vTPM go one after the other; takers hold it or wait for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.takers = 0


class Conversations:
    """See the module.

    Args:
        mover: decides, blocking.
        threads: for its calls.
        soon: for those that guests wait for; None: the same.
    """

    def __init__(self, mover: Mover, threads: CallThreads, soon: CallThreads | None = None) -> None:
        self.mover = mover
        self._soon = soon or threads
        self.settled: Callable[[VtpmId], None] = lambda _: None
        """Called after each call: what is held of the vTPM may be another by now."""
        self._threads = threads
        self._turns: dict[VtpmId, _Turn] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, vtpm_id: VtpmId, call: Callable[..., T], *args: object) -> T:
        """Have the mover do something in the vTPM's turn, which lasts as long as the call, whoever is cancelled."""
        return await self._to_its_end(self._threads, vtpm_id, call, *args)

    async def run_soon(self, vtpm_id: VtpmId, call: Callable[..., T], *args: object) -> T:
        """As `run`, of what a guest waits for: quotes that peers ask for are not in its way."""
        return await self._to_its_end(self._soon, vtpm_id, call, *args)

    async def _to_its_end(self, threads: CallThreads, vtpm_id: VtpmId, call: Callable[..., T], *args: object) -> T:
        task = asyncio.get_running_loop().create_task(self._in_turn(threads, vtpm_id, call, *args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _in_turn(self, threads: CallThreads, vtpm_id: VtpmId, call: Callable[..., T], *args: object) -> T:
        turn = self._turns.setdefault(vtpm_id, _Turn())
        turn.takers += 1
        try:
            async with turn.lock:
                return await threads.run(call, *args)
        finally:
            self.settled(vtpm_id)
            turn.takers -= 1
            if not turn.takers:
                # A peer may name vTPMs without end.
                self._turns.pop(vtpm_id, None)

    async def deliver(self, vtpm_id: VtpmId, party: Party, sends: Sequence[Send]) -> str:
        """Send a state; where that fails, ask what has become of it. Returns why it was not taken, if it was not."""
        try:
            return await self.converse(vtpm_id, party, sends)
        except VtpmError as error:
            reason = error.message
        try:
            sends = await self.run(vtpm_id, self.mover.remind, vtpm_id)
            await self.converse(vtpm_id, party, sends)
        except VtpmError as error:
            _log.warning("vTPM %s: %s", vtpm_id, error)
        return reason

    async def converse(self, vtpm_id: VtpmId, party: Party, sends: Sequence[Send]) -> str:
        """Exchange messages until neither side has more to say; returns why the peer refused, if it did."""
        waiting, reason = deque(sends), ""
        for _ in range(MAX_EXCHANGES):
            if not waiting:
                return reason
            message = waiting.popleft().message
            answers = await party.exchange(vtpm_id, encode_message(message))
            direction = Direction.TO_SOURCE if isinstance(message, FromSource) else Direction.TO_DESTINATION
            for body in answers:
                answer = decode_message(body, direction)
                if isinstance(answer, Decline | Refuse):
                    reason = answer.reason
                waiting += await self.run(vtpm_id, self.mover.receive, vtpm_id, party.name, answer, party.channel)
        raise ProtocolError(f"{party.name} answers without end")
