"""Attestations as a TPM makes them, with a key that a test holds; what a TPM would never make, too."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ATTRIBUTES = 0x00050472
"""fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign."""
KEY = ec.derive_private_key(0x5EED, ec.SECP256R1())
NONCE = bytes(range(32))
PCRS = {0: b"f" * 32, 7: b"s" * 32}


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def public_area(
    key: ec.EllipticCurvePrivateKey = KEY,
    attributes: int = ATTRIBUTES,
    algorithms: Sequence[int] = (0x0023, 0x000B, 0x0010, 0x0018, 0x000B, 0x0003, 0x0010),
    policy: bytes = b"",
) -> bytes:
    """A TPMT_PUBLIC. algorithms: type, nameAlg, symmetric, scheme, its hash, curve, kdf."""
    numbers = key.public_key().public_numbers()
    kind, name, symmetric, scheme, scheme_hash, curve, kdf = (struct.pack(">H", value) for value in algorithms)
    unique = b"".join(sized(value.to_bytes(32, "big")) for value in (numbers.x, numbers.y))
    head = kind + name + struct.pack(">I", attributes) + sized(policy)
    return head + symmetric + scheme + scheme_hash + curve + kdf + unique


def attest(
    body: bytes, *, kind: int = 0x8018, magic: int = 0xFF544347, extra: bytes = NONCE, safe: int = 1, resets: int = 3
) -> bytes:
    """A TPMS_ATTEST around a body."""
    head = struct.pack(">IH", magic, kind) + sized(b"\x00\x0b" + bytes(32)) + sized(extra)
    return head + struct.pack(">QIIBQ", 1000, resets, 1, safe, 0x2019) + body


def selections(*banks: tuple[int, Sequence[int]]) -> bytes:
    """A TPML_PCR_SELECTION of (algorithm, PCRs)."""
    bits = ((algorithm, sum(1 << index for index in indexes)) for algorithm, indexes in banks)
    return struct.pack(">I", len(banks)) + b"".join(
        struct.pack(">HB", algorithm, 3) + value.to_bytes(3, "little") for algorithm, value in bits
    )


def quote_body(values: Mapping[int, bytes] = PCRS, algorithm: int = 0x000B) -> bytes:
    """A TPMS_QUOTE_INFO over PCRs of one bank."""
    digest = hashlib.sha256(b"".join(values[index] for index in sorted(values))).digest()
    return selections((algorithm, sorted(values))) + sized(digest)


def sign(data: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """A TPMT_SIGNATURE."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return struct.pack(">HH", 0x0018, 0x000B) + b"".join(sized(value.to_bytes(32, "big")) for value in (r, s))
