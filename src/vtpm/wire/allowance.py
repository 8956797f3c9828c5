"""A bounded right to do something that somebody else causes: so many at once, so many in the long run.

Pure; for the host services and the instance.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Allowance:
    """See the module.

    Args:
        burst: most at once.
        per_second: how fast it fills again.
        clock: monotonic seconds.
    """

    def __init__(self, burst: int = 20, per_second: float = 0.2, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._left = float(burst)
        self._at = clock()

    def take(self) -> bool:
        """Use one up, if there is one; say whether there was."""
        self._fill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def overdraw(self, count: int) -> float:
        """Use so many up, be there so many or not: it has happened. Return how many seconds that takes to fill up."""
        self._fill()
        self._left -= count
        return max(0.0, -self._left / self._per_second)

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
