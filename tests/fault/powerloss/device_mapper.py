"""Makes dm-log-writes devices and puts marks into their logs; runs in the guest, without dmsetup.

Speaks the kernel's ioctls as include/uapi/linux/dm-ioctl.h lays them out.
"""

from __future__ import annotations

import fcntl
import os
import struct

_CREATE, _REMOVE, _SUSPEND, _LOAD, _MESSAGE = 3, 4, 6, 9, 14
_HEADER = struct.Struct("<3IIIIiIIIQ128s129s7s")
_SPEC = struct.Struct("<QQiI16s")
_BUFFER_BYTES = 4096


class DeviceMapper:
    """The control device."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)

    def create(self, name: str, sectors: int, target: str, parameters: str) -> str:
        """Make and start a device of one target; returns its node."""
        number = _HEADER.unpack_from(self._ioctl(_CREATE, name))[10]
        line = parameters.encode() + b"\0"
        size = (_SPEC.size + len(line) + 7) & ~7
        self._ioctl(_LOAD, name, (_SPEC.pack(0, sectors, 0, size, target.encode()) + line).ljust(size, b"\0"), count=1)
        self._ioctl(_SUSPEND, name)  # without the suspend flag this resumes
        return f"/dev/dm-{os.minor(number)}"

    def message(self, name: str, words: str) -> None:
        self._ioctl(_MESSAGE, name, struct.pack("<Q", 0) + words.encode() + b"\0")

    def remove(self, name: str) -> None:
        self._ioctl(_REMOVE, name)

    def _ioctl(self, number: int, name: str, payload: bytes = b"", count: int = 0) -> bytearray:
        header = _HEADER.pack(
            4, 0, 0, _BUFFER_BYTES, _HEADER.size, count, 0, 0, 0, 0, 0, name.encode(), b"", b""
        )  # fmt: skip
        buffer = bytearray((header + payload).ljust(_BUFFER_BYTES, b"\0"))
        fcntl.ioctl(self._fd, 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | number, buffer)
        return buffer
