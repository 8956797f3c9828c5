"""When to look again for the rest of what has half come. Pure but for the clock; for the relay."""

from __future__ import annotations

import time
from collections.abc import Callable

from vtpm.guest_link.control_link import PARTIAL_RETRY_S

LONGEST_S = 0.05


class Waiting:
    """Half a request stays in its socket, which stays readable, so it cannot be waited on: looked at after a while.

    The while doubles, for who sends a request at once sends its rest soon, and nobody may keep the relay busy.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._delay_s = PARTIAL_RETRY_S
        self._until_s: float | None = None

    @property
    def left_s(self) -> float | None:
        """How long not to look, in seconds, 0 or more; None: nothing is half there, wait on the socket."""
        return None if self._until_s is None else max(0.0, self._until_s - self._clock())

    def half(self) -> None:
        """What has come is half a request."""
        self._until_s = self._clock() + self._delay_s
        self._delay_s = min(2 * self._delay_s, LONGEST_S)

    def whole(self) -> None:
        """What has come was whole."""
        self._until_s = None
        self._delay_s = PARTIAL_RETRY_S
