"""The two kinds of platform TPM as the keeper reaches them. For the keeper alone.

A hardware TPM is there or not. The embedded one is a program that the keeper starts when it is not there; it outlives
the keeper, and is met only by exec and its socket.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from vtpm.confine.interpreter import cache_options
from vtpm.errors import PlatformTpmError
from vtpm.platform_tpm.platform_tpm import DEFAULT_TIMEOUT_S, PlatformTpm
from vtpm.wire.keeper import PlatformKind, Protection
from vtpm.wire.packet_stream import peer_of

EMBEDDED = "embedded"
EMBEDDED_RUN_DIR = "embedded-tpm"
"""Folder in the run directory for its sockets: the keeper's, whoever owns the run directory."""
EMBEDDED_SOCKET = "tpm.sock"
EMBEDDED_LOG = "embedded-tpm.log"
_START_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 10.0
_MAX_WORDS_BYTES = 4096


class Platform(Protocol):
    """A kind of platform TPM."""

    @property
    def kind(self) -> PlatformKind:
        """What it is."""
        ...

    @property
    def tcti(self) -> str:
        """How tpm2-tss reaches it."""
        ...

    @property
    def protection(self) -> Protection:
        """What it keeps the root key from."""
        ...

    def open(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> PlatformTpm:
        """Connect.

        Raises:
            PlatformTpmError: it does not answer.
        """
        ...

    def prepare(self) -> None:
        """Start it, where it is a program of vtpm's that is not there; while the keeper is the user who starts it.

        Raises:
            PlatformTpmError: it does not start.
        """
        ...

    def end(self) -> None:
        """End it, where it is a program of vtpm's.

        Raises:
            PlatformTpmError: it does not end.
        """
        ...


class HardwarePlatform:
    """A TPM that somebody else provides.

    Args:
        tcti: any tpm2-tss TCTI configuration.
    """

    kind = PlatformKind.HARDWARE
    protection = Protection.SEALED

    def __init__(self, tcti: str) -> None:
        self.tcti = tcti

    def open(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> PlatformTpm:
        """See Platform."""
        return PlatformTpm(self.tcti, timeout_s=timeout_s)

    def prepare(self) -> None:
        """See Platform: it is not vtpm's to start."""

    def end(self) -> None:
        """See Platform: it is not vtpm's to end."""


class EmbeddedPlatform:
    """The software stand-in, started when it is not there.

    Args:
        run_dir: has the folder EMBEDDED_RUN_DIR for its sockets.
        state_dir: takes its store and its log.
        uid, gid: who it runs as, and who owns these folders.
    """

    kind = PlatformKind.EMBEDDED
    protection = Protection.UNPROTECTED

    def __init__(self, run_dir: Path, state_dir: Path, uid: int, gid: int) -> None:
        self._uid = uid
        self._gid = gid
        self._socket_path = run_dir.absolute() / EMBEDDED_RUN_DIR / EMBEDDED_SOCKET
        self._state_dir = state_dir.absolute()
        self._child: subprocess.Popen[bytes] | None = None
        self.tcti = f"swtpm:path={self._socket_path}"

    def open(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> PlatformTpm:
        """See Platform."""
        self.prepare()
        return PlatformTpm(self.tcti, timeout_s=timeout_s)

    def prepare(self) -> None:
        """See Platform."""
        if self._pid() is None:
            self._start()

    def end(self) -> None:
        """See Platform."""
        pid = self._pid()
        if pid is None:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            # Asked again with the process held: the id cannot have become another process's in between.
            if self._pid() != pid:
                return
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if not select.select([pidfd], [], [], _END_TIMEOUT_S)[0]:
                raise PlatformTpmError(f"the embedded TPM, process {pid}, does not end", next_step=f"kill {pid}")
        finally:
            os.close(pidfd)

    def _pid(self) -> int | None:
        """Return the process that serves the socket, as the kernel says; None when there is none."""
        if self._child is not None:
            self._child.poll()  # so that one that has ended is reaped
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            try:
                probe.connect(os.fspath(self._socket_path))
                return peer_of(probe).pid
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            except OSError as error:
                raise PlatformTpmError(
                    f"the embedded TPM cannot be reached at {self._socket_path}: {error}",
                    next_step="Choose a shorter run-dir, or one of this user's own",
                ) from error

    def _start(self) -> None:
        words_fd, ready_fd = os.pipe2(os.O_CLOEXEC)
        try:
            with open(self._state_dir / EMBEDDED_LOG, "ab", opener=_private) as log:
                self._own(log.fileno())
                self._child = subprocess.Popen(
                    [
                        *(sys.executable, "-I", *cache_options(), "-m", "vtpm.embedded_tpm"),
                        *("--socket", os.fspath(self._socket_path)),
                        *("--state-dir", os.fspath(self._state_dir)),
                        *("--ready-fd", str(ready_fd)),
                        *("--uid", str(self._uid), "--gid", str(self._gid)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(ready_fd,),
                    cwd="/",
                    env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                    start_new_session=True,
                )
        except OSError as error:
            os.close(words_fd)
            raise PlatformTpmError(f"the embedded TPM cannot be started: {error}") from error
        finally:
            os.close(ready_fd)
        with open(words_fd, "rb", buffering=0) as words:
            readable, _, _ = select.select([words], [], [], _START_TIMEOUT_S)
            said = words.read(_MAX_WORDS_BYTES).decode(errors="replace") if readable else "it is not ready in time"
        if said != "ready" and self._pid() is None:  # another keeper may have started it at the same moment
            raise PlatformTpmError(
                f"the embedded TPM does not start: {said or 'it ended without a word'}",
                next_step=f"See {self._state_dir / EMBEDDED_LOG}",
            )

    def _own(self, log: int) -> None:
        """Give a log that root has made to the keeper's user, who goes on with it."""
        status = os.fstat(log)
        if os.geteuid() == 0 and status.st_uid == 0 and status.st_nlink == 1 and status.st_size == 0:
            os.fchown(log, self._uid, self._gid)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
