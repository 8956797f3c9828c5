"""The target of confined processes in tests: tries one forbidden thing, or uses what a vtpmd needs.

Runs inside. Descriptor 3 is the hold, 4 the link on which the answer goes back as JSON; target_args names the
attempt.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

HOLD, LINK = 3, 4
MEBIBYTE = 1 << 20
TIOCSTI, TCGETS = 0x5412, 0x5401

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

NUMBERS = {
    "x86_64": {
        "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "execve": 59, "execveat": 322, "ptrace": 101,
        "kill": 62, "mount": 165, "umount2": 166, "chroot": 161, "setresuid": 117, "capset": 126, "bpf": 321,
        "keyctl": 250, "add_key": 248, "userfaultfd": 323, "io_uring_setup": 425, "perf_event_open": 298,
        "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438, "pidfd_open": 434,
        "memfd_create": 319, "socketpair": 53, "bind": 49, "listen": 50, "connect": 42, "setsockopt": 54,
        "unshare": 272, "setns": 308, "personality": 135, "prctl": 157, "seccomp": 317, "ftruncate": 77,
        "prlimit64": 302, "open_by_handle_at": 304, "shmget": 29, "splice": 275, "pkey_mprotect": 329,
        "epoll_create1": 291, "symlinkat": 266, "unlinkat": 263, "init_module": 175, "kexec_load": 246,
    },
    "aarch64": {
        "clone": 220, "clone3": 435, "execve": 221, "execveat": 281, "ptrace": 117, "kill": 129, "mount": 40,
        "umount2": 39, "chroot": 51, "setresuid": 147, "capset": 91, "bpf": 280, "keyctl": 219, "add_key": 217,
        "userfaultfd": 282, "io_uring_setup": 425, "perf_event_open": 241, "process_vm_readv": 270,
        "process_vm_writev": 271, "pidfd_getfd": 438, "pidfd_open": 434, "memfd_create": 279, "socketpair": 199,
        "bind": 200, "listen": 201, "connect": 203, "setsockopt": 208, "unshare": 97, "setns": 268,
        "personality": 92, "prctl": 167, "seccomp": 277, "ftruncate": 46, "prlimit64": 261,
        "open_by_handle_at": 265, "shmget": 194, "splice": 76, "pkey_mprotect": 288, "epoll_create1": 20,
        "symlinkat": 36, "unlinkat": 35, "init_module": 105, "kexec_load": 104,
    },
}[os.uname().machine]  # fmt: skip

CLOCKS: dict[str, int] = {
    "x86_64": {"clock_gettime": 228, "gettimeofday": 96},
    "aarch64": {"clock_gettime": 113, "gettimeofday": 169},
}[os.uname().machine]
"""Numbers of calls that are allowed, and that the vDSO hides on most hosts."""


def _kernel_clocks() -> list[int]:
    """What the clocks' calls return: C asks the kernel where the vDSO cannot read the clock, as on Xen."""
    place = ctypes.create_string_buffer(16)
    return [
        libc.syscall(CLOCKS["clock_gettime"], time.CLOCK_REALTIME, place),
        libc.syscall(CLOCKS["gettimeofday"], place, None),
    ]


def _errno_of(action: Callable[[], object]) -> Any:
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def _call(name: str) -> Callable[[], object]:
    def call() -> object:
        result = libc.syscall(ctypes.c_long(NUMBERS[name]), *[ctypes.c_long(0)] * 6)
        return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]

    return call


def _shared_memory(size: int) -> object:
    return mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def _private_memory() -> object:
    try:
        bytearray(512 * MEBIBYTE)
    except MemoryError:
        return "MemoryError"
    return "done"


def _make_executable() -> object:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC)


def _map_executable() -> object:
    return mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC)


def _open_many() -> object:
    count = 0
    try:
        while True:
            os.dup(0)
            count += 1
    except OSError as error:
        return [count, errno.errorcode[error.errno or 0]]


def _in_thread(action: Callable[[], object]) -> Callable[[], object]:
    """The action, in a thread that was started before the filter was put on."""
    go = threading.Event()
    answers: list[object] = []

    def work() -> None:
        go.wait()
        answers.append(action())

    thread = threading.Thread(target=work)
    thread.start()

    def run() -> object:
        go.set()
        thread.join()
        return answers[0]

    return run


def _many_threads() -> Callable[[], object]:
    stop = threading.Event()
    count, failure = 0, ""
    try:
        while count < 200:
            threading.Thread(target=stop.wait, daemon=True).start()
            count += 1
    except RuntimeError as error:
        failure = str(error)
    return lambda: [count, failure]


def _write_to_memfd() -> Callable[[], object]:
    fd = os.memfd_create("journal")

    def run() -> object:
        return [_errno_of(functools.partial(os.pwrite, fd, b"x", at)) for at in (0, 4095, 4096, MEBIBYTE)]

    return run


def _interfaces() -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        ups = []
        for _, name in socket.if_nameindex():
            (flags,) = struct.unpack_from("h", fcntl.ioctl(probe, 0x8913, struct.pack("16sh22x", name.encode(), 0)), 16)
            ups += [name] if flags & 1 else []
        return ups


def _crash() -> object:
    return ctypes.string_at(0)


def _hold() -> Callable[[], object]:
    """Three threads that wait; the main one ends when the launcher's end of the hold closes."""
    stop = threading.Event()
    for _ in range(2):
        threading.Thread(target=stop.wait, daemon=True).start()
    return lambda: os.read(HOLD, 1).decode()


def _ignore_hold() -> object:
    while True:
        time.sleep(60)


def _raise() -> object:
    raise RuntimeError("a fault of the target's")


def _serve() -> Callable[[], object]:
    """What a vtpmd does all day, in the way the standard library does it."""
    journal = os.memfd_create("journal")
    os.ftruncate(journal, 8192)
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    pair = socket.socketpair()
    selector = selectors.DefaultSelector()
    other_selector = selectors.PollSelector()
    condition = threading.Condition()
    jobs: list[str] = []
    done: list[str] = []

    def work() -> None:
        selector.register(wake, selectors.EVENT_READ)
        while selector.select(timeout=5):
            os.eventfd_read(wake)
            with condition:
                job = jobs.pop()
                done.append(job)
                condition.notify_all()
            if job == "stop":
                break
        selector.unregister(wake)

    threading.Thread(target=work, name="tpm").start()

    def ask(job: str) -> bool:
        with condition:
            jobs.append(job)
            os.eventfd_write(wake, 1)
            return condition.wait_for(lambda: job in done, timeout=5)

    def run() -> object:
        checks: dict[str, object] = {"thread": ask("work")}
        with condition:
            checks["timed wait"] = not condition.wait(timeout=0.01)
        time.sleep(0.001)
        link = socket.socket(fileno=LINK)
        # The other end sends a listening socket and a connected one, with one byte.
        data, received, _, _ = socket.recv_fds(link, 16, 4, socket.MSG_CMSG_CLOEXEC)
        checks["descriptors"] = [data.decode(), len(received)]
        guest = socket.socket(fileno=received[1])
        guest.setblocking(False)
        other_selector.register(guest, selectors.EVENT_READ)
        checks["poll"] = len(other_selector.select(timeout=5))
        checks["peek"] = guest.recv(5, socket.MSG_PEEK).decode()
        checks["received"] = guest.recv(64).decode()
        with mmap.mmap(journal, 8192) as view:
            view[4096:4105] = b"answer..."
        os.lseek(journal, 4096, os.SEEK_SET)
        checks["journal"] = [os.sendfile(guest.fileno(), journal, None, 9), os.lseek(journal, 0, os.SEEK_CUR)]
        checks["pread"] = os.pread(journal, 6, 4096).decode()
        guest.sendmsg([b"in ", b"parts"])
        guest.shutdown(socket.SHUT_WR)
        listener = socket.socket(fileno=received[0])
        listener.settimeout(5)
        client, _ = listener.accept()
        checks["client"] = client.recv(16).decode()
        checks["peer"] = len(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        client.sendall(b"welcome")
        pair[0].sendall(b"wake")
        checks["socketpair"] = pair[1].recv(16).decode()
        checks["clocks"] = _kernel_clocks()
        checks["random"] = len(os.urandom(32))
        checks["big block"] = len(bytearray(8 * MEBIBYTE) + bytes(8 * MEBIBYTE))
        with os.fdopen(os.dup(journal), "rb") as file:  # tolerates what fstat and isatty answer
            checks["file"] = file.read(0).decode()
        checks["late import"] = _late_import()
        for sock in (client, listener, guest):
            sock.close()
        link.detach()
        checks["stop"] = ask("stop")
        return checks

    return run


def _late_import() -> str:
    try:
        import wave  # noqa: F401
    except ImportError as error:
        return type(error).__name__
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def _now(action: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    return lambda: action


ATTEMPTS: dict[str, Callable[[], Callable[[], object]]] = {
    "nothing": _now(lambda: "done"),
    "hold": _hold,
    "ignore hold": _now(_ignore_hold),
    "raise": _now(_raise),
    "serve": _serve,
    "open to read": _now(lambda: _errno_of(lambda: os.open("/etc/passwd", os.O_RDONLY))),
    "open to write": _now(lambda: _errno_of(lambda: os.open("/made", os.O_WRONLY | os.O_CREAT))),
    "list root": _now(lambda: _errno_of(lambda: os.listdir("/"))),
    "stat": _now(lambda: _errno_of(lambda: os.stat("/etc/passwd"))),
    "isatty": _now(lambda: os.isatty(0)),
    "socket inet": _now(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()),
    "socket unix": _now(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()),
    "socket netlink": _now(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
    "interfaces": _now(_interfaces),
    "dumpable": _now(lambda: libc.prctl(3, 0, 0, 0, 0)),
    "start thread": _now(lambda: threading.Thread(target=int).start()),
    "os.fork": _now(lambda: os.fork() and "done"),
    "run program": _now(lambda: subprocess.run(["/bin/true"], check=False).returncode),
    "signal everyone": _now(lambda: _errno_of(lambda: os.kill(-1, 0))),
    "setuid back": _now(lambda: os.setresuid(0, 0, 0)),
    "tty input": _now(lambda: fcntl.ioctl(0, TIOCSTI, b"x")),
    "make executable": _now(_make_executable),
    "map executable": _now(_map_executable),
    "x32 call": _now(lambda: libc.syscall(ctypes.c_long(0x40000000 + 39))),
    "private memory": _now(_private_memory),
    "shared memory": _now(lambda: _errno_of(lambda: _shared_memory(512 * MEBIBYTE))),
    "descriptors": _now(_open_many),
    "many threads": _many_threads,
    "memfd": _write_to_memfd,
    "crash": _now(_crash),
    "abort": _now(os.abort),
    "socket in thread": lambda: _in_thread(lambda: socket.socket().close()),
    "signal itself": _now(lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)),
    **{f"call {name}": _now(_call(name)) for name in NUMBERS},
}


def prepare(spec: Any, keep_fds: tuple[int, ...]) -> Callable[[], int]:
    """Set the named attempt up; what is returned makes it and answers on the link."""
    assert LINK in keep_fds
    attempt = ATTEMPTS[spec.target_args["attempt"]]()

    def run() -> int:
        if spec.target_args.get("ready"):
            os.write(LINK, b"\n")
        answer = attempt()
        os.write(LINK, json.dumps(answer).encode())
        sys.stdout.write("the log works\n")
        return 0

    return run
