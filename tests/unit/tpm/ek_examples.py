"""Endorsement keys as TCG's template makes them, with a private half that a test holds; and others."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.tpm.attest_examples import sized

EK = ec.derive_private_key(0xE4, ec.SECP256R1())
ATTRIBUTES = 0x000300B2
POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
ALGORITHMS = (0x0023, 0x000B, 0x0006, 128, 0x0043, 0x0010, 0x0003, 0x0010)
"""Type, nameAlg; symmetric, its bits and mode; scheme, curve, kdf."""


def endorsement_area(
    key: ec.EllipticCurvePrivateKey = EK,
    attributes: int = ATTRIBUTES,
    policy: bytes = POLICY,
    algorithms: Sequence[int] = ALGORITHMS,
    point: tuple[int, int] | None = None,
) -> bytes:
    """A TPMT_PUBLIC."""
    numbers = key.public_key().public_numbers()
    kind, name, *details = (struct.pack(">H", value) for value in algorithms)
    unique = b"".join(sized(value.to_bytes(32, "big")) for value in point or (numbers.x, numbers.y))
    return kind + name + struct.pack(">I", attributes) + sized(policy) + b"".join(details) + unique
