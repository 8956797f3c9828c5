"""Starts a confined process: the launcher's half of confinement.

For the launcher and the process domain. `spawn` makes the process in new namespaces and gives it nothing but
a bare interpreter, its links and its spec; locking in is the process's own work (`__main__`, `steps`).

How the process comes to be, in order:

 1. fork a helper. It has one thread whatever the launcher has, and glibc's locks are in order in it, which a
    bare clone3 out of the launcher could not promise;
 2. the helper calls clone3 with CLONE_PARENT, CLONE_PIDFD and the namespaces: the new process is process 1 of
    its own PID namespace *and the launcher's child*, so the launcher gets its exit status and its death
    signal works;
 3. the helper hands pid and pidfd over and ends; it is reaped before spawn returns;
 4. the process (UserNamespace.OWN: maps the launcher's uid to 0 inside), starts a session, puts its
    descriptors at the numbers asked, closes all others, resets signals, and execs the base interpreter with
    -I -S -B and an empty environment;
 5. the launcher calls `place` (a hook for control groups) and only then writes the spec, which the process
    waits for.

The interpreter's argv[0] is its real path, because some builds of Python find their library by it; the title
step overwrites all arguments. They hold no more than two descriptor numbers, namespace inodes and the import
paths.

What a caller must know: the death signal fires when the *thread* that called spawn ends, so call it from one
that lives as long as the launcher. Being process 1 of a PID namespace, the process ignores SIGTERM that it
has no handler for: end it with SIGKILL through its pidfd, or by closing the hold. `log_fd` must be a pipe or
socket, not a file: the process may not write to files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vtpm.confine import kernel
from vtpm.confine.interpreter import cache_options
from vtpm.confine.report import MAX_REPORT_BYTES, Report, decode_report, encode_failure
from vtpm.confine.spec import ConfinementSpec, UserNamespace, encode_spec
from vtpm.confine.steps import namespace_inodes
from vtpm.errors import ConfinementError

CLONE_NEW = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
BOOTSTRAP = (
    "import sys; sys.path += sys.argv[4:]; from vtpm.confine.__main__ import end, main; "
    "end(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))"
)
_MAX_FD = 2**31 - 1


@dataclass(frozen=True)
class SpawnedProcess:
    """A process that spawn made, child of the launcher. Its caller owns the descriptors and must reap it.

    Args:
        pid: in the launcher's PID namespace.
        pidfd: refers to the process for ever; readable when it has ended; os.waitid(os.P_PIDFD, pidfd,
            os.WEXITED).
        start_time_ticks: field 22 of /proc/PID/stat; with the pid it names the process after a launcher's
            restart.
        report_fd: pipe, non-blocking, that ends after one report: see wait_confined and report.decode_report.
    """

    pid: int
    pidfd: int
    start_time_ticks: int
    report_fd: int


def spawn(
    spec: ConfinementSpec,
    *,
    fds: Mapping[int, int],
    log_fd: int,
    place: Callable[[int], None] | None = None,
) -> SpawnedProcess:
    """Start a process that locks itself in as `spec` says.

    Args:
        spec: what it is and runs.
        fds: descriptor of the launcher's for each of spec.keep_fds; they stay open here.
        log_fd: pipe or socket that becomes the process's stdout and stderr.
        place: called with the pid before the process is given its spec, to put it into a control group.
    Returns:
        The process, which is not confined yet: give it no link that matters before wait_confined returned.
    Raises:
        ConfinementError: the spec and fds do not fit together, this user cannot start it so, or the kernel
            refused. No process is left behind.
    """
    encoded = encode_spec(spec)
    _check(spec, fds)
    inodes = namespace_inodes()
    flags = kernel.CLONE_PARENT
    for kind in inodes:
        if kind != "user" or spec.user_namespace is UserNamespace.OWN:
            flags |= CLONE_NEW.get(kind, 0)
    with contextlib.ExitStack() as stack:
        spec_read, spec_write = _pipe(stack)
        report_read, report_write = _pipe(stack)
        spec_fd, report_fd = max(spec.keep_fds) + 1, max(spec.keep_fds) + 2
        entries = ",".join(f"{kind}:{inode}" for kind, inode in inodes.items())
        plan = _Plan(
            user_namespace=spec.user_namespace,
            uid=spec.uid,
            gid=spec.gid,
            fds={1: log_fd, 2: log_fd, **fds, spec_fd: spec_read, report_fd: report_write},
            report_write=report_write,
            report_fd=report_fd,
            arguments=(str(spec_fd), str(report_fd), entries, *spec.import_paths),
        )
        pid, pidfd = _clone(flags, plan)
        stack.callback(os.close, pidfd)
        stack.callback(_end, pidfd)
        os.close(spec_read)
        os.close(report_write)
        try:
            start_time_ticks = _start_time_ticks(pid)
            if place is not None:
                place(pid)
            # One that died already says why in its report.
            with contextlib.suppress(BrokenPipeError):
                _write_all(spec_write, encoded)
        except OSError as error:
            raise ConfinementError(f"{spec.name} could not be given its confinement spec: {error}") from error
        os.close(spec_write)
        os.set_blocking(report_read, False)
        stack.pop_all()
    return SpawnedProcess(pid, pidfd, start_time_ticks, report_read)


def wait_confined(process: SpawnedProcess, *, timeout_s: float) -> Report:
    """Wait until the process is locked in, and close its report pipe.

    Args:
        process: from spawn.
        timeout_s: how long its imports, prepare and steps may take in all.
    Returns:
        What is in force.
    Raises:
        ConfinementError: a step failed (the message names it), the process died, or time is up. The process
            may still be there: kill and reap it.
    """
    deadline_s = time.monotonic() + timeout_s
    poller = select.poll()
    poller.register(process.report_fd, select.POLLIN)
    message = b""
    try:
        while len(message) <= MAX_REPORT_BYTES:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000):
                raise ConfinementError(f"process {process.pid} was not confined within {timeout_s} s")
            chunk = os.read(process.report_fd, MAX_REPORT_BYTES)
            if not chunk:
                break
            message += chunk
    finally:
        os.close(process.report_fd)
    return decode_report(message)


@dataclass(frozen=True)
class _Plan:
    """What the new process does between clone3 and execve."""

    user_namespace: UserNamespace
    uid: int
    gid: int
    fds: Mapping[int, int]
    report_write: int
    report_fd: int
    arguments: tuple[str, ...]


def _check(spec: ConfinementSpec, fds: Mapping[int, int]) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if set(fds) != set(spec.keep_fds):
        raise ConfinementError(
            f"the descriptors for {spec.name} are {sorted(fds)}, its spec keeps {sorted(spec.keep_fds)}"
        )
    if spec.user_namespace is UserNamespace.HOST and uid != 0:
        raise ConfinementError(
            f"{spec.name} cannot get a uid of its own: uid {uid} starts it, not root",
            next_step="An ordinary user needs user_namespace own.",
        )
    if spec.user_namespace is UserNamespace.OWN and (uid == 0 or (spec.uid, spec.gid) != (uid, gid)):
        raise ConfinementError(
            f"{spec.name} in a user namespace of its own must have the uid and gid of an ordinary user who "
            f"starts it, not {spec.uid} and {spec.gid} started by {uid} and {gid}"
        )
    for path in spec.import_paths:
        if not Path(path).is_dir():
            raise ConfinementError(f"the import path {path} of {spec.name} is no folder")


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(_close_if_open, end)
    return ends


def _close_if_open(fd: int) -> None:
    # Only on the way out of a failure, where some of the ends have been closed already.
    with contextlib.suppress(OSError):
        os.close(fd)


def _end(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


def _write_all(fd: int, content: bytes) -> None:
    while content:
        content = content[os.write(fd, content) :]


def _start_time_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _clone(flags: int, plan: _Plan) -> tuple[int, int]:
    """Fork the helper, have it make the process, reap it; return the process's pid and pidfd."""
    ours, helpers = socket.socketpair()
    with ours, helpers:
        # The launcher's Python-level handlers must not run in the children.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            helper = os.fork()
            if helper == 0:
                _help(flags, plan, helpers)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        helpers.close()
        # Not socket.recv_fds, which drops its flags (CPython 3.11) and so would leave the pidfd inheritable.
        message, ancillary, _, _ = ours.recvmsg(64, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        os.waitpid(helper, 0)
    if not ancillary:
        error = os.strerror(int(message)) if message else "the helper process died"
        raise ConfinementError(
            f"no process could be made in new namespaces: {error}",
            next_step="Is the launcher allowed to make namespaces (see user.max_user_namespaces)?",
        )
    return int(message), int.from_bytes(ancillary[0][2][:4], sys.byteorder)


def _help(flags: int, plan: _Plan, helpers: socket.socket) -> NoReturn:
    status = 1
    try:
        pid, pidfd = kernel.clone3(flags)
        if pid == 0:
            _become(plan)
        socket.send_fds(helpers, [str(pid).encode()], [pidfd])
        status = 0
    except OSError as error:
        helpers.send(str(error.errno).encode())
    finally:
        os._exit(status)


def _become(plan: _Plan) -> NoReturn:
    """Turn the fresh process into the confinement program."""
    placed = False
    try:
        if plan.user_namespace is UserNamespace.OWN:
            _map_own_user(plan.uid, plan.gid)
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        _place_descriptors(plan.fds)
        placed = True
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        # Compiled files are written only where this boot's measured ones are kept, and not after privileges are gone.
        options = cache_options() or ("-B",)
        os.execve(interpreter, [interpreter, "-I", "-S", *options, "-c", BOOTSTRAP, *plan.arguments], {})  # noqa: S606
    except (OSError, ConfinementError) as error:
        failure = ConfinementError(f"the confinement program could not be started: {error}")
        with contextlib.suppress(OSError):
            os.write(plan.report_fd if placed else plan.report_write, encode_failure(failure))
    finally:
        os._exit(ConfinementError.exit_status)


def _map_own_user(uid: int, gid: int) -> None:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _place_descriptors(fds: Mapping[int, int]) -> None:
    """Put each descriptor at its number, /dev/null at 0, and close every other one."""
    above = max(fds) + 1
    wanted = {0: os.open("/dev/null", os.O_RDONLY), **fds}
    # Moved out of the way first: a source may stand where another is to go.
    moved = {number: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, above) for number, source in wanted.items()}
    for number, source in moved.items():
        os.dup2(source, number, inheritable=True)
    last = -1
    for number in sorted(wanted):
        if last + 1 < number:  # os.closerange(0, 0) closes everything (CPython 3.11)
            os.closerange(last + 1, number)
        last = number
    os.closerange(last + 1, _MAX_FD)
