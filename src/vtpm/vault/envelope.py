"""Authenticated encryption of one blob of TPM state; docs/state-format.md, "State envelope".

Pure: bytes in, bytes out. Imported by the vault alone.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpm.errors import ProtocolError, StateError
from vtpm.secret import KEY_BYTES, Secret
from vtpm.tpm.types import MAX_STATE_BYTES, InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.records import MAX_COUNTER, MAX_ENGINE_VERSION

MAGIC = b"VTPMSTAT"
FORMAT_VERSION = 1
SALT_BYTES = 32
TAG_BYTES = 16

_HEADER = struct.Struct(">8sHH16sBBHQQII32s")
HEADER_BYTES = _HEADER.size
MAX_ENVELOPE_BYTES = HEADER_BYTES + MAX_STATE_BYTES + TAG_BYTES

# Constant, because every envelope has a key of its own: see the format document.
_NONCE = bytes(12)
_STATE_INFO = b"vtpm state v1"
_DIGEST_INFO = b"vtpm save digest v1"
TPM_CODES = {TpmVersion.V1_2: 12, TpmVersion.V2_0: 20}
"""How formats of the vault write a TPM version."""


@dataclass(frozen=True)
class StateMeta:
    """What an envelope says about its content.

    Args:
        epoch, version: 1 to MAX_COUNTER.
        engine_version: least engine version that reads it, MAJOR<<16 | MINOR<<8 | MICRO.
    """

    vtpm_id: VtpmId
    kind: StateKind
    tpm_version: TpmVersion
    epoch: int
    version: int
    engine_version: int


@dataclass(frozen=True)
class Expected:
    """What an envelope must be to be opened.

    Args:
        epoch, version: exactly these, as the store's row has them.
        engine_version: of the engine that will read the state; the envelope's may be equal or lower.
    """

    vtpm_id: VtpmId
    kind: StateKind
    tpm_version: TpmVersion
    epoch: int
    version: int
    engine_version: int


def seal(key: Secret, meta: StateMeta, plaintext: bytes) -> bytes:
    """Seal one blob of state.

    Args:
        key: the vTPM's own key.
        plaintext: 1 to MAX_STATE_BYTES bytes.
    Returns:
        The envelope, at most MAX_ENVELOPE_BYTES.
    Raises:
        ProtocolError: the blob is empty or too large.
        StateError: a field of `meta` has no place in the header.
    """
    if not 1 <= len(plaintext) <= MAX_STATE_BYTES:
        raise ProtocolError(
            f"{_name(meta)} has {len(plaintext)} bytes; 1 to {MAX_STATE_BYTES} can be kept",
        )
    if not (1 <= meta.epoch <= MAX_COUNTER and 1 <= meta.version <= MAX_COUNTER):
        raise StateError(f"{_name(meta)}: epoch {meta.epoch}, version {meta.version} are out of bounds")
    if not 0 <= meta.engine_version <= MAX_ENGINE_VERSION:
        raise StateError(f"{_name(meta)}: engine version {meta.engine_version} is out of bounds")
    salt = secrets.token_bytes(SALT_BYTES)
    header = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        meta.vtpm_id.bytes,
        meta.kind,
        TPM_CODES[meta.tpm_version],
        0,
        meta.epoch,
        meta.version,
        meta.engine_version,
        len(plaintext),
        salt,
    )
    return header + _cipher(key, meta.vtpm_id, meta.kind, salt).encrypt(_NONCE, plaintext, header)


def open_(key: Secret, expected: Expected, blob: bytes) -> bytes:
    """Verify one envelope and return the state in it.

    The header is compared first, only so that a refusal can say what differs; nothing is returned before the
    tag over header and ciphertext is verified.

    Raises:
        StateError: damaged, of an unknown format, or not what was expected; the message says which.
    """
    name = _name(expected)
    if not HEADER_BYTES + TAG_BYTES < len(blob) <= MAX_ENVELOPE_BYTES:
        raise StateError(f"{name} is damaged: {len(blob)} bytes are no envelope")
    (
        magic,
        format_version,
        header_bytes,
        uuid_bytes,
        kind,
        tpm_code,
        reserved,
        epoch,
        version,
        engine_version,
        plaintext_bytes,
        salt,
    ) = _HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise StateError(f"{name} is damaged: no envelope begins like this")
    if format_version != FORMAT_VERSION:
        raise StateError(
            f"{name} has format version {format_version}; this program reads {FORMAT_VERSION}",
            next_step="Use the program that wrote it.",
        )
    if header_bytes != HEADER_BYTES or reserved != 0 or len(blob) != HEADER_BYTES + plaintext_bytes + TAG_BYTES:
        raise StateError(f"{name} is damaged: its lengths do not agree")
    if uuid_bytes != expected.vtpm_id.bytes:
        raise StateError(f"{name} is foreign: it belongs to vTPM {UUID(bytes=uuid_bytes)}")
    if kind != expected.kind:
        raise StateError(f"{name} is of another kind: {kind}")
    if tpm_code != TPM_CODES[expected.tpm_version]:
        raise StateError(f"{name} is of another TPM version: {tpm_code}, not {TPM_CODES[expected.tpm_version]}")
    if epoch != expected.epoch:
        raise StateError(f"{name} is of another epoch: {epoch}, not {expected.epoch}")
    if version != expected.version:
        age = "an older" if version < expected.version else "a later"
        raise StateError(f"{name} is of {age} version: {version}, not {expected.version}")
    if engine_version > expected.engine_version:
        raise StateError(
            f"{name} needs engine {_dotted(engine_version)}; this one is {_dotted(expected.engine_version)}",
            next_step="Start the vTPM with the newer image; nothing was changed.",
        )
    cipher = _cipher(key, expected.vtpm_id, expected.kind, salt)
    try:
        return cipher.decrypt(_NONCE, blob[HEADER_BYTES:], blob[:HEADER_BYTES])
    except InvalidTag:
        raise StateError(f"{name} is damaged, or sealed under another key") from None


def least_engine_version(blob: bytes) -> int:
    """Return the engine version that an envelope needs; to be believed of one that `open_` has opened, and no other."""
    version: int = _HEADER.unpack_from(blob)[-3]
    return version


def save_digest(
    key: Secret, vtpm_id: VtpmId, instance_id: InstanceId, seq: int, kind: StateKind, plaintext: bytes
) -> bytes:
    """Return the keyed digest by which a replayed save is recognised.

    Args:
        seq: 0 to MAX_COUNTER.
        plaintext: the state, or empty for a deletion.
    """
    mark_key = HKDF(SHA256(), KEY_BYTES, None, _DIGEST_INFO + vtpm_id.bytes).derive(key.reveal())
    mac = HMAC(mark_key, SHA256())
    mac.update(instance_id.bytes + struct.pack(">QB", seq, kind))
    mac.update(plaintext)
    return mac.finalize()


def _cipher(key: Secret, vtpm_id: VtpmId, kind: StateKind, salt: bytes) -> AESGCM:
    info = _STATE_INFO + vtpm_id.bytes + bytes([kind])
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, info).derive(key.reveal()))


def _name(what: StateMeta | Expected) -> str:
    return f"{what.kind.name.lower()} state of vTPM {what.vtpm_id}"


def _dotted(engine_version: int) -> str:
    return f"{engine_version >> 16}.{engine_version >> 8 & 0xFF}.{engine_version & 0xFF}"
