"""Numbers of the system calls that a filter may name, per machine.

Pure data, for `policy` and `bpf`. Only calls that the filter names are listed, so a name that is mistyped is
refused when the filter is loaded. None: the machine has no such call (aarch64 dropped the older of two).

Source: Linux uapi asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64), linux/audit.h for
AUDIT_ARCH_*.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Machine(enum.Enum):
    """Machines that a filter can be compiled for, named as os.uname().machine names them."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"


class Numbers(NamedTuple):
    """One system call's number on each machine."""

    x86_64: int | None
    aarch64: int | None


AUDIT_ARCH = {Machine.X86_64: 0xC000003E, Machine.AARCH64: 0xC00000B7}
"""What the kernel puts into seccomp_data.arch for a call made through the machine's own 64-bit entry."""

X32_SYSCALL_BIT = 0x40000000
"""Set in the number of every x32 call, which x86_64 kernels report under the same audit architecture."""

SYSCALLS: dict[str, Numbers] = {
    name: Numbers(*numbers)
    for name, numbers in {
        "accept4": (288, 242),
        "access": (21, None),
        "brk": (12, 214),
        "clock_gettime": (228, 113),
        "clock_nanosleep": (230, 115),
        "close": (3, 57),
        "epoll_ctl": (233, 21),
        "epoll_pwait": (281, 22),
        "epoll_wait": (232, None),
        "exit": (60, 93),
        "exit_group": (231, 94),
        "faccessat": (269, 48),
        "faccessat2": (439, 439),
        "fcntl": (72, 25),
        "fstat": (5, 80),
        "futex": (202, 98),
        "getcwd": (79, 17),
        "getpeername": (52, 205),
        "getpid": (39, 172),
        "getrandom": (318, 278),
        "getsockname": (51, 204),
        "getsockopt": (55, 209),
        "gettid": (186, 178),
        "gettimeofday": (96, 169),
        "ioctl": (16, 29),
        "lseek": (8, 62),
        "lstat": (6, None),
        "madvise": (28, 233),
        "mmap": (9, 222),
        "mprotect": (10, 226),
        "mremap": (25, 216),
        "munmap": (11, 215),
        "newfstatat": (262, 79),
        "open": (2, None),
        "openat": (257, 56),
        "poll": (7, None),
        "ppoll": (271, 73),
        "pread64": (17, 67),
        "pwrite64": (18, 68),
        "read": (0, 63),
        "readlink": (89, None),
        "readlinkat": (267, 78),
        "recvfrom": (45, 207),
        "recvmsg": (47, 212),
        "restart_syscall": (219, 128),
        "rseq": (334, 293),
        "rt_sigaction": (13, 134),
        "rt_sigprocmask": (14, 135),
        "rt_sigreturn": (15, 139),
        "sendfile": (40, 71),
        "sendmsg": (46, 211),
        "sendto": (44, 206),
        "set_robust_list": (273, 99),
        "shutdown": (48, 210),
        "stat": (4, None),
        "statx": (332, 291),
        "tgkill": (234, 131),
        "write": (1, 64),
    }.items()
}
