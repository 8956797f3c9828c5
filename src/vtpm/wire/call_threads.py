"""Blocking calls under asyncio that may hang, in threads of their own: none takes a thread that others need.

asyncio.to_thread has one pool for all of a process; a few calls that hang fill it. For the services.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, ParamSpec, TypeVar

from vtpm.errors import UnavailableError

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class CallThreads:
    """See the module.

    Args:
        name: for debuggers.
        count: how many calls are made at once; further ones wait.
    """

    def __init__(self, name: str, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call in one of the threads, as asyncio.to_thread does; one that has begun goes on to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Begin no more calls; those under way are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class SharedCall(Generic[T_co]):
    """A question that whoever comes while it is asked shares, so that many who ask do not make one that hangs many.

    Args:
        ask: asks.
        what: who is asked, for errors.
    """

    def __init__(self, ask: Callable[[], Awaitable[T_co]], what: str) -> None:
        self._ask = ask
        self._what = what
        self._asking: asyncio.Future[T_co] | None = None

    async def within(self, limit_s: float) -> T_co:
        """Return the answer.

        Raises:
            UnavailableError: there is none in time; the question stands, and its answer is that of the next who asks.
            Exception: what asking raises.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
            # One that comes too late for all who wait may be nobody's.
            self._asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        asking = self._asking
        await asyncio.wait({asking}, timeout=limit_s)
        if not asking.done():
            raise UnavailableError(f"{self._what} does not answer within {limit_s:g} s")
        return asking.result()
