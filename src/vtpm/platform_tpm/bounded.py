"""Blocking calls with a time limit: a thread that can be given up on. For platform_tpm alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from vtpm.errors import UnavailableError, VtpmError

ResultT = TypeVar("ResultT")

_abandoned: set[threading.Thread] = set()


def abandoned_calls() -> int:
    """Return how many threads of this process were given up on and still wait; each holds its connection."""
    _abandoned.intersection_update(threading.enumerate())
    return len(_abandoned)


class BoundedThread:
    """Runs calls one after another in one daemon thread.

    tpm2-tss blocks without limit when a TPM takes a command and never answers. Such a thread cannot be ended; it is
    left behind, and goes with the process.

    Args:
        name: for debuggers.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._stuck = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def given_up(self) -> bool:
        """Whether nobody waits any more for the call that is under way."""
        return self._stuck

    def run(self, call: Callable[[], ResultT], timeout_s: float) -> ResultT:
        """Run a call in the thread and return its result, or raise what it raises.

        Raises:
            UnavailableError: it takes longer than `timeout_s`, or an earlier one did; it may still go on.
        """
        if self._stuck:
            raise UnavailableError("an earlier call has not come back")
        if not self._thread.is_alive():
            raise UnavailableError("the connection was closed")
        job: Future[ResultT] = Future()
        self._jobs.put((job, call))
        try:
            return job.result(timeout_s)
        except TimeoutError:
            self._stuck = True
            _abandoned.add(self._thread)
            raise UnavailableError(f"no answer within {timeout_s:g} s") from None

    def close(self, timeout_s: float) -> None:
        """End the thread once it is idle; one that is stuck is left behind, and ends if its call ever comes back."""
        self._jobs.put(None)
        if not self._stuck:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, call = item
            try:
                job.set_result(call())
            except (VtpmError, RuntimeError, OSError, ValueError, TypeError) as error:
                job.set_exception(error)
            finally:
                # Anything else is a defect: it ends this thread loudly, and the caller must not wait for it.
                if not job.done():
                    job.set_exception(UnavailableError("the call ended by a defect"))
            # Held no longer than needed: a result can be a secret.
            del item, job, call
