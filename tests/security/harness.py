"""Starts probe targets through the real spawn and tells what became of them.

As a module it is called by tests; as a program (`python -m tests.security.harness`) it is a launcher for
itself, so that a test can be the ordinary user, or kill the launcher: it reads calls as JSON from stdin and
answers with JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _cffi_backend

from vtpm.confine import spawn as spawn_module
from vtpm.confine.report import Report
from vtpm.confine.spawn import SpawnedProcess, spawn, wait_confined
from vtpm.confine.spec import AllowList, ConfinementSpec, Limits, Root, UserNamespace
from vtpm.errors import ConfinementError

PROJECT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30.0
ORDINARY_UID = 65534
INSTANCE_UID = 61234
MODES = ["root", "user"] if os.geteuid() == 0 else ["user"]
"""Who the launcher can be here: an ordinary user cannot become root."""


def backend_folder() -> str:
    """The folder that holds cffi's compiled half, which the engine needs."""
    return str(Path(_cffi_backend.__file__).parent)


def make_spec(attempt: str, *, target: str = "probe_target:prepare", **changes: Any) -> ConfinementSpec:
    """A spec for an attempt of probe_target, as root with a uid of its own, else in a user namespace."""
    as_root = os.geteuid() == 0
    limits = Limits(**changes.pop("limits", {}))
    if "root" in changes:
        changes["root"] = Root(tuple(changes["root"]["read_only"]), proc=changes["root"]["proc"])
    if "allow_list" in changes:
        changes["allow_list"] = AllowList(changes["allow_list"])
    target_args = {"attempt": attempt, **changes.pop("target_args", {})}
    fields: dict[str, Any] = {
        "name": "probe",
        "uid": INSTANCE_UID if as_root else os.geteuid(),
        "gid": INSTANCE_UID if as_root else os.getegid(),
        "target": target,
        "import_paths": (str(PROJECT / "src"), str(PROJECT / "tests" / "security"), backend_folder()),
        "keep_fds": (3, 4),
        "hold_fd": 3,
        "user_namespace": UserNamespace.HOST if as_root else UserNamespace.OWN,
        "limits": limits,
        "target_args": target_args,
    }
    return ConfinementSpec(**(fields | changes))


@contextmanager
def weakened(steps: list[str], namespaces: list[str]) -> Iterator[None]:
    """Leave steps and namespaces out, to see that a check finds them missing. Touches this process alone."""
    bootstrap, kinds = spawn_module.BOOTSTRAP, dict(spawn_module.CLONE_NEW)
    removal = (
        f"from vtpm.confine import steps; steps.STEPS = tuple(s for s in steps.STEPS if s.name not in {steps!r}); "
    )
    spawn_module.BOOTSTRAP = bootstrap.replace("from vtpm.confine.__main__", removal + "from vtpm.confine.__main__")
    assert not steps or bootstrap != spawn_module.BOOTSTRAP
    for kind in namespaces:
        spawn_module.CLONE_NEW[kind] = 0
    try:
        yield
    finally:
        spawn_module.BOOTSTRAP = bootstrap
        spawn_module.CLONE_NEW.update(kinds)


class Probe:
    """A started probe: its process, our ends of hold and link, its log and, once confined, its report."""

    def __init__(self, process: SpawnedProcess, hold: socket.socket, link: socket.socket, log_fd: int) -> None:
        self.process, self.hold, self.link, self.log_fd = process, hold, link, log_fd
        self.report: Report = ()

    def wait(self) -> os.waitid_result:
        """Wait for its end, with a time limit, and reap it."""
        assert has_ended(self.process.pidfd, TIMEOUT_S), "the probe did not end"
        result = os.waitid(os.P_PIDFD, self.process.pidfd, os.WEXITED)
        assert result is not None
        return result

    def log(self) -> str:
        """What it wrote to stdout and stderr; only after its end."""
        with open(self.log_fd, "rb", closefd=False) as file:
            return file.read(1 << 16).decode()


def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for a process's end, at most timeout_s."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


@contextmanager
def started(spec: ConfinementSpec, **changes: Any) -> Iterator[Probe]:
    """A probe that is started, not yet waited for; ended and reaped at the end."""
    hold, its_hold = socket.socketpair()
    link, its_link = socket.socketpair()
    log_read, log_write = os.pipe()
    link.settimeout(TIMEOUT_S)
    try:
        with its_hold, its_link:
            try:
                process = spawn(spec, fds={3: its_hold.fileno(), 4: its_link.fileno()} | changes.pop("fds", {}),
                                log_fd=log_write, **changes)  # fmt: skip
            finally:
                os.close(log_write)
        try:
            yield Probe(process, hold, link, log_read)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
            os.close(process.pidfd)
    finally:
        hold.close()
        link.close()
        os.close(log_read)


def attempt(
    name: str,
    *,
    without: list[str] | None = None,
    meanwhile: Callable[[Probe], object] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Make one attempt and tell how it ended.

    Returns:
        answer (JSON value, or None if none came), signal or exit (one of them None), dumped, failure (of
        confinement, or None), report (step to status), log.
    """
    outcome: dict[str, Any] = {"answer": None, "failure": None, "report": {}}
    with weakened(without or [], []), started(make_spec(name, **changes)) as probe:
        try:
            report = wait_confined(probe.process, timeout_s=TIMEOUT_S)
            outcome["report"] = {p.step: p.status.value for p in report}
            if meanwhile is not None:
                meanwhile(probe)
            answer = probe.link.recv(1 << 16)
            outcome["answer"] = json.loads(answer) if answer else None
        except ConfinementError as error:
            outcome["failure"] = str(error)
        ended = probe.wait()
        by_signal = ended.si_code != os.CLD_EXITED
        outcome["signal"] = signal.Signals(ended.si_status).name if by_signal else None
        outcome["exit"] = None if by_signal else ended.si_status
        outcome["dumped"] = ended.si_code == os.CLD_DUMPED
        outcome["log"] = probe.log()
    return outcome


@functools.cache
def _readable_copy() -> Path:
    """A copy of what a launcher runs, for the ordinary user, who may not read the checkout."""
    folder = tempfile.TemporaryDirectory(prefix="vtpm-test-")
    atexit.register(folder.cleanup)
    copy = Path(folder.name)
    copy.chmod(0o755)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "src" / "vtpm", copy / "src" / "vtpm", ignore=ignored)
    shutil.copytree(PROJECT / "tests" / "security", copy / "tests" / "security", ignore=ignored)
    (copy / "tests" / "__init__.py").touch()
    (copy / "backend").mkdir()
    shutil.copy(_cffi_backend.__file__, copy / "backend")
    return copy


def _launcher(mode: str, what: str) -> dict[str, Any]:
    """Arguments of subprocess for a launcher of that mode."""
    if mode == "root" or os.geteuid() != 0:
        place, path, changes = PROJECT, [PROJECT / "src", backend_folder()], {}
    else:
        place = _readable_copy()
        path = [place / "src", place / "backend"]
        changes = {"user": ORDINARY_UID, "group": ORDINARY_UID, "extra_groups": []}
    return {
        "args": [os.path.realpath(sys._base_executable), "-B", "-m", "tests.security.harness", what],
        "cwd": place,
        "env": {"PYTHONPATH": ":".join(map(str, path))},
        "text": True,
        **changes,
    }


def attempts(mode: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make attempts (arguments of `attempt`) in a launcher of that mode."""
    done = subprocess.run(**_launcher(mode, "attempts"), input=json.dumps(calls), capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    outcomes: list[dict[str, Any]] = json.loads(done.stdout)
    return outcomes


class LiveProbe:
    """A probe that lives under a launcher of its own, to be looked at from outside."""

    def __init__(self, launcher: subprocess.Popen[str], pid: int, pidfd: int) -> None:
        self.launcher, self.pid, self.pidfd = launcher, pid, pidfd


@contextmanager
def live(mode: str, name: str = "hold", *, without: list[str] | None = None,
         namespaces: list[str] | None = None) -> Iterator[LiveProbe]:  # fmt: skip
    """A confined probe that runs while the caller looks at it."""
    call = {"name": name, "without": without or [], "namespaces": namespaces or []}
    with subprocess.Popen(**_launcher(mode, "live"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdin is not None and launcher.stdout is not None
        launcher.stdin.write(json.dumps(call) + "\n")
        launcher.stdin.flush()
        answer = json.loads(launcher.stdout.readline() or '{"failure": "the launcher died"}')
        assert "pid" in answer, answer
        pidfd = os.pidfd_open(answer["pid"])
        try:
            yield LiveProbe(launcher, answer["pid"], pidfd)
        finally:
            launcher.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert has_ended(pidfd, TIMEOUT_S)
            os.close(pidfd)


def _live_launcher() -> None:
    call = json.loads(sys.stdin.readline())
    with (
        weakened(call["without"], call["namespaces"]),
        started(make_spec(call["name"], name="web1", target_args={"ready": True})) as probe,
    ):
        try:
            wait_confined(probe.process, timeout_s=TIMEOUT_S)
            probe.link.recv(1)
        except ConfinementError as error:
            print(json.dumps({"failure": str(error)}), flush=True)
            return
        print(json.dumps({"pid": probe.process.pid}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "attempts":
        print(json.dumps([attempt(**call) for call in json.load(sys.stdin)]))
    else:
        _live_launcher()
