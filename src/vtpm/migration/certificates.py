"""Certificates of platforms' attestation keys, by an enrolment authority: issued, and verified. Pure.

An authority is a P-256 key with a certificate that it signed itself. A platform's certificate has the purpose that the
TCG gave attestation keys, and says of what kind its TPM is and what Name the key has: the Name is over the key's
attributes, which a platform could otherwise claim as it likes. There is no chain: who trusts an authority has its
certificate.

Source: RFC 5280; TCG EK Credential Profile, tcg-kp-AIKCertificate.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from vtpm.errors import AttestationError, UsageError
from vtpm.tpm.attest import SigningKey

ATTESTATION_KEY_PURPOSE = x509.ObjectIdentifier("2.23.133.8.3")
AUTHORITY_LIFE = timedelta(days=3650)
PLATFORM_LIFE = timedelta(days=730)
MAX_NAME_CHARS = 64
_KIND_PREFIX = "urn:vtpm:platform:"
_KEY_PREFIX = "urn:vtpm:key:"
_SKEW = timedelta(minutes=5)
MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
)
"""What reading an untrusted certificate raises; the last five are no ValueErrors."""


class PlatformKind(enum.StrEnum):
    """What holds a platform's keys."""

    HARDWARE = "hardware"
    EMBEDDED = "embedded"
    """A software stand-in: it proves nothing to whoever does not trust the host's root."""


@dataclass(frozen=True)
class CertifiedPlatform:
    """Whom an authority vouches for.

    Args:
        name: of the platform.
        kind: see PlatformKind.
        serial: of the certificate.
    """

    name: str
    kind: PlatformKind
    serial: int


def new_authority(name: str, key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """Return the certificate of an authority, by itself. Raises UsageError: the name is empty or too long."""
    subject = _name(name)
    return (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def certify(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    name: str,
    kind: PlatformKind,
    attestation_key: SigningKey,
    now: datetime,
) -> x509.Certificate:
    """Return the certificate of a platform.

    Args:
        attestation_key: whose Name the platform's credential was made for, and which has activated it.
    Raises:
        UsageError: as new_authority. AttestationError: the key is no attestation key.
    """
    attestation_key.require_attestation_key()
    uris = (f"{_KIND_PREFIX}{kind}", f"{_KEY_PREFIX}{attestation_key.name.hex()}")
    return (
        _builder(_name(name), authority.subject, attestation_key.key, now, PLATFORM_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ATTESTATION_KEY_PURPOSE]), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )


def verify(
    certificate: bytes, authorities: Iterable[x509.Certificate], key: SigningKey, now: datetime
) -> CertifiedPlatform:
    """Return whom a certificate is of.

    Args:
        certificate: DER, untrusted.
        authorities: that are trusted.
        key: the attestation key, as its public area has it; untrusted.
        now: aware of its time zone.
    Raises:
        AttestationError: no authority signed it, it is of another key, another purpose or another time, or malformed.
    """
    try:
        read = x509.load_der_x509_certificate(certificate)
        signers = [one for one in authorities if _has_signed(one, read)]
        if not signers:
            raise AttestationError("no enrolment authority that is trusted here has signed the platform's certificate")
        # An authority that was renewed is trusted twice, with one name and key.
        signer = max(signers, key=lambda one: one.not_valid_after_utc)
        for one, whose in ((signer, "the enrolment authority's"), (read, "the platform's")):
            if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
                raise AttestationError(
                    f"{whose} certificate is valid from {one.not_valid_before_utc} to {one.not_valid_after_utc}"
                )
        if not signer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise AttestationError("what signed the platform's certificate is no authority")
        return _said(read, key)
    except MALFORMED as error:
        raise AttestationError(f"the platform's certificate is malformed: {error}") from error


def read_certified(certificate: bytes, key: SigningKey) -> CertifiedPlatform:
    """Return what a certificate says, whoever signed it.

    Args:
        certificate: DER, untrusted.
        key: that it must be of.
    Raises:
        AttestationError: it is of another key or another purpose, or malformed.
    """
    try:
        return _said(x509.load_der_x509_certificate(certificate), key)
    except MALFORMED as error:
        raise AttestationError(f"the platform's certificate is malformed: {error}") from error


def _said(read: x509.Certificate, key: SigningKey) -> CertifiedPlatform:
    if _encoded(read.public_key()) != _encoded(key.key):
        raise AttestationError("the platform's certificate is of another key")
    purposes = read.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if ATTESTATION_KEY_PURPOSE not in purposes:
        raise AttestationError("the platform's certificate is not of an attestation key")
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if f"{_KEY_PREFIX}{key.name.hex()}" not in uris:
        raise AttestationError("the platform's certificate is of a key with other attributes")
    (kind,) = (uri.removeprefix(_KIND_PREFIX) for uri in uris if uri.startswith(_KIND_PREFIX))
    (common,) = read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return CertifiedPlatform(str(common.value), PlatformKind(kind), read.serial_number)


def _has_signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _encoded(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise AttestationError("the platform's certificate is of a key that is on no curve")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def check_name(text: str) -> str:
    """Return a name that a platform or an authority can have. Raises UsageError: it can have no such name."""
    if not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable():
        raise UsageError(f"a platform's or authority's name has 1 to {MAX_NAME_CHARS} printable characters")
    return text


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(text))])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
