"""Boots an image under emulation, as small as a vTPM's machine is, with one port to its entry; also other initramfs."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from vtpm.image.opened import OpenImage

PORT = "org.vtpm.test"
TIMEOUT_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """One running virtual machine; a context manager that ends it.

    Args:
        image: what to boot, from its verified descriptors.
        initramfs: another than the image's.
        memory_mb: of the machine.
        port_name: of its port.
    """

    def __init__(
        self, image: OpenImage, *, initramfs: Path | None = None, memory_mb: int = 128, port_name: str = PORT
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vtpm-machine-")
        path = Path(self._folder.name) / "port"
        self.console = Path(self._folder.name) / "console"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        fds = (image.kernel_fd, image.initramfs_fd)
        words = ["qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-m", str(memory_mb)]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-kernel", f"/proc/self/fd/{fds[0]}", "-initrd", str(initramfs or f"/proc/self/fd/{fds[1]}")]
        words += ["-append", image.manifest.command_line, "-device", "virtio-serial-pci"]
        words += ["-chardev", f"socket,id=c,path={path}", "-device", f"virtserialport,chardev=c,name={port_name}"]
        words += ["-serial", f"file:{self.console}"]
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(words, pass_fds=fds, stdin=subprocess.DEVNULL)
        with listener:
            self.port, _ = listener.accept()
        self.port.settimeout(TIMEOUT_S)

    def hello(self) -> list[str]:
        """Return the words of the entry's first line."""
        line = b""
        while not line.endswith(b"\n"):
            more = self.port.recv(4096)
            if not more:
                raise AssertionError(f"the machine ended; its console:\n{self.console.read_text()[-2000:]}")
            line += more
        return line.decode().split()

    def elapsed_s(self) -> float:
        """Return the time since QEMU was started."""
        return time.monotonic() - self._started_at

    def cpu_s(self) -> float:
        """Return the processor time of a running QEMU."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def wait(self) -> tuple[int, float]:
        """Wait for the machine's end; return QEMU's exit status and the processor time that it used, in seconds."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            if not select.select([pidfd], [], [], TIMEOUT_S)[0]:
                raise TimeoutError("the machine did not end")
            _, status, usage = os.wait4(self._process.pid, 0)
        finally:
            os.close(pidfd)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return self._process.returncode, usage.ru_utime + usage.ru_stime

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.port.close()
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
