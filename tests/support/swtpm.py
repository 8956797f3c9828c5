"""Debian's swtpm for tests: as the host's hardware TPM, and as what wrote the state that is imported."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import short_directory
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.types import TpmVersion

START_TIMEOUT_S = 10.0


class SwtpmPlatform:
    """One swtpm process with its state; the same directory is the same TPM, another directory another.

    Args:
        directory: short path of an existing folder of its own: sockets, state and log go there.
        version: of the TPM.
        arguments: more of them for swtpm.
    """

    def __init__(
        self, directory: Path, *, version: TpmVersion = TpmVersion.V2_0, arguments: Sequence[str] = ()
    ) -> None:
        self._directory = directory
        self._arguments = ["--tpm2"] * (version is TpmVersion.V2_0) + list(arguments)
        self.socket_path = directory / "tpm"
        self.log_path = directory / "log"
        self.state_dir = directory / "state"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def tcti(self) -> str:
        """Configuration for tpm2-tss."""
        return f"swtpm:path={self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Power it on; returns when it takes connections."""
        assert self._process is None
        self.state_dir.mkdir(exist_ok=True)
        control = Path(f"{self.socket_path}.ctrl")
        for path in (self.socket_path, control):
            path.unlink(missing_ok=True)
        # swtpm takes the listening sockets as they are, so there is no moment to wait for.
        listeners = []
        for path in (self.socket_path, control):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(os.fspath(path))
            # A keeper has a user id of its own.
            path.chmod(0o666)
            listener.listen(8)
            listeners.append(listener)
        data_fd, control_fd = (listener.fileno() for listener in listeners)
        self._process = subprocess.Popen(
            [
                "swtpm",
                "socket",
                *self._arguments,
                *("--server", f"type=unixio,fd={data_fd}"),
                *("--ctrl", f"type=unixio,fd={control_fd}"),
                *("--tpmstate", f"dir={self.state_dir}"),
                *("--flags", "not-need-init,startup-clear"),
                *("--log", f"file={self.log_path},level=20"),
            ],
            pass_fds=(data_fd, control_fd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for listener in listeners:
            listener.close()
        return self

    def stop(self) -> None:
        """Cut its power (SIGKILL), if it is on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def run(self, *commands: bytes) -> list[bytes]:
        """Send TPM commands on one connection; returns the responses."""
        responses = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(START_TIMEOUT_S)
            link.connect(os.fspath(self.socket_path))
            for command in commands:
                link.sendall(command)
                response = link.recv(4096, socket.MSG_PEEK)
                responses.append(link.recv(int.from_bytes(response[2:6], "big"), socket.MSG_WAITALL))
        return responses

    def nv_handles(self) -> list[str]:
        """The NV indexes that are defined."""
        listed = subprocess.run(
            ["tpm2_getcap", "-T", self.tcti, "handles-nv-index"],
            check=True,
            timeout=START_TIMEOUT_S,
            capture_output=True,
            text=True,
        )
        return listed.stdout.split()

    def store_volatile(self) -> None:
        """Have it write its volatile state beside the permanent one."""
        subprocess.run(
            ["swtpm_ioctl", "--unix", f"{self.socket_path}.ctrl", "-v"],
            check=True,
            timeout=START_TIMEOUT_S,
            capture_output=True,
        )

    def reboot(self, firmware: str = "firmware") -> None:
        """Reset it, as a platform does that boots, and measure this into PCR 0."""
        self.stop()
        self.start()
        self.extend(0, firmware)

    def extend(self, index: int, text: str = "something else booted") -> None:
        """Extend a PCR of the SHA-256 bank with the digest of a text."""
        subprocess.run(
            ["tpm2_pcrevent", "-T", self.tcti, str(index)],
            input=text.encode(),
            check=True,
            timeout=START_TIMEOUT_S,
            capture_output=True,
        )

    def pcr(self, index: int) -> bytes:
        """Return a PCR of the SHA-256 bank, asked while no keeper has the TPM."""
        with PlatformTpm(self.tcti) as tpm:
            return tpm.pcr_values(PcrSelection.parse(f"sha256:{index}"))[index]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


@contextlib.contextmanager
def booted_platform() -> Iterator[SwtpmPlatform]:
    """Yield hardware, as far as the host can tell, with a boot measured into PCR 0; it takes one client at a time."""
    with short_directory() as folder:
        home = folder / "hw"
        home.mkdir()
        # Services that are not root pass through, as through /dev.
        home.chmod(0o711)
        with SwtpmPlatform(home) as platform:
            platform.extend(0, "firmware")
            yield platform
