"""Makes a unified kernel image of a guest image: kernel, initramfs and command line behind systemd's EFI stub.

With Debian's stub and objcopy alone, as `ukify` would; it is not signed. Used by tests of what firmware measures.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.support.guest.debian import GuestImageError, program
from tests.support.guest.guest import KERNEL_ARGUMENTS
from tests.support.guest.image import Image

EFI_STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
# Beyond the stub's own sections, with room for what each holds; the kernel takes 32 MiB of addresses at most.
_ADDRESSES = {".osrel": 0x2_0000, ".cmdline": 0x3_0000, ".linux": 0x200_0000, ".initrd": 0x400_0000}


def write_boot_folder(folder: Path, image: Image, kernel_arguments: str = "") -> Path:
    """Make a folder for `GuestConfig.boot_folder` that boots this image.

    Args:
        folder: made here.
        image: kernel and initramfs.
        kernel_arguments: appended to the command line that the harness gives to all guests.
    Returns:
        Path of the unified kernel image in it.
    Raises:
        GuestImageError: Debian's stub or objcopy is not installed, or objcopy failed.
    """
    if not EFI_STUB.is_file():
        raise GuestImageError(f"{EFI_STUB} is absent: apt-get install systemd-boot-efi")
    unified = folder / "EFI" / "BOOT" / "BOOTX64.EFI"
    unified.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as parts:
        command_line, release = Path(parts) / "cmdline", Path(parts) / "osrel"
        command_line.write_text(f"{KERNEL_ARGUMENTS} {kernel_arguments}".strip())
        release.write_text("ID=vtpm-test-guest\n")
        contents = {".osrel": release, ".cmdline": command_line, ".linux": image.kernel, ".initrd": image.initramfs}
        arguments = [str(program("objcopy", "binutils"))]
        for section, content in contents.items():
            arguments += ["--add-section", f"{section}={content}"]
            arguments += ["--change-section-vma", f"{section}={_ADDRESSES[section]:#x}"]
        done = subprocess.run(
            [*arguments, str(EFI_STUB), str(unified)], capture_output=True, text=True, timeout=60, check=False
        )
    if done.returncode != 0:
        raise GuestImageError(f"objcopy made no unified kernel image: {done.stderr.strip()}")
    return unified
