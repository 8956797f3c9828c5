"""What a TPM 2.0 signs about itself, read and verified without a TPM: quotes, certifications, public areas of keys.

Pure; bounded: nothing is longer than MAX_ATTEST_BYTES. A signature is verified over the bytes that came, and a
structure is taken only when all of it was read, so two readers cannot see two things in one attestation.

Source: TPM 2.0 Part 2 (revision 1.59): 10.12.8 TPMS_ATTEST, 10.12.1 TPMS_QUOTE_INFO, 10.12.2 TPMS_CERTIFY_INFO, 10.11.1
TPMS_CLOCK_INFO, 10.9.7 TPML_PCR_SELECTION, 11.3.4 TPMT_SIGNATURE, 12.2.4 TPMT_PUBLIC; Part 1, 16 (Names).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from vtpm.errors import AttestationError
from vtpm.tpm.event_log import PCR_COUNT
from vtpm.tpm.hash_algorithms import BY_IDENTIFIER, HashAlgorithm
from vtpm.tpm.structure import MAX_STRUCTURE_BYTES, P256_BYTES, Reader

MAX_ATTEST_BYTES = MAX_STRUCTURE_BYTES
MAX_EXTRA_BYTES = 64
"""Bound on qualifying data: the largest digest of a TPM (TPM2B_DATA)."""

_GENERATED = 0xFF544347
_ST_CERTIFY = 0x8017
_ST_QUOTE = 0x8018
_ALG_SHA256 = 0x000B
_ALG_NULL = 0x0010
_ALG_ECDSA = 0x0018
_ALG_ECC = 0x0023
_ECC_NIST_P256 = 0x0003
_MAX_NAME_BYTES = 66
_MAX_DIGEST_BYTES = 64

# TPMA_OBJECT. Spec: Part 2, 8.3.2.
_FIXED_TPM = 1 << 1
_FIXED_PARENT = 1 << 4
_SENSITIVE_DATA_ORIGIN = 1 << 5
_RESTRICTED = 1 << 16
_DECRYPT = 1 << 17
_SIGN = 1 << 18
ATTESTATION_ATTRIBUTES = _FIXED_TPM | _FIXED_PARENT | _SENSITIVE_DATA_ORIGIN | _RESTRICTED | _SIGN


@dataclass(frozen=True)
class SigningKey:
    """A public area of an ECC P-256 key that signs by ECDSA with SHA-256.

    Args:
        attributes: TPMA_OBJECT.
        name: of the object: algorithm and SHA-256 over the public area.
        key: the public key.
    """

    attributes: int
    name: bytes
    key: ec.EllipticCurvePublicKey

    def require_attestation_key(self) -> None:
        """Check that it signs nothing but what its TPM says of itself, and never leaves it.

        Raises:
            AttestationError: it is unrestricted, can be duplicated, was not made by a TPM, or decrypts.
        """
        missing = ATTESTATION_ATTRIBUTES & ~self.attributes
        if missing or self.attributes & _DECRYPT:
            raise AttestationError(
                f"the key is no attestation key: its attributes are 0x{self.attributes:08x}, fixedTPM, fixedParent,"
                " sensitiveDataOrigin, restricted and sign are needed, and no decrypt"
            )


@dataclass(frozen=True)
class Attested:
    """What all attestations have.

    Args:
        extra: qualifying data, as the caller of the TPM gave it.
        reset_count, restart_count: of the TPM, in its life and since the last reset.
        safe: whether no higher value of the clock can have been told before.
        firmware_version: the vendor's.
    """

    extra: bytes
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int


@dataclass(frozen=True)
class Quote(Attested):
    """A quote over PCRs.

    Args:
        selection: bank and PCRs, each once, ascending; in the TPM's order.
        pcr_digest: SHA-256 over their values, one after another.
    """

    selection: tuple[tuple[HashAlgorithm, tuple[int, ...]], ...]
    pcr_digest: bytes

    def require_values(self, bank: HashAlgorithm, values: Mapping[int, bytes]) -> None:
        """Check that the quote is over exactly these PCRs of one bank, with exactly these values.

        Raises:
            AttestationError: other PCRs, another bank, none at all, or other values.
        """
        wanted = ((bank, tuple(sorted(values))),)
        if not values or self.selection != wanted:
            raise AttestationError(f"the quote is over {_words(self.selection)}, wanted is {_words(wanted)}")
        if any(len(value) != bank.digest_bytes for value in values.values()):
            raise AttestationError(f"a PCR of bank {bank} has another size than its bank")
        if hashlib.sha256(b"".join(values[index] for index in sorted(values))).digest() != self.pcr_digest:
            raise AttestationError("the PCRs that came with the quote are not those that were quoted")


@dataclass(frozen=True)
class Certification(Attested):
    """A TPM's word that it holds an object.

    Args:
        name: of the object.
    """

    name: bytes


def read_signing_key(public: bytes) -> SigningKey:
    """Read the public area of a key that signs.

    Args:
        public: TPMT_PUBLIC, without a size before it.
    Raises:
        AttestationError: it is anything but ECC P-256 with ECDSA and SHA-256, or no point of the curve.
    """
    reader = Reader("the public area", public)
    reader.expect(2, _ALG_ECC, "the type")
    reader.expect(2, _ALG_SHA256, "the name algorithm")
    attributes = reader.number(4)
    reader.sized(_MAX_DIGEST_BYTES)
    reader.expect(2, _ALG_NULL, "the symmetric algorithm")
    reader.expect(2, _ALG_ECDSA, "the scheme")
    reader.expect(2, _ALG_SHA256, "the scheme's hash")
    reader.expect(2, _ECC_NIST_P256, "the curve")
    reader.expect(2, _ALG_NULL, "the key derivation")
    key = reader.p256_point("the public area has a key that is no point of its curve")
    name = _ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(public).digest()
    return SigningKey(attributes, name, key)


def verify_signature(key: SigningKey, attest: bytes, signature: bytes) -> None:
    """Verify a TPMT_SIGNATURE over an attestation.

    Raises:
        AttestationError: it is not this key's over these bytes, or is no ECDSA signature with SHA-256.
    """
    reader = Reader("the signature", signature)
    reader.expect(2, _ALG_ECDSA, "the algorithm")
    reader.expect(2, _ALG_SHA256, "the hash")
    r, s = (int.from_bytes(reader.sized(P256_BYTES), "big") for _ in range(2))
    reader.end()
    try:
        key.key.verify(encode_dss_signature(r, s), attest, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise AttestationError("the attestation is not signed by this key") from None


def read_quote(attest: bytes) -> Quote:
    """Read a TPMS_ATTEST that must be a quote; its signature has been verified.

    Raises:
        AttestationError: it was not made by a TPM, is no quote, is malformed, or its digest is not SHA-256's size.
    """
    reader = Reader("the quote", attest)
    common = _read_common(reader, _ST_QUOTE)
    count = reader.number(4)
    if count > len(BY_IDENTIFIER):
        raise AttestationError(f"the quote is over {count} banks")
    selection = tuple(_read_selection(reader) for _ in range(count))
    pcr_digest = reader.sized(_MAX_DIGEST_BYTES)
    reader.end()
    return Quote(**vars(common), selection=selection, pcr_digest=pcr_digest)


def read_certification(attest: bytes) -> Certification:
    """Read a TPMS_ATTEST that must be a certification of an object; its signature has been verified.

    Raises:
        AttestationError: as read_quote.
    """
    reader = Reader("the certification", attest)
    common = _read_common(reader, _ST_CERTIFY)
    name = reader.sized(_MAX_NAME_BYTES)
    reader.sized(_MAX_NAME_BYTES)
    reader.end()
    return Certification(**vars(common), name=name)


def _read_common(reader: Reader, kind: int) -> Attested:
    reader.expect(4, _GENERATED, "the magic")
    reader.expect(2, kind, "the type")
    reader.sized(_MAX_NAME_BYTES)
    extra = reader.sized(MAX_EXTRA_BYTES)
    _clock, reset_count, restart_count, safe, firmware = struct.unpack(">QIIBQ", reader.take(25))
    return Attested(extra, reset_count, restart_count, safe == 1, firmware)


def _read_selection(reader: Reader) -> tuple[HashAlgorithm, tuple[int, ...]]:
    algorithm = BY_IDENTIFIER.get(identifier := reader.number(2))
    size = reader.number(1)
    if algorithm is None or size > PCR_COUNT // 8:
        raise AttestationError(f"the quote is over bank 0x{identifier:04x} with {size} bytes of PCRs")
    bits = int.from_bytes(reader.take(size), "little")
    return algorithm, tuple(index for index in range(8 * size) if bits >> index & 1)


def _words(selection: tuple[tuple[HashAlgorithm, tuple[int, ...]], ...]) -> str:
    return "; ".join(f"{bank}:{','.join(map(str, indexes))}" for bank, indexes in selection) or "nothing"
