"""The process domain: a vtpmd in a confined process of its own on the host. For the launcher."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import signal
from pathlib import Path

from vtpm.confine.report import Report
from vtpm.confine.spawn import SpawnedProcess, spawn, wait_confined
from vtpm.confine.spec import ConfinementSpec, UserNamespace
from vtpm.domains.base import DomainPlan, RunningDomain
from vtpm.domains.waiting import readable
from vtpm.errors import DomainError
from vtpm.measurement.closure import measurement_of, read_contents
from vtpm.measurement.digest import Contents
from vtpm.wire.instance_spec import InstanceFd

TARGET = "vtpm.instance.main:prepare"
_REPORT_TIMEOUT_S = 5.0
_READY_S = 10
_MAX_LABEL_CHARS = 64
_LIBTPMS_FILE = re.compile(r"libtpms\.so\.([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})")
_PACKAGES = ("confine", "engine", "guest_link", "instance", "tpm", "wire")


class ProcessDomain:
    """Starts vtpmds as confined processes; as root each under a uid of its own, otherwise in a user namespace."""

    def __init__(self) -> None:
        self._import_paths = _import_paths()
        self._contents: Contents = {}
        self._measurement = ""

    @property
    def measurement(self) -> str:
        """SHA-256, in hex, over interpreter, engine, libtpms and every module of vtpm that an instance runs."""
        return self._measurement

    @property
    def engine_version(self) -> int:
        """That in the name of libtpms' file; see Domain."""
        found = _LIBTPMS_FILE.fullmatch(next((path.resolve().name for path in _libtpms()), ""))
        return int(found[1]) << 16 | int(found[2]) << 8 | int(found[3]) if found else 0

    @property
    def label(self) -> str:
        """Versions of vtpm and libtpms."""
        libtpms = "".join(f", {path.resolve().name}" for path in _libtpms())
        return f"vtpm {importlib.metadata.version('vtpm')}{libtpms}"[:_MAX_LABEL_CHARS]

    async def prepare(self) -> None:
        """Measure it, as far as the kernel says that it may have changed since the last time; see Domain."""
        await asyncio.to_thread(self._measure)

    def _measure(self) -> None:
        # By the last parts of its place, so that the same software elsewhere has the same measurement.
        files = {"/".join(path.parts[-3:]): path for path in _closure(self._import_paths)}
        self._contents = read_contents(files, self._contents)
        self._measurement = measurement_of(self._contents)

    @property
    def ready_within_s(self) -> int:
        """It is there as soon as it is confined."""
        return _READY_S

    def start(self, plan: DomainPlan) -> RunningDomain:
        """Start a confined vtpmd; see Domain."""
        root = os.geteuid() == 0
        spec = ConfinementSpec(
            name=plan.name,
            uid=plan.uid if root else os.geteuid(),
            gid=plan.uid if root else os.getegid(),
            target=TARGET,
            import_paths=self._import_paths,
            keep_fds=tuple(int(fd) for fd in plan.fds),
            hold_fd=int(InstanceFd.HOLD),
            user_namespace=UserNamespace.HOST if root else UserNamespace.OWN,
            target_args=plan.args.to_json(),
        )
        fds = {int(number): fd for number, fd in plan.fds.items()}
        return ConfinedProcess(spawn(spec, fds=fds, log_fd=plan.log_fd))


class ConfinedProcess:
    """One vtpmd process; see RunningDomain."""

    def __init__(self, process: SpawnedProcess) -> None:
        self._process = process
        self._reported = False

    @property
    def pid(self) -> int:
        """Process id on the host."""
        return self._process.pid

    async def confined(self) -> Report:
        """Return what is in force; see RunningDomain."""
        await readable(self._process.report_fd)
        self._reported = True
        return wait_confined(self._process, timeout_s=_REPORT_TIMEOUT_S)

    def kill(self) -> None:
        """Send SIGKILL through the pidfd."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGKILL)

    async def ended(self) -> str:
        """Wait for the end and return it in words."""
        await readable(self._process.pidfd)
        ended = os.waitid(os.P_PIDFD, self._process.pidfd, os.WEXITED)
        os.close(self._process.pidfd)
        if not self._reported:
            # It took too long to be confined, and was killed.
            os.close(self._process.report_fd)
        if ended is None or ended.si_code == os.CLD_EXITED:
            return f"exit status {0 if ended is None else ended.si_status}"
        return f"signal {signal.Signals(ended.si_status).name}"


def _import_paths() -> tuple[str, ...]:
    """Folders that hold vtpm and cffi's runtime: all that an instance imports beside the standard library."""
    backend = importlib.util.find_spec("_cffi_backend")
    package = importlib.util.find_spec("vtpm")
    if backend is None or backend.origin is None or package is None or not package.submodule_search_locations:
        raise DomainError("cffi's runtime module _cffi_backend is not installed", next_step="Run `make install`")
    source = Path(next(iter(package.submodule_search_locations))).resolve().parent
    return tuple(dict.fromkeys((str(source), str(Path(backend.origin).resolve().parent))))


def _closure(import_paths: tuple[str, ...]) -> list[Path]:
    package = Path(import_paths[0]) / "vtpm"
    files = [package / "__init__.py", package / "errors.py"]
    for name in _PACKAGES:
        files += [
            path for path in (package / name).rglob("*") if path.suffix in {".py", ".so", ".toml"} and path.is_file()
        ]
    backend = importlib.util.find_spec("_cffi_backend")
    if backend is not None and backend.origin is not None:
        files.append(Path(backend.origin))
    files.append(Path(os.path.realpath("/proc/self/exe")))
    return files + _libtpms()


def _libtpms() -> list[Path]:
    return [path for path in map(Path, _LIBTPMS_PATHS) if path.exists()]


_LIBTPMS_PATHS = (
    "/usr/lib/x86_64-linux-gnu/libtpms.so.0",
    "/usr/lib/aarch64-linux-gnu/libtpms.so.0",
    "/usr/lib64/libtpms.so.0",
    "/usr/lib/libtpms.so.0",
)
