"""When to look whether a TPM 2.0 is locked, and what was seen last. Pure; for the TPM thread's worker alone.

Looking is a command to the guest's TPM that the guest did not send: harmless, but its own, so it is done only where the
TPM may be locked. Whatever can lock one shows in the answer to a command, but for what happened before this process
began or when the power went without TPM2_Shutdown: that is doubt, and ends with the look after the next TPM2_Startup.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vtpm.errors import ProtocolError
from vtpm.tpm.lockout import Lockout, parse_lockout
from vtpm.tpm.return_codes import Rc20, is_auth_fail_20

_CC_CLEAR = 0x126
_CC_LOCK_RESET = 0x139
_CC_PARAMETERS = 0x13A
_CC_STARTUP = 0x144
_MAY_UNLOCK = frozenset({_CC_CLEAR, _CC_LOCK_RESET, _CC_PARAMETERS})


@dataclass(frozen=True)
class Seen:
    """What was seen last; `since` is the unix time in seconds at which it was first seen locked, 0 when it is not."""

    lockout: Lockout
    since: int


class LockoutWatch:
    """See the module.

    Args:
        report: called with what is seen when the TPM became locked or free, and by `tell`.
        clock: unix time in seconds.
    """

    def __init__(self, report: Callable[[Seen], None], clock: Callable[[], float] = time.time) -> None:
        self._report = report
        self._clock = clock
        self._doubt = True
        self.seen = Seen(Lockout(locked=False, failed_tries=0, max_tries=0, interval_s=0), 0)
        """Replaced whole, so that any thread may read it."""

    def power_lost(self) -> None:
        """The power went without TPM2_Shutdown, which may count as a failed try at the next TPM2_Startup."""
        self._doubt = True

    def suspects(self, code: int, result: int) -> bool:
        """Whether to look after a command, given its code and the return code of its response."""
        locked = self.seen.lockout.locked
        if result == Rc20.TPM_RC_LOCKOUT:
            return not locked
        if is_auth_fail_20(result):
            return True
        if result != Rc20.TPM_RC_SUCCESS:
            return False
        if code == _CC_STARTUP:
            return self._doubt or locked
        return locked and code in _MAY_UNLOCK

    def tell(self) -> None:
        """Report what was seen last."""
        self._report(self.seen)

    def take(self, response: bytes) -> None:
        """Take the TPM's answer to GET_LOCKOUT. One that says nothing, as before TPM2_Startup, leaves all as it was."""
        try:
            lockout = parse_lockout(response)
        except ProtocolError:
            return
        self._doubt = False
        before = self.seen
        if not lockout.locked:
            since = 0
        elif before.lockout.locked:
            since = before.since
        else:
            since = int(self._clock())
        self.seen = Seen(lockout, since)
        if lockout.locked is not before.lockout.locked:
            self.tell()
