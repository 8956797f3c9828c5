"""What an instance that is init of its own virtual machine does before and after it serves. For vm_main.

The machine holds nothing else: no other process, no file system on a disk, nobody to hand an error to but the console.
Kernel modules load in the order of their names. Paths are plain texts, for pathlib and what it imports would add to the
machine's start.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from vtpm.engine import library
from vtpm.errors import DomainError

_FILE_SYSTEMS = (("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"))
_MODULES = "/lib/modules"
_MODULES_DISABLED = "/proc/sys/kernel/modules_disabled"
_PORTS = "/sys/class/virtio-ports"
_DEVICES = "/dev"
_MAX_NAME_BYTES = 256


def mount_file_systems() -> None:
    """Mount what the kernel shows of itself, and see that descriptors 0, 1 and 2 are open.

    Raises:
        DomainError: the kernel refuses.
    """
    ffi, lib = library.load()
    for kind, place in _FILE_SYSTEMS:
        _check(ffi, lib.vtpm_mount(kind.encode(), place.encode()), f"{kind} cannot be mounted on {place}")
    # Without a console init starts with none of them, and the next files would be taken for the standard streams.
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def load_modules() -> None:
    """Load the image's kernel modules; afterwards the kernel takes no other.

    Raises:
        DomainError: the kernel refuses one.
    """
    ffi, lib = library.load()
    for name in _names(_MODULES):
        fd = os.open(f"{_MODULES}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(ffi, lib.vtpm_load_module(fd), f"the kernel module {name} cannot be loaded")
        finally:
            os.close(fd)
    with open(_MODULES_DISABLED, "w") as file:
        file.write("1")


def find_port(name: str, *, ports: str = _PORTS, devices: str = _DEVICES) -> str:
    """Return the device of the virtio-serial port of that name, as QEMU's virtserialport has it.

    Args:
        name: as org.vtpm.manager.
        ports: where the kernel lists ports.
        devices: where their devices are.
    Raises:
        DomainError: there is none, or more than one.
    Source: Linux drivers/char/virtio_console.c, show_port_name.
    """
    try:
        found = [port for port in _names(ports) if _port_name(f"{ports}/{port}") == name]
    except FileNotFoundError:
        # The kernel has no such folder until there is a port.
        found = []
    if len(found) != 1:
        raise DomainError(
            f"this virtual machine has {len(found)} virtio-serial ports of the name {name}, where one is needed"
        )
    return f"{devices}/{found[0]}"


def power_off() -> NoReturn:
    """End the machine.

    Raises:
        DomainError: the kernel refuses.
    """
    ffi, lib = library.load()
    _check(ffi, lib.vtpm_power_off(), "the machine cannot be powered off")
    raise DomainError("the machine went on after it was powered off")


def _names(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _port_name(place: str) -> str | None:
    try:
        with open(f"{place}/name", "rb") as file:
            return file.read(_MAX_NAME_BYTES).decode(errors="replace").rstrip("\n")
    except FileNotFoundError:
        # A port that was given no name has no such file.
        return None


def _check(ffi: Any, result: int, message: str) -> None:
    if result != 0:
        raise DomainError(f"{message}: {os.strerror(ffi.errno)}")
