"""Hashes that a bank of PCRs may have, under the names of tpm2-tools and the numbers of the TCG.

Pure; may be imported by everyone.
"""

from __future__ import annotations

import enum
import hashlib

from vtpm.errors import UsageError


class HashAlgorithm(enum.StrEnum):
    """A hash of PCR banks; the value is also hashlib's name of it."""

    SHA1 = "sha1"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"

    @property
    def identifier(self) -> int:
        """TPM_ALG_ID. Spec: TPM 2.0 Part 2 (revision 1.59), 6.3."""
        return _IDENTIFIERS[self]

    @property
    def digest_bytes(self) -> int:
        """Size of a digest, and so of a PCR."""
        return hashlib.new(self, usedforsecurity=False).digest_size


_IDENTIFIERS = {
    HashAlgorithm.SHA1: 0x0004,
    HashAlgorithm.SHA256: 0x000B,
    HashAlgorithm.SHA384: 0x000C,
    HashAlgorithm.SHA512: 0x000D,
}

BY_IDENTIFIER = {identifier: algorithm for algorithm, identifier in _IDENTIFIERS.items()}
"""TPM_ALG_ID -> algorithm."""


def refuse_sha1(algorithm: HashAlgorithm) -> None:
    """Refuse the hash on which nothing may rest: a collision in it forges a boot.

    Raises:
        UsageError: the algorithm is SHA-1.
    """
    if algorithm is HashAlgorithm.SHA1:
        raise UsageError("PCRs of the bank sha1 protect nothing", next_step="Use the bank sha256")


def extend(algorithm: HashAlgorithm, value: bytes, digest: bytes) -> bytes:
    """Return the value of a PCR after TPM2_PCR_Extend.

    Spec: TPM 2.0 Part 1 (revision 1.59), "Extend of a PCR": H(old value || digest).
    """
    return hashlib.new(algorithm, value + digest, usedforsecurity=False).digest()
