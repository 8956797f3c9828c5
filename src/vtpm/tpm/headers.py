"""The ten bytes before every TPM command and response: tag, size, code.

Pure; may be imported by everyone.
Source: TPM Main Part 2 (1.2, revision 116), section 6; TPM 2.0 Part 1 (revision 1.59), command and response
structure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from vtpm.errors import ProtocolError
from vtpm.tpm.types import TpmVersion

HEADER_BYTES = 10

MAX_COMMAND_BYTES = 4096
"""Bound on a whole command; libtpms' TPM_BUFFER_MAX."""

TAG_RSP_COMMAND_12 = 0x00C4
TAG_NO_SESSIONS_20 = 0x8001

COMMAND_TAGS: dict[TpmVersion, frozenset[int]] = {
    # TPM_TAG_RQU_COMMAND, _AUTH1_, _AUTH2_
    TpmVersion.V1_2: frozenset({0x00C1, 0x00C2, 0x00C3}),
    # TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS
    TpmVersion.V2_0: frozenset({0x8001, 0x8002}),
}

RESPONSE_TAGS: dict[TpmVersion, frozenset[int]] = {
    # TPM_TAG_RSP_COMMAND, _AUTH1_, _AUTH2_
    TpmVersion.V1_2: frozenset({0x00C4, 0x00C5, 0x00C6}),
    # 0x00C4: TPM_ST_RSP_COMMAND, with which a TPM 2.0 answers a command whose tag it does not know
    TpmVersion.V2_0: frozenset({0x8001, 0x8002, 0x00C4}),
}

_HEADER = struct.Struct(">HII")


@dataclass(frozen=True, slots=True)
class CommandHeader:
    """Head of one TPM command.

    Fields: tag (u16), size_bytes (u32, of the whole command), code (u32, ordinal or command code).
    """

    tag: int
    size_bytes: int
    code: int

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Read the head of a command of which at least HEADER_BYTES have come.

        The tag is not judged: a TPM answers an unknown one itself, and says which version it is by doing so.

        Args:
            data: the command from its first byte; more may follow.
        Raises:
            ProtocolError: fewer than HEADER_BYTES bytes, or a size outside HEADER_BYTES to MAX_COMMAND_BYTES.
        """
        if len(data) < HEADER_BYTES:
            raise ProtocolError(f"TPM command is cut off: {len(data)} of {HEADER_BYTES} header bytes")
        tag, size_bytes, code = _HEADER.unpack_from(data)
        if not HEADER_BYTES <= size_bytes <= MAX_COMMAND_BYTES:
            raise ProtocolError(
                f"TPM command claims {size_bytes} bytes; {HEADER_BYTES} to {MAX_COMMAND_BYTES} are allowed"
            )
        return cls(tag, size_bytes, code)

    def build(self) -> bytes:
        """Return the ten bytes."""
        return _HEADER.pack(self.tag, self.size_bytes, self.code)


@dataclass(frozen=True, slots=True)
class ResponseHeader:
    """Head of one TPM response.

    Fields: tag (u16), size_bytes (u32, of the whole response), return_code (u32).
    """

    tag: int
    size_bytes: int
    return_code: int

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview, max_bytes: int = MAX_COMMAND_BYTES) -> Self:
        """Read the head of a response of which at least HEADER_BYTES have come.

        Args:
            data: the response from its first byte; more may follow.
            max_bytes: bound on the whole response.
        Raises:
            ProtocolError: fewer than HEADER_BYTES bytes, or a size outside HEADER_BYTES to max_bytes.
        """
        if len(data) < HEADER_BYTES:
            raise ProtocolError(f"TPM response is cut off: {len(data)} of {HEADER_BYTES} header bytes")
        tag, size_bytes, return_code = _HEADER.unpack_from(data)
        if not HEADER_BYTES <= size_bytes <= max_bytes:
            raise ProtocolError(f"TPM response claims {size_bytes} bytes; {HEADER_BYTES} to {max_bytes} are allowed")
        return cls(tag, size_bytes, return_code)

    def build(self) -> bytes:
        """Return the ten bytes."""
        return _HEADER.pack(self.tag, self.size_bytes, self.return_code)


def failure_response(version: TpmVersion, return_code: int) -> bytes:
    """Return the whole response of a TPM that only says why it refuses.

    Args:
        version: decides the tag, by which QEMU tells the versions apart (0x00C4 or 0x8001).
        return_code: u32, not zero for a failure.
    """
    tag = TAG_RSP_COMMAND_12 if version is TpmVersion.V1_2 else TAG_NO_SESSIONS_20
    return _HEADER.pack(tag, HEADER_BYTES, return_code)
