"""Credentials that one TPM alone can open: TPM2_MakeCredential without a TPM, for an endorsement key of TCG's template.

A credential is a secret encrypted to an endorsement key and bound to the Name of another object: its TPM gives the
secret out only while it holds that object (TPM2_ActivateCredential). Pure; what is read is bounded.

Source: TPM 2.0 Part 1 (revision 1.59): 24 (Credential Protection), 11.4.10.2 KDFa, 11.4.10.3 KDFe, C.6.4 (ECDH for
credentials); TCG EK Credential Profile for TPM Family 2.0, template L-2 (ECC NIST P-256).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from vtpm.errors import AttestationError, UsageError
from vtpm.tpm.structure import P256_BYTES, Reader

MAX_SECRET_BYTES = 32
"""Of one credential: the digest of the endorsement key's name algorithm."""

_ALG_AES = 0x0006
_ALG_SHA256 = 0x000B
_ALG_NULL = 0x0010
_ALG_ECC = 0x0023
_ALG_CFB = 0x0043
_ECC_NIST_P256 = 0x0003
_KEY_BITS = 128
_ATTRIBUTES = 0x000300B2
"""fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt. Spec: Part 2, 8.3.2."""
_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret of the endorsement hierarchy."""


@dataclass(frozen=True)
class EndorsementKey:
    """A public area that is of TCG's template.

    Args:
        key: the public key.
        fingerprint: SHA-256 over the public area (TPMT_PUBLIC), in hex.
    """

    key: ec.EllipticCurvePublicKey
    fingerprint: str


@dataclass(frozen=True)
class Credential:
    """Contents of a TPM2B_ID_OBJECT and of a TPM2B_ENCRYPTED_SECRET."""

    credential: bytes
    encrypted_secret: bytes


def read_endorsement_key(public: bytes) -> EndorsementKey:
    """Read the public area of an endorsement key.

    A key with other attributes or another policy might be one whose private half somebody knows, or that opens
    credentials for whom it is not meant. That a TPM has it at all, the public area does not say.

    Args:
        public: TPMT_PUBLIC, without a size before it; untrusted.
    Raises:
        AttestationError: it is not of TCG's template L-2, or no point of the curve.
    """
    reader = Reader("the endorsement key", public)
    reader.expect(2, _ALG_ECC, "the type")
    reader.expect(2, _ALG_SHA256, "the name algorithm")
    reader.expect(4, _ATTRIBUTES, "the attributes")
    if reader.sized(len(_POLICY)) != _POLICY:
        raise AttestationError("the endorsement key has another policy than TCG's template")
    reader.expect(2, _ALG_AES, "the symmetric algorithm")
    reader.expect(2, _KEY_BITS, "the symmetric key's size")
    reader.expect(2, _ALG_CFB, "the symmetric mode")
    reader.expect(2, _ALG_NULL, "the scheme")
    reader.expect(2, _ECC_NIST_P256, "the curve")
    reader.expect(2, _ALG_NULL, "the key derivation")
    key = reader.p256_point("the endorsement key is no point of its curve")
    return EndorsementKey(key, hashlib.sha256(public).hexdigest())


def make_credential(endorsement: EndorsementKey, name: bytes, secret: bytes) -> Credential:
    """Encrypt a secret for the TPM that has both keys.

    Args:
        name: of the object that the TPM has to hold: algorithm and digest.
        secret: 1 to MAX_SECRET_BYTES bytes.
    Raises:
        UsageError: it has none, or more.
    """
    if not 1 <= len(secret) <= MAX_SECRET_BYTES:
        raise UsageError(f"a credential holds 1 to {MAX_SECRET_BYTES} bytes, not {len(secret)}")
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    x, y = _point(ephemeral.public_key())
    shared = ephemeral.exchange(ec.ECDH(), endorsement.key)
    seed = _kdfe(shared, b"IDENTITY", x, _point(endorsement.key)[0])
    encryptor = Cipher(AES(_kdfa(seed, b"STORAGE", name, _KEY_BITS)), CFB(bytes(16))).encryptor()
    encrypted = encryptor.update(_sized(secret)) + encryptor.finalize()
    integrity = hmac.digest(_kdfa(seed, b"INTEGRITY", b"", 256), encrypted + name, "sha256")
    return Credential(_sized(integrity) + encrypted, _sized(x) + _sized(y))


def _kdfe(shared: bytes, use: bytes, party_u: bytes, party_v: bytes) -> bytes:
    """Return 256 bits. NIST SP 800-56A's concatenation, with a zero byte behind the use."""
    return ConcatKDFHash(SHA256(), 32, use + b"\0" + party_u + party_v).derive(shared)


def _kdfa(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """Return so many bits. NIST SP 800-108 in counter mode."""
    return KBKDFHMAC(
        SHA256(), Mode.CounterMode, bits // 8, 4, 4, CounterLocation.BeforeFixed, label, context, fixed=None
    ).derive(key)


def _point(key: ec.EllipticCurvePublicKey) -> tuple[bytes, bytes]:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(P256_BYTES, "big"), numbers.y.to_bytes(P256_BYTES, "big")


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
