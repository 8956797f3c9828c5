"""The process domain: a vtpmd in a confined process of its own on the host. For the launcher."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import sysconfig
from pathlib import Path
from typing import Any

from vtpm.confine.report import Report
from vtpm.confine.spawn import SpawnedProcess, spawn, wait_confined
from vtpm.confine.spec import ConfinementSpec, UserNamespace
from vtpm.domains.base import DomainPlan, RunningDomain
from vtpm.domains.waiting import readable
from vtpm.errors import DomainError
from vtpm.measurement.closure import Closure, Files, find_closure, measurement_of, read_contents
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
        self._contents: Contents = {}
        self._closure: Closure | None = None
        self._measurement = ""

    @property
    def measurement(self) -> str:
        """SHA-256, in hex, over all that an instance runs; see Domain.

        That is interpreter, standard library, the modules of vtpm and the engine that an instance imports, and every
        library that the loader finds for them: libtpms, libcrypto, libc.
        """
        return self._measurement

    @property
    def engine_version(self) -> int:
        """That in the name of libtpms' file; see Domain."""
        found = _LIBTPMS_FILE.fullmatch(self._libtpms())
        return int(found[1]) << 16 | int(found[2]) << 8 | int(found[3]) if found else 0

    @property
    def label(self) -> str:
        """Version of vtpm, and libtpms' file; see Domain."""
        return f"vtpm {importlib.metadata.version('vtpm')}, {self._libtpms()}"[:_MAX_LABEL_CHARS]

    async def prepare(self) -> None:
        """Measure it, as far as the kernel says that it may have changed since the last time; see Domain."""
        await asyncio.to_thread(self._measure)

    def _measure(self) -> None:
        last = self._closure
        closure = find_closure(
            (last.libraries, last.fingerprint) if last is not None else None, _measured_folders(_import_paths())
        )
        if not _libtpms_of(closure):
            # Before it is taken for an image like any other, which would be this host's first perhaps.
            raise DomainError("the loader finds no libtpms for the engine", next_step="Install libtpms (libtpms0)")
        contents = read_contents(closure.files | _own_files(_import_paths()), self._contents)
        self._closure, self._contents, self._measurement = closure, contents, measurement_of(contents)

    def _libtpms(self) -> str:
        return _libtpms_of(self._closure) if self._closure is not None else ""

    @property
    def ready_within_s(self) -> int:
        """It is there as soon as it is confined."""
        return _READY_S

    def start(self, plan: DomainPlan) -> RunningDomain:
        """Start a confined vtpmd; see Domain."""
        spec = ConfinementSpec(
            target=TARGET,
            keep_fds=tuple(int(fd) for fd in plan.fds),
            hold_fd=int(InstanceFd.HOLD),
            target_args=plan.args.to_json(),
            **identity(plan),
        )
        fds = {int(number): fd for number, fd in plan.fds.items()}
        return ConfinedProcess(spawn(spec, fds=fds, log_fd=plan.log_fd))


class ConfinedProcess:
    """One vtpmd process; see RunningDomain."""

    def __init__(self, process: SpawnedProcess) -> None:
        self._process = process
        self._reported = False
        self._reaped = False

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
        if self._reaped:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGKILL)

    async def ended(self) -> str:
        """Wait for the end and return it in words."""
        await readable(self._process.pidfd)
        return self.reap()

    def reap(self) -> str:
        """Return the end in words; blocks until it has come. In place of `ended`."""
        ended = os.waitid(os.P_PIDFD, self._process.pidfd, os.WEXITED)
        os.close(self._process.pidfd)
        self._reaped = True
        if not self._reported:
            # It took too long to be confined, and was killed.
            os.close(self._process.report_fd)
        if ended is None or ended.si_code == os.CLD_EXITED:
            return f"exit status {0 if ended is None else ended.si_status}"
        return f"signal {signal.Signals(ended.si_status).name}"


def identity(plan: DomainPlan) -> dict[str, Any]:
    """Return what is the same in every confinement spec of an instance: who it is, and where its code lies."""
    root = os.geteuid() == 0
    return {
        "name": plan.name,
        "uid": plan.uid if root else os.geteuid(),
        "gid": plan.uid if root else os.getegid(),
        "import_paths": _import_paths(),
        "user_namespace": UserNamespace.HOST if root else UserNamespace.OWN,
    }


@functools.cache
def _import_paths() -> tuple[str, ...]:
    """Folders that hold vtpm and cffi's runtime: all that an instance imports beside the standard library."""
    backend = importlib.util.find_spec("_cffi_backend")
    package = importlib.util.find_spec("vtpm")
    if backend is None or backend.origin is None or package is None or not package.submodule_search_locations:
        raise DomainError("cffi's runtime module _cffi_backend is not installed", next_step="Run `make install`")
    source = Path(next(iter(package.submodule_search_locations))).resolve().parent
    return tuple(dict.fromkeys((str(source), str(Path(backend.origin).resolve().parent))))


def _measured_folders(import_paths: tuple[str, ...]) -> list[str]:
    """Return the folders of which all counts: the standard library's, and the engine's for what the loader loads."""
    # Those of the interpreter that instances are started with, not of a virtual environment over it.
    base = {"installed_base": sys.base_prefix, "installed_platbase": sys.base_exec_prefix, "platbase": sys.base_prefix}
    standard = dict.fromkeys(sysconfig.get_path(name, "posix_prefix", base) for name in ("stdlib", "platstdlib"))
    archive = Path(next(iter(standard))).parent / f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    return [str(archive), *standard, f"{import_paths[0]}/vtpm/engine"]


def _libtpms_of(closure: Closure) -> str:
    """Return the name of libtpms' own file, behind the links to it; empty when the loader finds none."""
    return next((place.resolve().name for name, place in closure.libraries.items() if "/libtpms." in name), "")


def _own_files(import_paths: tuple[str, ...]) -> Files:
    """Return what an instance imports besides: of its other folders, which come after the standard library's.

    By names that are relative, so that the same software elsewhere has the same measurement.
    """
    source = Path(import_paths[0])
    found = [source / "vtpm" / "__init__.py", source / "vtpm" / "errors.py"]
    for name in _PACKAGES:
        found += [path for path in (source / "vtpm" / name).rglob("*") if path.suffix in {".py", ".so", ".toml"}]
    files = {str(path.relative_to(source)): path for path in found if path.is_file()}
    for number, folder in enumerate(map(Path, import_paths)):
        # All that could be taken for it, by the order in which it is looked for.
        files |= {f"{number}:{path.name}": path for path in folder.glob("_cffi_backend*") if path.is_file()}
    return files
