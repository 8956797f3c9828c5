"""TPM commands that exercise libtpms widely: for the engine's target, and for the test that knows their names. Pure."""

from __future__ import annotations

import struct

OWNER = 0x40000001
NV_INDEX = 0x01500001
EMPTY_PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")


def _two(code: int, body: bytes = b"", *, handles: tuple[int, ...] = ()) -> bytes:
    """A TPM 2.0 command; with handles, authorised by one empty password."""
    content = b"".join(struct.pack(">I", handle) for handle in handles)
    content += (EMPTY_PASSWORD if handles else b"") + body
    return struct.pack(">HII", 0x8002 if handles else 0x8001, 10 + len(content), code) + content


def _sized(content: bytes) -> bytes:
    return struct.pack(">H", len(content)) + content


def _primary(public: str) -> bytes:
    # Type, SHA-256, fixedTPM fixedParent sensitiveDataOrigin userWithAuth restricted decrypt, no policy, AES-128-CFB.
    kind, rest = public.split(None, 1)
    area = bytes.fromhex(f"{kind} 000b 00030072 0000 0006 0080 0043 {rest}")
    return _two(0x131, _sized(bytes(4)) + _sized(area) + bytes(2) + bytes(4), handles=(OWNER,))


COMMANDS_20 = {
    "Startup": _two(0x144, bytes(2)),
    "SelfTest": _two(0x143, b"\x01"),
    "GetRandom": _two(0x17B, struct.pack(">H", 32)),
    "CreatePrimary RSA": _primary("0001 0010 0800 00000000 0000"),
    "CreatePrimary ECC": _primary("0023 0010 0003 0010 0000 0000"),
    "NV_DefineSpace": _two(
        0x12A,
        bytes(2) + _sized(struct.pack(">IHIHH", NV_INDEX, 0x000B, 0x00060006, 0, 32)),
        handles=(OWNER,),
    ),
    "NV_Write": _two(0x137, _sized(b"kept") + bytes(2), handles=(OWNER, NV_INDEX)),
    "ReadClock": _two(0x181),
    "Shutdown": _two(0x145, bytes(2)),
}
COMMANDS_12 = {
    "Startup": bytes.fromhex("00c1 0000000c 00000099 0001"),
    "SelfTestFull": bytes.fromhex("00c1 0000000a 00000050"),
    "GetRandom": bytes.fromhex("00c1 0000000e 00000046 00000020"),
    "Extend": bytes.fromhex("00c1 00000022 00000014 00000000") + bytes(20),
    "SaveState": bytes.fromhex("00c1 0000000a 00000098"),
}
