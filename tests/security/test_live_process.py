"""Looks at a live confined process from outside, then leaves steps out and sees each check notice."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.security.harness import INSTANCE_UID, MODES, ORDINARY_UID, live

NAMESPACES = ("pid", "mnt", "net", "ipc", "uts", "cgroup")
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapAmb")
THREADS = 3


@dataclass(frozen=True)
class Facts:
    """What /proc and ps say of a process; `threads` holds each thread's status fields."""

    threads: tuple[dict[str, str], ...]
    namespaces: dict[str, str]
    root: list[str]
    descriptors: list[int]
    limits: dict[str, tuple[str, str]]
    comm: str
    cmdline: bytes
    ps: str
    owner: int
    session: int


def _look(pid: int) -> Facts:
    proc = Path(f"/proc/{pid}")
    limits = {}
    for line in (proc / "limits").read_text().splitlines()[1:]:
        limits[line[:26].strip()] = tuple(line[26:].split()[:2])
    return Facts(
        threads=tuple(
            dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            for task in (proc / "task").iterdir()
        ),
        namespaces={path.name: os.readlink(path) for path in (proc / "ns").iterdir()},
        root=os.listdir(proc / "root"),
        descriptors=sorted(map(int, os.listdir(proc / "fd"))),
        limits=limits,
        comm=(proc / "comm").read_text().strip(),
        cmdline=(proc / "cmdline").read_bytes(),
        ps=subprocess.run(
            ["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, timeout=10, check=True
        ).stdout,
        owner=(proc / "stat").stat().st_uid,
        session=os.getsid(pid),
    )


def _all(facts: Facts, field: str, value: str) -> bool:
    return all(thread[field].strip() == value for thread in facts.threads)


def _separate(kinds: tuple[str, ...]) -> Callable[[Facts], bool]:
    def holds(facts: Facts) -> bool:
        return all(facts.namespaces[kind] != os.readlink(f"/proc/self/ns/{kind}") for kind in kinds)

    return holds


ROOT_CHECKS: dict[str, Callable[[Facts], bool]] = {
    "seccomp": lambda facts: len(facts.threads) == THREADS and _all(facts, "Seccomp", "2"),
    "pid namespace": _separate(("pid",)),
    "mount namespace": _separate(("mnt",)),
    "net namespace": _separate(("net",)),
    "ipc namespace": _separate(("ipc",)),
    "uts namespace": _separate(("uts",)),
    "cgroup namespace": _separate(("cgroup",)),
    "root": lambda facts: facts.root == [],
    "no capability": lambda facts: all(_all(facts, name, "0" * 16) for name in CAPABILITY_SETS),
    "bounding set": lambda facts: _all(facts, "CapBnd", "0" * 16),
    "no_new_privs": lambda facts: _all(facts, "NoNewPrivs", "1"),
    "descriptors": lambda facts: facts.descriptors == [0, 1, 2, 3, 4],
    "core limit": lambda facts: facts.limits["Max core file size"] == ("0", "0"),
    "file limit": lambda facts: facts.limits["Max file size"] == ("0", "0"),
    "memory limit": lambda facts: facts.limits["Max address space"] == ("268435456", "268435456"),
    "data limit": lambda facts: facts.limits["Max data size"] == ("268435456", "268435456"),
    "descriptor limit": lambda facts: facts.limits["Max open files"] == ("64", "64"),
    "process limit": lambda facts: facts.limits["Max processes"] == ("16", "16"),
    "locked memory limit": lambda facts: facts.limits["Max locked memory"] == ("0", "0"),
    "title": lambda facts: (facts.comm, facts.cmdline, facts.ps) == ("vtpmd", b"vtpmd web1\0", "vtpmd web1\n"),
    "uid": lambda facts: _all(facts, "Uid", "\t".join([str(INSTANCE_UID)] * 4)),
    "gid": lambda facts: _all(facts, "Gid", "\t".join([str(INSTANCE_UID)] * 4)),
    "groups": lambda facts: _all(facts, "Groups", ""),
    "owner of /proc/PID": lambda facts: facts.owner == 0,
    "session": lambda facts: facts.session != os.getsid(0),
}

USER_CHECKS = {
    name: check for name, check in ROOT_CHECKS.items() if name not in {"uid", "gid", "groups", "owner of /proc/PID"}
} | {
    "user namespace": _separate(("user",)),
    "user's uid": lambda facts: _all(facts, "Uid", "\t".join([str(os.geteuid() or ORDINARY_UID)] * 4)),
}
CHECKS = {"root": ROOT_CHECKS, "user": USER_CHECKS}

NAMESPACE_STEPS = ["namespaces", "network"]
LOST_WITHOUT: dict[str, tuple[list[str], list[str]]] = {
    # check: (steps to leave out, namespaces to leave out)
    "seccomp": (["seccomp"], []),
    "net namespace": (NAMESPACE_STEPS, ["net"]),
    "pid namespace": (NAMESPACE_STEPS, ["pid"]),
    "ipc namespace": (NAMESPACE_STEPS, ["ipc"]),
    "uts namespace": (NAMESPACE_STEPS, ["uts"]),
    "cgroup namespace": (NAMESPACE_STEPS, ["cgroup"]),
    "root": (["root"], []),
    "no capability": (["capabilities"], []),
    "bounding set": (["bounding"], []),
    "no_new_privs": (["no_new_privs", "seccomp"], []),
    "core limit": (["rlimits"], []),
    "file limit": (["rlimits"], []),
    "memory limit": (["rlimits"], []),
    "data limit": (["rlimits"], []),
    "descriptor limit": (["rlimits"], []),
    "process limit": (["rlimits"], []),
    "locked memory limit": (["rlimits"], []),
    "title": (["title"], []),
    "uid": (["identity"], []),
    "gid": (["identity"], []),
}
PAIRS = [(mode, check) for mode in MODES for check in CHECKS[mode]]
LOST_PAIRS = [(mode, check) for mode, check in PAIRS if check in LOST_WITHOUT]


@functools.cache
def _facts(mode: str, without: tuple[str, ...] = (), namespaces: tuple[str, ...] = ()) -> Facts:
    with live(mode, without=list(without), namespaces=list(namespaces)) as probe:
        return _look(probe.pid)


@pytest.mark.parametrize(("mode", "check"), PAIRS)
def test_protection_is_seen_from_outside_when_process_is_live(mode: str, check: str) -> None:
    facts = _facts(mode)
    assert CHECKS[mode][check](facts), facts


@pytest.mark.parametrize(("mode", "check"), LOST_PAIRS)
def test_check_notices_when_its_step_is_left_out(mode: str, check: str) -> None:
    steps, namespaces = LOST_WITHOUT[check]
    facts = _facts(mode, tuple(steps), tuple(namespaces))
    assert not CHECKS[mode][check](facts), facts
