"""Framing of the data channel: TPM commands in, TPM responses out, over a byte stream.

Two forms, told apart by the first four bytes. Plain: commands one after another, each with its size in its own header.
Prefixed (swtpm's and the TPM simulator's TPM2_SEND_COMMAND): u32 8, u8 locality, u32 size, command; its response has a
u32 size before and a u32 zero after. Sans-I/O and pure; anyone may import it.

What a command says is not judged here, only where it ends: a TPM answers an unknown tag or code itself.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

from vtpm.tpm.headers import HEADER_BYTES
from vtpm.tpm.types import MAX_LOCALITY

_SEND_COMMAND = b"\x00\x00\x00\x08"
_PREFIX_BYTES = 9
_SIZE_END = 6
_LEAST_AMBIGUOUS_BYTES = 0x0008_0000
"""A plain command whose first four bytes read as the prefix would have at least this size."""

_SIZE = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class TpmCommand:
    """One whole command; the size in its header is the number of its bytes.

    Fields: data (10 bytes or more; kept out of repr, for it can hold passwords), locality (0 to 4 where the prefix
    named one, else None), prefixed (whether the response must be framed likewise).
    """

    data: bytes = field(repr=False)
    locality: int | None
    prefixed: bool


class BadReason(enum.Enum):
    """Why a stream cannot be followed any further."""

    TOO_LARGE = "too large"
    TOO_SMALL = "too small"
    LOCALITY = "locality"
    MISMATCH = "mismatch"
    """Prefix and command header give different sizes."""


@dataclass(frozen=True, slots=True)
class BadCommand:
    """The end of what can be followed.

    Fields: reason, message (for logs: numbers, none of the peer's bytes), prefixed (how an answer must be framed).
    """

    reason: BadReason
    message: str
    prefixed: bool = False


class CommandFramer:
    """Finds commands in a stream. Never raises; keeps at most max_command_bytes + 9 bytes between calls.

    Args:
        max_command_bytes: bound on a whole command, 10 to 524287; above that the two forms could not be told apart.
    Raises:
        ValueError: a bound outside these.
    """

    __slots__ = ("_bad", "_max_bytes", "_partial")

    def __init__(self, max_command_bytes: int) -> None:
        if not HEADER_BYTES <= max_command_bytes < _LEAST_AMBIGUOUS_BYTES:
            raise ValueError(
                f"max_command_bytes is {max_command_bytes}; {HEADER_BYTES} to {_LEAST_AMBIGUOUS_BYTES - 1} are allowed"
            )
        self._max_bytes = max_command_bytes
        self._partial = bytearray()
        self._bad = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes kept of a command that has not ended."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[TpmCommand | BadCommand]:
        """Take the next bytes of the stream, in time linear in their number.

        Returns:
            Whole commands in order. A BadCommand is the last that ever comes, as soon as the header shows it: after a
            size that cannot be true there is no telling where the next command begins.
        """
        length = len(data)
        # Hot path: one whole plain command, handed on without a copy. No prefix passes: it reads as a size above any
        # bound. A stream that has gone bad keeps `_partial` empty, hence the last test.
        if (
            HEADER_BYTES <= length <= self._max_bytes
            and not self._partial
            and _SIZE.unpack_from(data, 2)[0] == length
            and not self._bad
        ):
            return [TpmCommand(data, None, False)]
        return self._feed_slowly(data)

    def _feed_slowly(self, data: bytes) -> list[TpmCommand | BadCommand]:
        found: list[TpmCommand | BadCommand] = []
        at = 0
        view = memoryview(data)
        while not self._bad:
            wanted = self._wanted_bytes()
            if isinstance(wanted, BadCommand):
                found.append(self._give_up(wanted))
                break
            missing = wanted - len(self._partial)
            if missing == 0:
                found.append(self._take())
                continue
            if at == len(data):
                break
            self._partial += view[at : at + missing]
            at = min(at + missing, len(data))
        return found

    def _wanted_bytes(self) -> int | BadCommand:
        """Return how many bytes there must be to decide more; as many as there are when the command is whole."""
        head = self._partial
        if len(head) < len(_SEND_COMMAND):
            return len(_SEND_COMMAND)
        prefixed = head.startswith(_SEND_COMMAND)
        if prefixed:
            if len(head) == len(_SEND_COMMAND):
                return len(_SEND_COMMAND) + 1
            if (locality := head[4]) > MAX_LOCALITY:
                message = f"TPM command asks for locality {locality}; 0 to {MAX_LOCALITY} are allowed"
                return BadCommand(BadReason.LOCALITY, message, prefixed)
        size_end = _PREFIX_BYTES if prefixed else _SIZE_END
        if len(head) < size_end:
            return size_end
        (size,) = _SIZE.unpack_from(head, size_end - _SIZE.size)
        if not HEADER_BYTES <= size <= self._max_bytes:
            reason = BadReason.TOO_SMALL if size < HEADER_BYTES else BadReason.TOO_LARGE
            message = f"TPM command claims {size} bytes; {HEADER_BYTES} to {self._max_bytes} are allowed"
            return BadCommand(reason, message, prefixed)
        if not prefixed:
            return int(size)
        if len(head) < _PREFIX_BYTES + _SIZE_END:
            return _PREFIX_BYTES + _SIZE_END
        (inner,) = _SIZE.unpack_from(head, _PREFIX_BYTES + 2)
        if inner != size:
            message = f"TPM command claims {inner} bytes and its prefix {size}"
            return BadCommand(BadReason.MISMATCH, message, prefixed)
        return _PREFIX_BYTES + int(size)

    def _take(self) -> TpmCommand:
        head = bytes(self._partial)
        self._partial.clear()
        if head.startswith(_SEND_COMMAND):
            return TpmCommand(head[_PREFIX_BYTES:], head[4], True)
        return TpmCommand(head, None, False)

    def _give_up(self, bad: BadCommand) -> BadCommand:
        self._bad = True
        self._partial.clear()
        return bad


def frame_response(resp: bytes, *, prefixed: bool) -> bytes:
    """Return a response as it goes on the stream.

    Args:
        resp: whole TPM response.
        prefixed: as in the command that it answers.
    """
    return _SIZE.pack(len(resp)) + resp + bytes(_SIZE.size) if prefixed else resp
