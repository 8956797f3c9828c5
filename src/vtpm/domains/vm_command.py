"""The command line of a vTPM's virtual machine. Pure; for the qemu domain.

Nothing but a processor, memory, and two serial ports: no disk, no network, no display, no firmware settings of its own,
no defaults of QEMU or of the user.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from vtpm.wire.guest_port import GUEST_PORT, MANAGER_PORT

QEMU = "/usr/bin/qemu-system-x86_64"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_TRANSLATION_MIB = {"tcg": 16}
"""Memory for translated code. QEMU would take a quarter of the guest's, and one instance has little code."""


class VmFd(enum.IntEnum):
    """Descriptors of a virtual machine's QEMU."""

    HOLD = 3
    """Nothing comes or goes here; it hangs up when the launcher has gone."""
    GUEST = 4
    MANAGER = 5
    MONITOR = 6
    KERNEL = 7
    INITRAMFS = 8


def vm_arguments(name: str, accelerator: str, memory_mib: int, command_line: str) -> Sequence[str]:
    """Return QEMU's arguments, without the program's name.

    Args:
        name: the vTPM's.
        accelerator: kvm or tcg.
        memory_mib: of the virtual machine.
        command_line: the kernel's. Kernel and initramfs are read through /proc.
    """
    extra = f",tb-size={_TRANSLATION_MIB[accelerator]}" if accelerator in _TRANSLATION_MIB else ""
    arguments = [
        *("-name", f"vtpm-{name},debug-threads=off"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-no-reboot", "-S"),
        *("-sandbox", SANDBOX),
        *("-machine", "q35,usb=off,smbus=off,sata=off,vmport=off,dump-guest-core=off"),
        *("-accel", f"{accelerator}{extra}", "-cpu", "host" if accelerator == "kvm" else "max", "-smp", "1"),
        *("-m", f"{memory_mib}M"),
        *("-chardev", f"socket,id=monitor,fd={VmFd.MONITOR:d}", "-mon", "chardev=monitor,mode=control"),
        *("-kernel", f"/proc/self/fd/{VmFd.KERNEL:d}", "-initrd", f"/proc/self/fd/{VmFd.INITRAMFS:d}"),
        *("-append", command_line),
        *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci,id=ports,max_ports=3"),
    ]
    for port, (chardev, fd, label) in enumerate(
        (("guest", VmFd.GUEST, GUEST_PORT), ("manager", VmFd.MANAGER, MANAGER_PORT)), start=1
    ):
        arguments += ["-chardev", f"socket,id={chardev},fd={fd:d}"]
        arguments += ["-device", f"virtserialport,bus=ports.0,nr={port},chardev={chardev},name={label}"]
    return arguments
