"""Builds the hostile image, and steers a vTPM that runs it, by its client's socket.

An order is a line of words in the place of a TPM command; `vm_hostile` follows it, and answers with another line.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.image.building import ROOT, build_vtpmd
from vtpm.image.definition import DEFINITION_FILE

ENTRY = "vtpm.instance.vm_hostile"
PROGRAM = Path(__file__).with_name("vm_hostile.py")
ANSWER_S = 30.0
_HEADER = struct.Struct(">HII")


def build_hostile(place: Path) -> Path:
    """Build an image like this checkout's, but with the hostile program as init; return the folder of images."""
    source = place / "src"
    shutil.copytree(ROOT / "src" / "vtpm", source / "vtpm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROGRAM, source / "vtpm" / "instance")
    definition = source / DEFINITION_FILE.relative_to(ROOT / "src")
    honest = definition.read_text()
    changed = honest.replace('entry = "vtpm.instance.vm_main"', f'entry = "{ENTRY}"')
    assert changed != honest
    definition.write_text(changed)
    return build_vtpmd(place, source=source)


def put_in_place(images: Path, into: Path) -> str:
    """Copy the only image of a folder of images into another, where it is the newest; return its measurement."""
    (image,) = images.glob("*/*")
    copy = into / image.relative_to(images)
    shutil.copytree(image, copy)
    os.utime(copy)
    return image.name


class Attacker:
    """The client of a hostile vTPM; a context manager that hangs up.

    Args:
        data_socket: the vTPM's.
    """

    def __init__(self, data_socket: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(ANSWER_S)
        self._sock.connect(str(data_socket))

    def order(self, *words: object) -> str:
        """Have it do something; return its answer, which is all that may come over this socket.

        Raises:
            ConnectionError: it has been ended, or its relay has.
        """
        text = " ".join(map(str, words)).encode()
        self._sock.sendall(_HEADER.pack(0x8001, _HEADER.size + len(text), 0x2000_0000) + text)
        tag, size, code = _HEADER.unpack(self._exactly(_HEADER.size))
        assert (tag, code) == (0x8001, 0), (hex(tag), hex(code))
        return self._exactly(size - _HEADER.size).decode()

    def came_unasked(self) -> bytes:
        """Return what has come beside the answers."""
        self._sock.setblocking(False)
        try:
            return self._sock.recv(65536)
        except BlockingIOError:
            return b""
        finally:
            self._sock.settimeout(ANSWER_S)

    def wait_ended(self) -> bytes:
        """Return what comes until the relay hangs up."""
        came = b""
        try:
            while data := self._sock.recv(65536):
                came += data
        except ConnectionResetError:
            pass
        return came

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._sock.recv(count - len(data))
            if not part:
                raise ConnectionResetError("the relay hung up")
            data += part
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
