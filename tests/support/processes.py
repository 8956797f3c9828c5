"""The keeper and the embedded TPM as processes, for tests. Each is ended by the process id that was started."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Yield a temporary folder whose path is short enough for unix sockets; others may pass through."""
    path = Path(tempfile.mkdtemp(prefix="vt-"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class EmbeddedTpmProcess:
    """One embedded TPM; the same directory is the same TPM."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket_path = directory / "tpm.sock"
        self.log_path = directory / "embedded.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self.socket_path}"

    def launch(self, *, preexec: Callable[[], None] | None = None) -> str:
        """Start it and return what it says: "ready", or why it does not start."""
        words_fd, ready_fd = os.pipe()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "vtpm.embedded_tpm", "--socket", str(self.socket_path)),
                    *("--state-dir", str(self.directory), "--ready-fd", str(ready_fd)),
                ],
                pass_fds=(ready_fd,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                preexec_fn=preexec,
            )
        os.close(ready_fd)
        with open(words_fd, "rb") as words:
            assert select.select([words], [], [], START_TIMEOUT_S)[0], "the embedded TPM says nothing"
            return words.read().decode()

    def start(self) -> Self:
        assert self.launch() == "ready"
        return self

    def stop(self) -> None:
        """Cut its power (SIGKILL), if it is on."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
            self.process = None

    def wait(self) -> int:
        """Wait for its own end; return its exit status."""
        assert self.process is not None
        status = self.process.wait(STOP_TIMEOUT_S)
        self.process = None
        return status

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def killed_at(number: int, *calls: str) -> str:
    """Return a prelude that kills the process before the nth of these calls, such as "os.fsync", counted together.

    Those by which each start makes its directories last are not counted: the number is a step of what is done after it.
    """
    wrapped = "\n".join(f"{call} = deadly({call})" for call in calls)
    return f"""
import os, pathlib, signal, sys
calls = 0
def deadly(real):
    def call(*args, **kwargs):
        global calls
        calls += sys._getframe(1).f_globals["__name__"] != "vtpm.wire.daemon"
        if calls == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
{wrapped}
"""


class KeeperProcess:
    """One vtpm-keeper.

    Args:
        directory: gets run/, state/ and keeper.log.
        platform_tpm: TCTI or "embedded".
        more: further arguments.
        prelude: Python statements to run in the process before the keeper.
    """

    def __init__(
        self,
        directory: Path,
        platform_tpm: str,
        *more: str,
        state_dir: Path | None = None,
        prelude: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = directory / "run"
        self.state_dir = state_dir or directory / "state"
        self.root_file = self.state_dir / "root.sealed"
        self.log_path = directory / "keeper.log"
        self._notify_path = directory / "notify"
        self._arguments = (platform_tpm, *more)
        self._prelude = prelude
        self._env = dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def spawn(self) -> None:
        """Start it and return at once."""
        platform_tpm, *more = self._arguments
        code = f"{self._prelude}\nimport sys; from vtpm.keeper.main import main; sys.exit(main())"
        program = ("-c", code) if self._prelude else ("-m", "vtpm.keeper.main")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-I", *program, "--run-dir", str(self.run_dir)),
                    *("--state-dir", str(self.state_dir), "--platform-tpm", platform_tpm, *more),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(self._notify_path), **self._env},
            )

    def start(self) -> Self:
        """Start it; return when it tells systemd that it is ready."""
        self._notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(self._notify_path))
            self._notify_path.chmod(0o666)
            self.spawn()
            pidfd = os.pidfd_open(self.pid)
            try:
                readable, _, _ = select.select([notify, pidfd], [], [], START_TIMEOUT_S)
            finally:
                os.close(pidfd)
            assert notify in readable, self.log
            assert notify.recv(64) == b"READY=1"
        return self

    def run(self) -> int:
        """Start it and wait for its end; return its exit status."""
        self.spawn()
        return self.wait(START_TIMEOUT_S)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        assert self.process is not None
        status = self.process.wait(timeout_s)
        self.process = None
        return status

    def terminate(self) -> int:
        """End it with SIGTERM; return its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.wait()

    def stop(self) -> None:
        """Kill it, if it runs, and the embedded TPM that it started."""
        if self.process is not None:
            self.process.kill()
            self.wait()
        self.stop_embedded()

    def stop_embedded(self) -> None:
        """Kill the embedded TPM that the keeper started, if there is one, and wait for its end."""
        lock = self.run_dir / "embedded-tpm" / "tpm.lock"
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = int(lock.read_text())
            if "vtpm-embedded" in Path(f"/proc/{pid}/comm").read_text():
                pidfd = os.pidfd_open(pid)
                os.kill(pid, 9)
                assert select.select([pidfd], [], [], STOP_TIMEOUT_S)[0]
                os.close(pidfd)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def run_as_other_user(code: str, arguments: Sequence[str], uid: int) -> str:
    """Run Python code as another user, where this one is root, else as this one; return its output."""
    other = {"user": uid, "group": uid, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        **other,  # type: ignore[call-overload]
    )
    return str(done.stdout)
