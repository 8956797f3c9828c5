"""The kernel's calls that the standard library lacks, through ctypes: thin, typed, raising OSError.

For `spawn` and `steps` alone. Nothing here decides anything.

Source: man-pages section 2 of each call; Linux uapi linux/prctl.h, linux/securebits.h, linux/capability.h,
linux/sched.h, linux/seccomp.h. Call numbers are those of the machine that this runs on.
"""

from __future__ import annotations

import ctypes
import os
import signal

from vtpm.confine.syscalls import Machine
from vtpm.errors import ConfinementError

CLONE_PARENT = 0x00008000
CLONE_PIDFD = 0x00001000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x4000, 0x40000
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_RELATIME = 0x20, 0x400, 0x800, 0x1000, 0x200000
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_SET_NAME = 15
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

SECUREBITS_LOCKED = 0b1110_1111
"""NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE set and locked, KEEP_CAPS unset and locked."""

_M_ARENA_MAX = -8
_CAPABILITY_VERSION_3 = 0x20080522
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_NUMBERS = {
    Machine.X86_64: {"pivot_root": 155, "seccomp": 317, "clone3": 435},
    Machine.AARCH64: {"pivot_root": 41, "seccomp": 277, "clone3": 435},
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# Keeps the interpreter's lock over the call: after clone3 the child has this thread alone, and it must own
# the lock.
_libc_locked = ctypes.PyDLL(None, use_errno=True)
_libc_locked.syscall.restype = ctypes.c_long


def machine() -> Machine:
    """Return the machine that this runs on; raise ConfinementError if there is no filter for it."""
    name = os.uname().machine
    try:
        return Machine(name)
    except ValueError:
        raise ConfinementError(
            f"processes cannot be confined on {name}: there is no system call table for it"
        ) from None


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def clone3(flags: int) -> tuple[int, int]:
    """Make a child as fork does, in new namespaces; the caller must have one thread.

    Args:
        flags: CLONE_* without CLONE_VM; CLONE_PIDFD is added.
    Returns:
        (pid, pidfd) in the parent, (0, -1) in the child. With CLONE_PARENT the child is the caller's sibling.
    """
    pidfd = ctypes.c_int(-1)
    exit_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD
    arguments = (ctypes.c_uint64 * 8)(flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, exit_signal, 0, 0, 0)
    number = _NUMBERS[machine()]["clone3"]
    pid = _checked(_libc_locked.syscall(ctypes.c_long(number), arguments, ctypes.c_size_t(ctypes.sizeof(arguments))))
    return pid, pidfd.value if pid else -1


def prctl(option: int, first: int = 0, second: int = 0) -> int:
    """prctl(2) with numbers as arguments; returns its result."""
    long = ctypes.c_ulong
    return _checked(_libc.prctl(ctypes.c_int(option), long(first), long(second), long(0), long(0)))


def set_command_name(name: bytes) -> None:
    """Set the calling thread's comm; at most 15 bytes of it count."""
    _checked(_libc.prctl(ctypes.c_int(PR_SET_NAME), ctypes.c_char_p(name), *[ctypes.c_ulong(0)] * 3))


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
    """mount(2)."""
    _checked(_libc.mount(source, target, kind, ctypes.c_ulong(flags), data))


def pivot_root_here() -> None:
    """Make the working directory (a mount) the root and stack the old root over it, then detach the old
    root."""
    number = _NUMBERS[machine()]["pivot_root"]
    _checked(_libc.syscall(ctypes.c_long(number), ctypes.c_char_p(b"."), ctypes.c_char_p(b".")))
    _checked(_libc.umount2(b".", ctypes.c_int(MNT_DETACH)))


def _capability_call(call: str, sets: list[int]) -> list[int]:
    # struct __user_cap_header_struct {version, pid}; two of struct __user_cap_data_struct {effective,
    # permitted, inheritable}: the low and the high 32 bits.
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(*sets)
    _checked(getattr(_libc, call)(header, data))
    return list(data)


def clear_capabilities() -> None:
    """Clear the calling thread's effective, permitted and inheritable sets."""
    _capability_call("capset", [0] * 6)


def has_capabilities() -> bool:
    """Say whether any of the calling thread's effective, permitted and inheritable sets holds something."""
    return any(_capability_call("capget", [0] * 6))


def limit_malloc_arenas() -> None:
    """Make malloc use one arena: each further one reserves 64 MiB of address space, which the limit
    counts."""
    _libc.mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1))


def install_seccomp_filter(program: bytes) -> None:
    """Put the filter (packed struct sock_filter) on every thread of the process, or on none."""
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog {u16 length; padding; pointer}
    header = (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(buffer))
    result = _checked(
        _libc.syscall(
            ctypes.c_long(_NUMBERS[machine()]["seccomp"]),
            ctypes.c_long(_SECCOMP_SET_MODE_FILTER),
            ctypes.c_long(_SECCOMP_FILTER_FLAG_TSYNC),
            header,
        )
    )
    if result:
        raise ConfinementError(f"the seccomp filter cannot be put on thread {result}")


def overwrite_memory(address: int, content: bytes) -> None:
    """Write bytes into this process's memory at an address that the kernel named."""
    ctypes.memmove(address, content, len(content))
