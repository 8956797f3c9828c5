"""Byte-stuffed frames for links whose ends may die and be replaced in the middle of one (decision record 4). Pure.

A frame on the wire is END, the escaped body and CRC-32, END. Escapes are those of RFC 1055 (SLIP). END never occurs
inside a frame, so whatever a payload holds, it cannot forge the beginning of another. May be imported by everyone.
"""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass

from vtpm.errors import ProtocolError

END = b"\xc0"
_ESC = b"\xdb"
_ESC_END = b"\xdb\xdc"
_ESC_ESC = b"\xdb\xdd"
_CRC_BYTES = 4


class Damage(enum.Enum):
    """Why a frame was skipped."""

    CRC = "its checksum is wrong"
    ESCAPE = "it has an escape that does not exist"
    TOO_LARGE = "it is larger than a frame may be"
    TOO_SMALL = "it is smaller than a checksum"


@dataclass(frozen=True)
class BadFrame:
    """A frame that was skipped; the next one is whole again."""

    damage: Damage


def encode_frame(body: bytes) -> bytes:
    """Return the frame for a body: at most twice its length plus 10 bytes."""
    checked = body + zlib.crc32(body).to_bytes(_CRC_BYTES, "big")
    return END + checked.replace(_ESC, _ESC_ESC).replace(END, _ESC_END) + END


class Deframer:
    """Takes the bytes of a stream as they come and returns whole bodies.

    Holds at most one frame's worth of bytes, whatever arrives.

    Args:
        max_body_bytes: bound on one body.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max_escaped = 2 * (max_body_bytes + _CRC_BYTES)
        self._max_body = max_body_bytes
        # Not a list of the pieces that came: a peer that sends two bytes at a time would make that twenty times larger.
        self._held = bytearray()
        self._overflowed = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of a frame that has not ended: at most twice max_body_bytes + 8."""
        return len(self._held)

    def feed(self, data: bytes) -> list[bytes | BadFrame]:
        """Take more of the stream; return the bodies that are whole by it, and what was skipped, in order."""
        found: list[bytes | BadFrame] = []
        *whole, rest = data.split(END)
        for piece in whole:
            if piece:
                self._hold(piece)
            if self._held or self._overflowed:
                found.append(self._finish())
        self._hold(rest)
        return found

    def _hold(self, piece: bytes) -> None:
        if len(self._held) + len(piece) > self._max_escaped:
            self._overflowed = True
            self._held.clear()
        if not self._overflowed:
            self._held += piece

    def _finish(self) -> bytes | BadFrame:
        escaped = bytes(self._held)
        overflowed = self._overflowed
        self._held.clear()
        self._overflowed = False
        return BadFrame(Damage.TOO_LARGE) if overflowed else self._body(escaped)

    def _body(self, escaped: bytes) -> bytes | BadFrame:
        if escaped.count(_ESC) != escaped.count(_ESC_ESC) + escaped.count(_ESC_END):
            return BadFrame(Damage.ESCAPE)
        checked = escaped.replace(_ESC_END, END).replace(_ESC_ESC, _ESC)
        if len(checked) < _CRC_BYTES:
            return BadFrame(Damage.TOO_SMALL)
        if len(checked) - _CRC_BYTES > self._max_body:
            return BadFrame(Damage.TOO_LARGE)
        body = checked[:-_CRC_BYTES]
        if zlib.crc32(body).to_bytes(_CRC_BYTES, "big") != checked[-_CRC_BYTES:]:
            return BadFrame(Damage.CRC)
        return body


def check_body(body: bytes, max_body_bytes: int) -> bytes:
    """Return the body if a peer's deframer takes it.

    Raises:
        ProtocolError: it is too large.
    """
    if len(body) > max_body_bytes:
        raise ProtocolError(f"a message of {len(body)} bytes is too large for a frame of {max_body_bytes}")
    return body
