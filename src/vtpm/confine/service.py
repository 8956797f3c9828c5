"""What a host service does to itself before it serves: no core dump, no tracer, no swap, no privilege.

For the entry modules of manager and keeper, which hold keys. Instances are locked in by `steps` instead.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from collections.abc import Sequence

from vtpm.confine import kernel
from vtpm.errors import AccessDeniedError

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
# <sys/mman.h>: MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT; the last so that untouched stacks take no memory.
_MCL_ALL_ON_FAULT = 1 | 2 | 4
_log = logging.getLogger(__name__)


def forbid_core_dumps() -> None:
    """Forbid core dumps, and ptrace and /proc/PID/mem to other processes of this user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.prctl(_PR_SET_DUMPABLE, 0)


def forbid_dumps() -> None:
    """Forbid core dumps, and more privileges by exec. For services."""
    forbid_core_dumps()
    kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def lock_memory() -> None:
    """Keep memory out of swap, where this process may: best effort, and said when it does not hold."""
    try:
        # Without this a later allocation could fail once privileges are gone.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        _log.info("memory is not locked: the limit on locked memory (RLIMIT_MEMLOCK) is too low; use encrypted swap")
        return
    if ctypes.CDLL(None, use_errno=True).mlockall(_MCL_ALL_ON_FAULT) != 0:
        _log.warning("memory is not locked: %s; use encrypted swap", os.strerror(ctypes.get_errno()))


def become(program: str, uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """Become another user for good. Nothing happens when the process is that user and may not change its groups.

    Raises:
        AccessDeniedError: not permitted.
    """
    if os.geteuid() != 0 and (os.geteuid(), os.getegid()) == (uid, gid):
        return
    try:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise AccessDeniedError(
            f"{program} cannot become user {uid}, group {gid}: {error.strerror}", next_step="Start it as root"
        ) from error
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise AccessDeniedError(f"{program} is not user {uid}, group {gid} after all")
    # Changing user makes a process dumpable or not by a system-wide setting.
    forbid_dumps()
    if not os.access(__file__, os.R_OK):
        # Python imports some modules only when they are needed; half a program is worse than none.
        raise AccessDeniedError(
            f"{program} cannot read its own program, {__file__}, as user {uid}",
            next_step="Install it where every user can read it; `make install` takes care of that",
        )
