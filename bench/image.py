"""Size, start and memory of a vTPM's virtual machine, beside a bare boot of the same kernel. For bench.

The bare machine's initramfs has one static program, which powers off at once; the image's entry is the tests' stand-in,
which imports what an instance imports and says hello on its port. The two are booted in turns. On a busy machine the
processor time is the better measure: under emulation it is, waiting aside, what a start takes.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.image.building import build_for_tests
from tests.support.image.machine import Machine

from vtpm.image.cpio import File, archive
from vtpm.image.opened import OpenImage

INITRAMFS_LIMIT_BYTES = 10_000_000
START_RATIO_LIMIT = 2.0
MEMORY_LIMIT_MB = 128
STARTS = 5
_MEMORY_MB = (128, 96, 92, 88, 84)
_POWER_OFF = "#include <sys/reboot.h>\nint main(void) { return reboot(RB_POWER_OFF); }\n"


@dataclass(frozen=True)
class ImageFigures:
    """One image; times are medians, processor times in parentheses when printed, of QEMU from its start."""

    kernel_bytes: int
    initramfs_bytes: int
    unpacked_bytes: int
    files: int
    starts: int
    bare_s: float
    bare_cpu_s: float
    hello_s: float
    hello_cpu_s: float
    ratio: float
    cpu_ratio: float
    least_memory_mb: int
    available_kib: int

    @property
    def met(self) -> bool:
        """Whether size, start and memory are within their limits."""
        return (
            self.initramfs_bytes <= INITRAMFS_LIMIT_BYTES
            and self.cpu_ratio <= START_RATIO_LIMIT
            and self.least_memory_mb <= MEMORY_LIMIT_MB
        )


def image() -> ImageFigures:
    """Build an image, start it and a bare kernel in turns, and find the least memory that it starts with."""
    with tempfile.TemporaryDirectory(prefix="vtpm-bench-") as work:
        folder, _ = build_for_tests(Path(work))
        bare = bare_initramfs(Path(work))
        with OpenImage(folder) as opened:
            bares, hellos = [], []
            for _ in range(STARTS):
                bares.append(bare_boot(opened, bare))
                hellos.append(_start(opened, MEMORY_LIMIT_MB))
            least = [(memory_mb, found) for memory_mb in _MEMORY_MB if (found := _tried(opened, memory_mb)) is not None]
            manifest = opened.manifest
    bare_s, bare_cpu_s = (statistics.median(column) for column in zip(*bares, strict=True))
    hello_s, hello_cpu_s = (statistics.median(column) for column in zip(*hellos, strict=True))
    return ImageFigures(
        kernel_bytes=manifest.kernel.size,
        initramfs_bytes=manifest.initramfs.size,
        unpacked_bytes=manifest.unpacked_bytes,
        files=len(manifest.files),
        starts=STARTS,
        bare_s=bare_s,
        bare_cpu_s=bare_cpu_s,
        hello_s=hello_s,
        hello_cpu_s=hello_cpu_s,
        ratio=hello_s / bare_s,
        cpu_ratio=hello_cpu_s / bare_cpu_s,
        least_memory_mb=least[-1][0],
        available_kib=least[-1][1],
    )


def bare_initramfs(work: Path) -> Path:
    """Make an initramfs below `work` whose only program powers off."""
    program = work / "init"
    words = ["gcc", "-static", "-Os", "-s", "-x", "c", "-", "-o", str(program)]
    subprocess.run(words, input=_POWER_OFF.encode(), check=True, timeout=60)
    path = work / "bare"
    path.write_bytes(archive({"/init": File(program.read_bytes(), executable=True)}))
    return path


def bare_boot(opened: OpenImage, initramfs: Path) -> tuple[float, float]:
    """Boot an image's kernel with another initramfs until it powers off; return seconds, also of processor time."""
    with Machine(opened, initramfs=initramfs, memory_mb=MEMORY_LIMIT_MB) as machine:
        status, cpu_s = machine.wait()
        elapsed_s = machine.elapsed_s()
    if status != 0:
        raise RuntimeError(f"the bare machine ended with status {status}")
    return elapsed_s, cpu_s


def _start(opened: OpenImage, memory_mb: int) -> tuple[float, float]:
    with Machine(opened, memory_mb=memory_mb) as machine:
        machine.hello()
        found = machine.elapsed_s(), machine.cpu_s()
        machine.port.sendall(b"end")
        machine.wait()
    return found


def _tried(opened: OpenImage, memory_mb: int) -> int | None:
    # KiB that are still available once it runs; None when it does not start.
    with Machine(opened, memory_mb=memory_mb) as machine:
        try:
            words = machine.hello()
        except (AssertionError, OSError):
            return None
        return int(words[-1])
