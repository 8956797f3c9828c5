"""The steps that lock a process in, in order, each with what it is for.

Runs inside the process that is to be confined, from `__main__` (or, later, in a child of a warm parent); the
functions look at and change the calling process and nothing else. Every step checks its own effect. STEPS is
the one place that says what is done and when:

 1. descriptors    exactly the expected ones are open, none a folder, a disk or a file that has a name
 2. namespaces     pid, mount, net, ipc, uts (cgroup, user) differ from the launcher's; this is process 1 of
                   its own
 3. title          `ps` shows "vtpmd NAME"; done while /proc is there to say where the arguments are
 4. import         the target and all that it needs, and the filter, while there still are files; no thread
                   may exist
 5. rlimits        no core, no files, little memory, few descriptors and threads, one malloc arena
 6. network        every interface of the new network namespace is down
 7. root           an empty read-only tmpfs becomes the root; the old one is detached: there is no file system, but
                   what the spec names, read-only
 8. bounding       bounding and ambient sets emptied, securebits locked: needs capabilities, so before they go
 9. identity       own uid and gid, no groups
10. capabilities   all sets cleared, after the uid change, which would need them
11. dumpable       no core dump, no ptrace, /proc/PID owned by root; after the uid change, which resets it
12. no_new_privs   execve gives nothing
13. parent         SIGKILL when the launcher dies (the uid change would cancel it), and it is alive now
14. prepare        the target makes its threads, memfds and epoll objects; it has not read a byte of a guest's
                   yet
15. seccomp        the allow-list, on all threads

Steps 5 to 13 change the calling thread or are inherited from it, so no other thread exists until 14.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import resource
import select
import socket
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vtpm.confine import kernel
from vtpm.confine.bpf import assemble, pack
from vtpm.confine.policy import policy_of, rules_for
from vtpm.confine.report import Protection, ProtectionStatus, Report
from vtpm.confine.spec import AllowList, ConfinementSpec, UserNamespace
from vtpm.confine.title import set_title
from vtpm.errors import ConfinementError

Run = Callable[[], int]
Prepare = Callable[[ConfinementSpec, tuple[int, ...]], Run]
Outcome = tuple[ProtectionStatus, str]

IN_FORCE, WEAKER = ProtectionStatus.IN_FORCE, ProtectionStatus.WEAKER
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1


@dataclass
class Context:
    """What the steps of one confinement hand on to each other.

    Args:
        spec: what the launcher asked for.
        launcher_namespaces: inode by the name in /proc/PID/ns, as the launcher sees its own.
        own_fds: descriptors that the confinement program itself still needs and closes before the target
            serves.
    """

    spec: ConfinementSpec
    launcher_namespaces: Mapping[str, int]
    own_fds: tuple[int, ...] = ()
    prepare: Prepare | None = None
    seccomp_program: bytes = b""
    run: Run | None = None


@dataclass(frozen=True)
class Step:
    """A named step; `apply` raises OSError or ConfinementError if it cannot be taken."""

    name: str
    apply: Callable[[Context], Outcome]


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ConfinementError(why)


def _descriptors(context: Context) -> Outcome:
    with os.scandir("/proc/self/fd") as entries:
        listed = {int(entry.name) for entry in entries}
    is_open = {fd for fd in listed if _is_open(fd)}  # the one that listed the folder is closed by now
    expected = {0, 1, 2, *context.spec.keep_fds, *context.own_fds}
    _require(is_open == expected, f"descriptors {sorted(is_open)} are open, not {sorted(expected)}")
    for fd in sorted(is_open):
        status = os.fstat(fd)
        _require(not stat.S_ISDIR(status.st_mode), f"descriptor {fd} is a folder, a way to the host's files")
        _require(not stat.S_ISBLK(status.st_mode), f"descriptor {fd} is a disk")
        _require(
            not (stat.S_ISREG(status.st_mode) and status.st_nlink),
            f"descriptor {fd} is a file with a name in a file system",
        )
    return IN_FORCE, "only the links and the log are open"


def _is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def _namespaces(context: Context) -> Outcome:
    own = namespace_inodes()
    missing = {"pid", "mnt", "net", "ipc", "uts"} - set(own)
    _require(not missing, f"this kernel has no namespaces of kind {', '.join(sorted(missing))}")
    kinds = set(own) - {"user"} | ({"user"} if context.spec.user_namespace is UserNamespace.OWN else set())
    shared = sorted(kind for kind in kinds if own[kind] == context.launcher_namespaces.get(kind))
    _require(not shared, f"it shares the launcher's namespaces of kind {', '.join(shared)}")
    _require(os.getpid() == 1, "it is not the first process of its PID namespace")
    return IN_FORCE, f"own {', '.join(sorted(kinds))}"


def namespace_inodes() -> dict[str, int]:
    """Return this process's namespaces: inode by kind, of those kinds that spawn makes anew."""
    kinds = ("pid", "mnt", "net", "ipc", "uts", "cgroup", "user")
    return {kind: Path("/proc/self/ns", kind).stat().st_ino for kind in kinds if Path("/proc/self/ns", kind).exists()}


def _title(context: Context) -> Outcome:
    title = set_title(context.spec.program, context.spec.name)
    return IN_FORCE, f"shown as {title}; arguments overwritten"


def _import(context: Context) -> Outcome:
    module_name, _, function_name = context.spec.target.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfinementError(
            f"the target {context.spec.target} cannot be imported: {error}", next_step="Check import_paths."
        ) from error
    context.prepare = function
    if context.spec.allow_list is not AllowList.OWN:
        machine = kernel.machine()
        context.seccomp_program = pack(assemble(machine, rules_for(machine, policy_of(context.spec.allow_list))))
    _require(len(list(Path("/proc/self/task").iterdir())) == 1, "importing the target started a thread")
    return IN_FORCE, "the target was loaded before the lock-down"


def _rlimits(context: Context) -> Outcome:
    limits = context.spec.limits
    kernel.limit_malloc_arenas()
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_DATA: limits.memory_bytes,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)
        # A host that allows less stays in force: raising it would need a privilege.
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (value, value))
        _require(resource.getrlimit(kind) == (value, value), f"resource limit {kind} did not take")
    return IN_FORCE, (
        f"memory {limits.memory_bytes} bytes, {limits.open_files} descriptors, {limits.processes} threads, no core dump"
    )


def _network(_context: Context) -> Outcome:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("16sh22x", name.encode(), 0)
            (flags,) = struct.unpack_from("h", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)
            _require(not flags & _IFF_UP, f"network interface {name} is up")
    return IN_FORCE, "no interface is up"


def _root(context: Context) -> Outcome:
    wanted = context.spec.root
    kernel.mount(b"none", b"/", None, kernel.MS_REC | kernel.MS_PRIVATE, None)
    # Any folder serves as the place to mount on; /proc is one that is there for sure and is not needed any
    # more.
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    inodes = 1 + 4 * (len(wanted.read_only) + wanted.proc)
    kernel.mount(b"vtpmd", b"/proc", b"tmpfs", flags, f"size=4k,nr_inodes={inodes},mode=0555".encode())
    os.chdir("/proc")
    for path in wanted.read_only:
        _show(path)
    if wanted.proc:
        Path("proc").mkdir()
        kernel.mount(b"proc", b"proc", b"proc", kernel.MS_RDONLY | flags, None)
    kernel.mount(b"vtpmd", b".", None, kernel.MS_REMOUNT | kernel.MS_RDONLY | flags, None)
    kernel.pivot_root_here()
    os.chdir("/")
    expected = {path.split("/")[1] for path in wanted.read_only} | ({"proc"} if wanted.proc else set())
    _require(
        {entry.name for entry in Path("/").iterdir()} == expected, "the new root holds other things than it should"
    )
    _require(bool(os.statvfs("/").f_flag & os.ST_RDONLY), "the new root is not read-only")
    for path in wanted.read_only:
        is_folder = stat.S_ISDIR(Path(path).lstat().st_mode)
        _require(not is_folder or bool(os.statvfs(path).f_flag & os.ST_RDONLY), f"{path} is not read-only")
    if not expected:
        return IN_FORCE, "an empty read-only root; no file system"
    return IN_FORCE, f"a read-only root with {', '.join(sorted((*wanted.read_only, *(['/proc'] * wanted.proc))))} alone"


def _show(path: str) -> None:
    """Make something of the host's files appear under the working directory, which becomes the root."""
    source, place = Path(path), Path(path.removeprefix("/"))
    place.parent.mkdir(parents=True, exist_ok=True)
    mode = source.lstat().st_mode
    if stat.S_ISLNK(mode):
        place.symlink_to(source.readlink())
        return
    if stat.S_ISDIR(mode):
        place.mkdir()
    else:
        place.touch(0o444)
    kernel.mount(os.fsencode(source), os.fsencode(place), None, kernel.MS_BIND, None)
    # A mount in a user namespace keeps the flags that it had outside, so they have to be named again.
    had = os.statvfs(place).f_flag
    kept = (os.ST_NOSUID, kernel.MS_NOSUID), (os.ST_NOEXEC, kernel.MS_NOEXEC), (os.ST_NODEV, kernel.MS_NODEV)
    times = (os.ST_NOATIME, kernel.MS_NOATIME), (os.ST_NODIRATIME, kernel.MS_NODIRATIME)
    flags = sum(flag for bit, flag in (*kept, *times, (os.ST_RELATIME, kernel.MS_RELATIME)) if had & bit)
    flags |= kernel.MS_RDONLY | kernel.MS_NOSUID
    if not stat.S_ISCHR(mode):
        flags |= kernel.MS_NODEV
    kernel.mount(b"none", os.fsencode(place), None, kernel.MS_REMOUNT | kernel.MS_BIND | flags, None)


def _bounding(_context: Context) -> Outcome:
    kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    dropped = 0
    while True:
        try:
            has_it = kernel.prctl(kernel.PR_CAPBSET_READ, dropped)
        except OSError:  # EINVAL: past the last capability that this kernel knows
            break
        if has_it:
            kernel.prctl(kernel.PR_CAPBSET_DROP, dropped)
        dropped += 1
    _require(dropped > 30, "the kernel does not say which capabilities it knows")
    kernel.prctl(kernel.PR_SET_SECUREBITS, kernel.SECUREBITS_LOCKED)
    _require(kernel.prctl(kernel.PR_GET_SECUREBITS) == kernel.SECUREBITS_LOCKED, "securebits did not take")
    return IN_FORCE, "capability bounding and ambient sets empty, securebits locked"


def _identity(context: Context) -> Outcome:
    spec = context.spec
    if spec.user_namespace is UserNamespace.OWN:
        _require(os.getresuid() == (0, 0, 0), "its user namespace does not map the launcher's uid")
        return WEAKER, "runs as the user who started it (groups too), in a user namespace of its own"
    os.setgroups([])
    os.setresgid(spec.gid, spec.gid, spec.gid)
    os.setresuid(spec.uid, spec.uid, spec.uid)
    _require(os.getresuid() == (spec.uid,) * 3, "the uid did not take")
    _require(os.getresgid() == (spec.gid,) * 3 and os.getgroups() == [], "the gid did not take")
    return IN_FORCE, f"uid {spec.uid}, gid {spec.gid}, no groups"


def _capabilities(_context: Context) -> Outcome:
    kernel.clear_capabilities()
    _require(not kernel.has_capabilities(), "capabilities are left")
    return IN_FORCE, "no capability"


def _dumpable(context: Context) -> Outcome:
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    _require(kernel.prctl(kernel.PR_GET_DUMPABLE) == 0, "it can still be dumped")
    if context.spec.user_namespace is UserNamespace.OWN:
        # Who made a user namespace has every capability over it, CAP_SYS_PTRACE among them.
        return WEAKER, "no core dump; other processes of the user who started it can look into it"
    return IN_FORCE, "no core dump, no ptrace by its own uid"


def _no_new_privs(_context: Context) -> Outcome:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    _require(kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1, "no_new_privs did not take")
    return IN_FORCE, "execve gives no privilege"


def _parent(context: Context) -> Outcome:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, 9)
    # The launcher may have died before the line above. Its pid cannot be seen from this PID namespace; its
    # end of the hold can.
    poller = select.poll()
    poller.register(context.spec.hold_fd, 0)
    _require(not poller.poll(0), "the launcher's end of the hold descriptor is closed")
    return IN_FORCE, "killed when the launcher dies"


def _prepare(context: Context) -> Outcome:
    _require(context.prepare is not None, "the target was not imported")
    assert context.prepare is not None
    run = context.prepare(context.spec, context.spec.keep_fds)
    _require(callable(run), f"the target {context.spec.target} returned nothing to run")
    context.run = run
    return IN_FORCE, "the target made its threads before the filter"


def _seccomp(context: Context) -> Outcome:
    if context.spec.allow_list is AllowList.OWN:
        return WEAKER, "the program that is executed now is to put on a filter of its own"
    _require(bool(context.seccomp_program), "there is no filter")
    kernel.install_seccomp_filter(context.seccomp_program)
    return IN_FORCE, "system call allow-list on every thread"


STEPS: tuple[Step, ...] = (
    Step("descriptors", _descriptors),
    Step("namespaces", _namespaces),
    Step("title", _title),
    Step("import", _import),
    Step("rlimits", _rlimits),
    Step("network", _network),
    Step("root", _root),
    Step("bounding", _bounding),
    Step("identity", _identity),
    Step("capabilities", _capabilities),
    Step("dumpable", _dumpable),
    Step("no_new_privs", _no_new_privs),
    Step("parent", _parent),
    Step("prepare", _prepare),
    Step("seccomp", _seccomp),
)


def lock_in(context: Context) -> Report:
    """Take every step, in order.

    Returns:
        What is now in force; `context.run` then holds what the target gave to run.
    Raises:
        ConfinementError: a step failed; the message names it. The process is half confined and must end.
    """
    report: list[Protection] = []
    for step in STEPS:
        try:
            status, why = step.apply(context)
        except (OSError, ConfinementError) as error:
            reason = error.message if isinstance(error, ConfinementError) else str(error)
            raise ConfinementError(
                f"confinement of {context.spec.name} failed at step {step.name}: {reason}",
                next_step=getattr(error, "next_step", ""),
            ) from error
        report.append(Protection(step.name, status, why))
    sys.stdout.flush()
    return tuple(report)
