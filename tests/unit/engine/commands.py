"""The few TPM commands that the engine's tests send, marshalled by hand. Test code only."""

from __future__ import annotations

import struct

OWNER = 0x40000001
# Owner and index authorisation may read and write; noDA.
NV_ATTRIBUTES = 0x02060006
# fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, decrypt
STORAGE_KEY = 0x00030472
_EMPTY_PASSWORD = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)


def code_of(response: bytes) -> int:
    """Return code of a response whose size field is right."""
    _, size, code = struct.unpack_from(">HII", response)
    assert size == len(response)
    return code


def _command(tag: int, code: int, body: bytes) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


# TPM 2.0


def startup(state: int = 0) -> bytes:
    return _command(0x8001, 0x144, struct.pack(">H", state))


def get_random(size: int) -> bytes:
    return _command(0x8001, 0x17B, struct.pack(">H", size))


def pcr_read(pcr: int) -> bytes:
    selection = bytearray(3)
    selection[pcr // 8] = 1 << pcr % 8
    return _command(0x8001, 0x17E, struct.pack(">IHB", 1, 0x000B, 3) + selection)


def pcr_value(response: bytes) -> bytes:
    """SHA-256 value in the response to `pcr_read`."""
    assert code_of(response) == 0
    return response[-32:]


def pcr_extend(pcr: int, digest: bytes) -> bytes:
    return _command(0x8002, 0x182, struct.pack(">I", pcr) + _EMPTY_PASSWORD + struct.pack(">IH", 1, 0x000B) + digest)


def pcr_reset(pcr: int) -> bytes:
    return _command(0x8002, 0x13D, struct.pack(">I", pcr) + _EMPTY_PASSWORD)


def nv_define(index: int, size: int) -> bytes:
    public = struct.pack(">IHIHH", index, 0x000B, NV_ATTRIBUTES, 0, size)
    return _command(0x8002, 0x12A, struct.pack(">I", OWNER) + _EMPTY_PASSWORD + _sized(b"") + _sized(public))


def nv_write(index: int, data: bytes) -> bytes:
    return _command(0x8002, 0x137, struct.pack(">II", OWNER, index) + _EMPTY_PASSWORD + _sized(data) + b"\0\0")


def nv_read(index: int, size: int) -> bytes:
    return _command(0x8002, 0x14E, struct.pack(">II", OWNER, index) + _EMPTY_PASSWORD + struct.pack(">HH", size, 0))


def nv_value(response: bytes, size: int) -> bytes:
    """Data in the response to `nv_read`: after header, parameter size and the data's own size."""
    assert code_of(response) == 0
    return response[16 : 16 + size]


def create_primary(key_bits: int, unique: bytes) -> bytes:
    """An RSA storage key under the owner; `unique` makes another key of the same seed."""
    public = struct.pack(">HHIH", 0x0001, 0x000B, STORAGE_KEY, 0)
    public += struct.pack(">HHHHHI", 0x0006, 128, 0x0043, 0x0010, key_bits, 0) + _sized(unique)
    sensitive = _sized(_sized(b"") + _sized(b""))
    body = struct.pack(">I", OWNER) + _EMPTY_PASSWORD + sensitive + _sized(public) + _sized(b"")
    return _command(0x8002, 0x131, body + struct.pack(">I", 0))


def start_session() -> bytes:
    """An HMAC session without key, whose parameter encryption is AES-128-CFB."""
    nonce = _sized(b"n" * 16)
    body = struct.pack(">II", 0x40000007, 0x40000007) + nonce + _sized(b"")
    return _command(0x8001, 0x176, body + struct.pack(">BHHHH", 0, 0x0006, 128, 0x0043, 0x000B))


def hash_encrypted(session: int, data: bytes) -> bytes:
    """TPM2_Hash of `data`, which the session (continued, decrypt) makes the TPM decrypt first."""
    area = struct.pack(">I", session) + _sized(b"m" * 16) + b"\x21" + _sized(b"")
    parameters = _sized(data) + struct.pack(">HI", 0x000B, 0x40000007)
    return _command(0x8002, 0x17D, struct.pack(">I", len(area)) + area + parameters)


def created_handle(response: bytes) -> int:
    """Handle in the response to `create_primary` or `start_session`."""
    assert code_of(response) == 0
    handle: int = struct.unpack_from(">I", response, 10)[0]
    return handle


def flush(handle: int) -> bytes:
    return _command(0x8001, 0x165, struct.pack(">I", handle))


# Dictionary-attack protection. What is DA-protected here has neither noDA nor, but for its own, any authorisation.

_LOCKOUT = 0x4000000A


def _password(value: bytes) -> bytes:
    """The authorisation area of one password session."""
    area = struct.pack(">IHB", 0x40000009, 0, 0) + _sized(value)
    return struct.pack(">I", len(area)) + area


def da_define(index: int, password: bytes, size: int = 8) -> bytes:
    """Define an NV index that its password alone opens, and that counts wrong ones."""
    public = struct.pack(">IHIHH", index, 0x000B, 0x00040004, 0, size)
    return _command(0x8002, 0x12A, struct.pack(">I", OWNER) + _EMPTY_PASSWORD + _sized(password) + _sized(public))


def da_write(index: int, password: bytes, data: bytes) -> bytes:
    return _command(0x8002, 0x137, struct.pack(">II", index, index) + _password(password) + _sized(data) + b"\0\0")


def da_read(index: int, password: bytes, size: int = 8) -> bytes:
    return _command(0x8002, 0x14E, struct.pack(">II", index, index) + _password(password) + struct.pack(">HH", size, 0))


def da_lock_reset(password: bytes = b"") -> bytes:
    return _command(0x8002, 0x139, struct.pack(">I", _LOCKOUT) + _password(password))


def da_parameters(max_tries: int, interval_s: int, recovery_s: int) -> bytes:
    numbers = struct.pack(">III", max_tries, interval_s, recovery_s)
    return _command(0x8002, 0x13A, struct.pack(">I", _LOCKOUT) + _password(b"") + numbers)


# TPM 1.2

STARTUP_CLEAR_12 = 1
STARTUP_STATE_12 = 2


def startup_12(kind: int = STARTUP_CLEAR_12) -> bytes:
    return _command(0x00C1, 0x99, struct.pack(">H", kind))


def save_state_12() -> bytes:
    return _command(0x00C1, 0x98, b"")


def pcr_read_12(pcr: int) -> bytes:
    return _command(0x00C1, 0x15, struct.pack(">I", pcr))


def pcr_extend_12(pcr: int, digest: bytes) -> bytes:
    return _command(0x00C1, 0x14, struct.pack(">I", pcr) + digest)


def nv_define_12(index: int, size: int) -> bytes:
    pcr_info = struct.pack(">H3sB20s", 3, bytes(3), 0x1F, bytes(20))
    # PPWRITE; asks nothing as long as NV has not been locked
    permission = struct.pack(">HI", 0x0017, 1)
    public = struct.pack(">HI", 0x0018, index) + pcr_info * 2 + permission + bytes(3) + struct.pack(">I", size)
    return _command(0x00C1, 0xCC, public + bytes(20))


def nv_write_12(index: int, data: bytes) -> bytes:
    return _command(0x00C1, 0xCD, struct.pack(">III", index, 0, len(data)) + data)


def nv_read_12(index: int, size: int) -> bytes:
    return _command(0x00C1, 0xCF, struct.pack(">III", index, 0, size))


def value_12(response: bytes, size: int) -> bytes:
    """The last `size` bytes of a response that must be a success."""
    assert code_of(response) == 0
    return response[-size:]
