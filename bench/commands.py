"""The TPM 2.0 commands that are timed, as bytes. Source: TPM 2.0 Part 3 (revision 1.59)."""

from __future__ import annotations

import struct

NO_SESSIONS, SESSIONS = 0x8001, 0x8002
NV_INDEX = 0x0180_0BE0
_EMPTY_PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")
_OWNER = bytes.fromhex("40000001")


def _command(tag: int, code: int, body: bytes) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


PCR_READ = _command(NO_SESSIONS, 0x17E, bytes.fromhex("00000001 000b 03 010000"))
"""PCR 0 of the SHA-256 bank."""

GET_RANDOM = _command(NO_SESSIONS, 0x17B, bytes.fromhex("0010"))
"""16 bytes."""

STARTUP_CLEAR = _command(NO_SESSIONS, 0x144, bytes.fromhex("0000"))

READS = {"PCR_Read": PCR_READ, "GetRandom": GET_RANDOM}

# AUTHWRITE, OWNERWRITE, OWNERREAD, AUTHREAD, NO_DA; 32 bytes.
_PUBLIC = struct.pack(">IHIHH", NV_INDEX, 0x000B, 0x0206_0006, 0, 32)

NV_DEFINE = _command(SESSIONS, 0x12A, _OWNER + _EMPTY_PASSWORD + struct.pack(">HH", 0, len(_PUBLIC)) + _PUBLIC)


def nv_write(counter: int) -> bytes:
    """Return TPM2_NV_Write of 32 bytes that no other counter gives: writing what is there already is no write."""
    index = struct.pack(">I", NV_INDEX)
    data = struct.pack(">H24xQ", 32, counter)
    return _command(SESSIONS, 0x137, index + index + _EMPTY_PASSWORD + data + bytes(2))
