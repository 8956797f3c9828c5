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

    def take(self, count: int = 1) -> bool:
        """Use so many up, if there are so many; say whether there were."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True
