"""A host under test: the real services, started as a user starts them, in folders of its own.

Every process is ended by the id it was started under: the services' ids are in their lock files, those of instances
come from the manager.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.support.uids import own_uid_base
from vtpm.client.manager_client import ManagerClient

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 60.0
SERVICES = ("manager", "keeper", "launcher", "embedded-tpm")


class Host:
    """Services of one host. A context manager that leaves nothing behind.

    Args:
        platform_tpm: as `vtpm-managerd --platform-tpm`.
        folder: to use again after an earlier Host with keep=True; a new one when None.
        keep: whether the folder stays when this ends.
        settings: further lines of the configuration file, in TOML.
        uid_base: a setting; None leaves it out.
        command_prefix: words before the manager's own.
        programs: folder that has vtpm-managerd and vtpm.
    """

    def __init__(
        self,
        platform_tpm: str = "embedded",
        folder: Path | None = None,
        *,
        keep: bool = False,
        settings: str = "",
        uid_base: int | None = 0,
        command_prefix: Sequence[str] = (),
        programs: Path = BIN,
    ) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="vtpm-host-"))
        # Services of other users must be able to pass.
        self.folder.chmod(0o755)
        self.run_dir = self.folder / "run"
        self.state_dir = self.folder / "state"
        self.socket = self.run_dir / "manager.sock"
        self.config = self.folder / "vtpm.toml"
        if not self.config.exists():
            # Kept with the folder, whose files belong to these users.
            base = "" if uid_base is None else f"uid_base = {uid_base or own_uid_base()}\n"
            self.config.write_text(base + settings)
        self.platform_tpm = platform_tpm
        self._command_prefix = command_prefix
        self.programs = programs
        self._keep = keep
        self._manager: subprocess.Popen[bytes] | None = None
        self._log = bytearray()
        self._pump: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    # -- services ---------------------------------------------------------------------------------------------------
    def start(self, before: Callable[[int], None] | None = None) -> None:
        """Start the manager, which starts what is missing; return when it serves.

        Args:
            before: called with the manager's process id while the process has not begun the program yet.
        """
        self._manager = subprocess.Popen(
            [
                *self._command_prefix,
                *(() if before is None else ("sh", "-c", 'kill -STOP $$; exec "$@"', "sh")),
                self.programs / "vtpm-managerd",
                *("--config", self.config, "--platform-tpm", self.platform_tpm),
                *("--state-dir", self.state_dir, "--run-dir", self.run_dir),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._manager.stderr is not None
        if before is not None:
            os.waitid(os.P_PID, self._manager.pid, os.WSTOPPED)
            before(self._manager.pid)
            self._manager.send_signal(signal.SIGCONT)
        line = _wait_for_line(self._manager.stderr.fileno(), b"ready: ", START_TIMEOUT_S, self._log)
        if not line:
            raise AssertionError(f"the manager did not start:\n{self.log()}\n{self.service_logs()}")
        self._pump = threading.Thread(target=_pump, args=(self._manager.stderr, self._log), daemon=True)
        self._pump.start()

    @property
    def manager_runs(self) -> bool:
        """Whether the manager that was started last has not ended yet."""
        return self._manager is not None and self._manager.poll() is None

    def stop_manager(self) -> None:
        """End the manager alone, with SIGTERM."""
        assert self._manager is not None
        self._manager.terminate()
        self._manager.wait(30)
        self._close_log()

    def shut_down(self) -> None:
        """End everything in order, as `vtpm shutdown` does, and wait for its end."""
        pids = [pid for service in SERVICES if (pid := self.pid(service)) is not None]
        self.cli("shutdown", "--yes")
        assert self._manager is not None
        self._manager.wait(30)
        self._close_log()
        for pid in pids:
            assert wait_ended(pid, 30), f"process {pid} did not end"

    def kill(self, service: str) -> None:
        """Kill one service (see SERVICES) with SIGKILL and wait for its end."""
        if service == "manager":
            assert self._manager is not None
            self._manager.kill()
            self._manager.wait(30)
            self._close_log()
            return
        pid = self.pid(service)
        if pid is not None:
            kill_process(pid)

    def pid(self, service: str) -> int | None:
        """Return a service's process id, or None when it does not run."""
        if service == "embedded-tpm":
            locks = list(self.folder.rglob("embedded*.lock"))
        else:
            locks = [self.run_dir / f"{service}.lock"]
        for lock in locks:
            with contextlib.suppress(FileNotFoundError, ValueError):
                pid = int(lock.read_text())
                if Path(f"/proc/{pid}").exists():
                    return pid
        return None

    def end(self) -> None:
        """End everything: in order if it can, and whatever is left by its id."""
        pids = [pid for service in SERVICES if (pid := self.pid(service)) is not None]
        patience_s = 0.0
        with contextlib.suppress(Exception), self.client() as client:
            client.shutdown()
            patience_s = 5.0
        if self._manager is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._manager.wait(20)
            self._manager.kill()
            self._manager.wait(20)
            self._close_log()
        for pid in pids:
            wait_ended(pid, patience_s) or kill_process(pid)
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def service_logs(self) -> str:
        """All that the detached services logged."""
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.state_dir / "log").glob("*.log")))

    def log(self) -> str:
        """All that the manager logged."""
        return self._log.decode(errors="replace")

    def _close_log(self) -> None:
        if self._pump is not None:
            self._pump.join(10)
        assert self._manager is not None
        assert self._manager.stderr is not None
        self._manager.stderr.close()

    # -- clients ----------------------------------------------------------------------------------------------------
    def client(self) -> ManagerClient:
        """Return a new client of the manager; close it."""
        return ManagerClient(self.socket)

    def cli(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the `vtpm` command."""
        done = subprocess.run(
            [self.programs / "vtpm", "--socket", self.socket, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"vtpm {arguments} ended with {done.returncode}: {done.stderr}\n{self.log()}")
        return done


def kill_process(pid: int) -> None:
    """SIGKILL a process and wait until it has ended. Nothing when it has already."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _wait_pidfd(pidfd, 30)
    finally:
        os.close(pidfd)


def wait_ended(pid: int, timeout_s: float) -> bool:
    """Wait until a process has ended; whether it has."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return _wait_pidfd(pidfd, timeout_s)
    finally:
        os.close(pidfd)


def _wait_pidfd(pidfd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def _wait_for_line(fd: int, wanted: bytes, timeout_s: float, log: bytearray) -> bytes:
    """Read lines until one holds `wanted`; empty when the stream ends or time is up."""
    deadline = time.monotonic() + timeout_s
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    # What an earlier process of the same log said does not count.
    begin = len(log)
    while (left := deadline - time.monotonic()) > 0 and poller.poll(left * 1000):
        data = os.read(fd, 65536)
        if not data:
            break
        log += data
        for line in bytes(log[begin:]).splitlines():
            if wanted in line:
                return line
    return b""


def _pump(stream: object, log: bytearray) -> None:
    with contextlib.suppress(ValueError, OSError):
        while data := os.read(stream.fileno(), 65536):  # type: ignore[attr-defined]
            log += data
