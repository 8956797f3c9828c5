"""Which accelerator a virtual machine gets: found out by running one, not by looking for /dev/kvm.

A /dev/kvm that opens may still hang whatever runs under it; nested virtualisation does. So a machine is made whose only
program, 16 bytes in a boot sector, ends it with a status that nothing else ends QEMU with. For the launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from vtpm.domains.vm_command import QEMU, SANDBOX
from vtpm.errors import DomainError

KVM, TCG, AUTO = "kvm", "tcg", "auto"
PROBE_TIMEOUT_S = 5.0
_EXIT_PORT = 0x501
_ANSWER = 0x2A
_ANSWERED = _ANSWER << 1 | 1
"""How isa-debug-exit ends QEMU when this was written to it (QEMU, hw/misc/debugexit.c)."""
# mov dx, 0x501; mov al, 0x2a; out dx, al; hlt; jmp $-1
_PROGRAM = b"\xba" + _EXIT_PORT.to_bytes(2, "little") + b"\xb0" + bytes((_ANSWER,)) + b"\xee\xf4\xeb\xfd"
_SECTOR = _PROGRAM.ljust(510, b"\0") + b"\x55\xaa"
_log = logging.getLogger("vtpm.launcher")


async def choose(wanted: str) -> str:
    """Return kvm or tcg.

    Args:
        wanted: kvm, tcg, or auto: kvm where a machine runs under it.
    Raises:
        DomainError: kvm is wanted, and no machine runs under it.
    """
    if wanted == TCG:
        return TCG
    if Path("/dev/kvm").exists() and await runs(KVM):
        return KVM
    if wanted == KVM:
        raise DomainError(
            "no virtual machine runs under /dev/kvm on this host",
            next_step='Set vm_accelerator = "tcg" (emulated, slower) or "auto"',
        )
    _log.warning("no virtual machine runs under /dev/kvm; those of vTPMs are emulated, which is slower")
    return TCG


async def runs(accelerator: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Tell whether a virtual machine carries out instructions under this accelerator, within the time."""
    disk = os.memfd_create("vtpm-probe", os.MFD_CLOEXEC)
    try:
        os.write(disk, _SECTOR)
        # Only bytes of ours run in it, so it needs no more confinement than QEMU's own.
        process = await asyncio.create_subprocess_exec(
            QEMU,
            *("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
            *("-machine", "pc", "-accel", accelerator, "-m", "16M"),
            *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"),
            *("-drive", f"file=/proc/self/fd/{disk},format=raw,if=floppy,readonly=on"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            pass_fds=(disk,),
        )
    except OSError as error:
        raise DomainError(
            f"{QEMU} cannot be executed: {error.strerror}", next_step="Install qemu-system-x86"
        ) from error
    finally:
        os.close(disk)
    try:
        async with asyncio.timeout(timeout_s):
            return await process.wait() == _ANSWERED
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
