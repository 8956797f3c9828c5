"""A manufacturer of TPMs, and platforms that have them or pretend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.unit.tpm.attest_examples import public_area
from tests.unit.tpm.ek_examples import EK, endorsement_area
from vtpm.migration.certificates import PlatformKind
from vtpm.migration.enrolment import ENDORSEMENT_KEY_PURPOSE, EnrolmentRequest

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


@dataclass(frozen=True)
class Signer:
    """An authority of a manufacturer's."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def authority(
    text: str,
    by: Signer | None = None,
    *,
    ca: bool = True,
    signs: bool = True,
    path_length: int | None = None,
    days: int = 1000,
) -> Signer:
    """Make one: a root, or by another."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(text))
        .issuer_name(by.certificate.subject if by else name(text))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=10))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, decipher_only=False, **usage
            ),
            critical=True,
        )
    )
    return Signer(builder.sign(by.key if by else key, hashes.SHA256()), key)


def ek_certificate(
    by: Signer,
    key: ec.EllipticCurvePublicKey | None = None,
    *,
    purposes: Sequence[x509.ObjectIdentifier] = (ENDORSEMENT_KEY_PURPOSE,),
    ca: bool = False,
    days: int = 1000,
) -> bytes:
    """As the EK Credential Profile has it: no subject, the TPM's make and model as its alternative name."""
    tpm = x509.Name([x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:00001014")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(""))
        .issuer_name(by.certificate.subject)
        .public_key(key or EK.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(tpm)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(by.key, hashes.SHA256()).public_bytes(Encoding.DER)


def request(
    certificate: bytes = b"", *, kind: PlatformKind = PlatformKind.HARDWARE, called: str = "host-b"
) -> EnrolmentRequest:
    """What a platform asks for whose keys a test holds."""
    return EnrolmentRequest(called, kind, endorsement_area(), certificate, public_area())
