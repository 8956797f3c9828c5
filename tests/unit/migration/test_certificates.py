"""A platform's certificate is an authority's word on one key, for one purpose; anything else is refused."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.unit.migration.evidence_examples import AUTHORITY, AUTHORITY_KEY, NOW, certificate
from tests.unit.tpm.attest_examples import ATTRIBUTES, KEY, public_area
from vtpm.errors import AttestationError, UsageError
from vtpm.migration.certificates import (
    ATTESTATION_KEY_PURPOSE,
    AUTHORITY_LIFE,
    PlatformKind,
    certify,
    new_authority,
    verify,
)
from vtpm.tpm.attest import read_signing_key

PURPOSE = x509.ExtendedKeyUsage([ATTESTATION_KEY_PURPOSE])
PUBLIC = read_signing_key(public_area())
NAME = x509.UniformResourceIdentifier(f"urn:vtpm:key:{PUBLIC.name.hex()}")
KIND = x509.SubjectAlternativeName([NAME, x509.UniformResourceIdentifier("urn:vtpm:platform:hardware")])


def by_hand(*extensions: x509.ExtensionType, key: object = KEY, names: int = 1) -> bytes:
    """A certificate of the authority with these extensions alone."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "host-b")] * names)
    builder = x509.CertificateBuilder(AUTHORITY.subject, subject, KEY.public_key())
    if isinstance(key, rsa.RSAPrivateKey):
        builder = x509.CertificateBuilder(AUTHORITY.subject, subject, key.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(AUTHORITY_KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def check(data: bytes) -> str:
    return verify(data, [AUTHORITY], PUBLIC, NOW).name


@pytest.mark.parametrize("kind", PlatformKind)
def test_name_and_kind_come_back_when_certified(kind: PlatformKind) -> None:
    found = verify(certificate(kind), [AUTHORITY], PUBLIC, NOW)
    assert (found.name, found.kind) == ("host-b", kind)
    assert check(by_hand(PURPOSE, KIND)) == "host-b"


def test_right_authority_is_found_when_there_are_several() -> None:
    other = new_authority("another", ec.derive_private_key(7, ec.SECP256R1()), NOW)
    assert verify(certificate(), [other, AUTHORITY], PUBLIC, NOW).name == "host-b"


def test_certificate_holds_when_its_authority_was_renewed_and_the_old_one_is_still_trusted() -> None:
    old = new_authority("enrolment of example.org", AUTHORITY_KEY, NOW - AUTHORITY_LIFE - timedelta(days=1))
    for authorities in ([old, AUTHORITY], [AUTHORITY, old]):
        assert verify(certificate(), authorities, PUBLIC, NOW).name == "host-b"
    with pytest.raises(AttestationError, match="authority's certificate is valid from"):
        verify(certificate(), [old], PUBLIC, NOW)


@pytest.mark.parametrize(
    ("extensions", "names", "why"),
    [
        ((KIND,), 1, "malformed"),
        ((PURPOSE,), 1, "malformed"),
        ((x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.3.6.1.5.5.7.3.1")]), KIND), 1, "not of an attestation key"),
        ((PURPOSE, x509.SubjectAlternativeName([x509.DNSName("host-b"), NAME])), 1, "malformed"),
        (
            (PURPOSE, x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:vtpm:platform:hardware")])),
            1,
            "other attributes",
        ),
        (
            (PURPOSE, x509.SubjectAlternativeName([NAME, x509.UniformResourceIdentifier("urn:vtpm:platform:x")])),
            1,
            "malformed",
        ),
        ((PURPOSE, KIND), 0, "malformed"),
        ((PURPOSE, KIND), 2, "malformed"),
    ],
    ids=["no-purpose", "no-kind", "other-purpose", "no-uri", "no-name", "unknown-kind", "nameless", "two-names"],
)
def test_refused_when_it_does_not_say_what_it_must(
    extensions: tuple[x509.ExtensionType, ...], names: int, why: str
) -> None:
    with pytest.raises(AttestationError, match=why):
        check(by_hand(*extensions, names=names))


def test_refused_when_it_is_of_a_key_on_no_curve() -> None:
    with pytest.raises(AttestationError, match="on no curve"):
        check(by_hand(PURPOSE, KIND, key=rsa.generate_private_key(65537, 2048)))


def test_refused_when_the_key_was_certified_with_other_attributes() -> None:
    claimed = read_signing_key(public_area(attributes=ATTRIBUTES ^ 1 << 6))
    with pytest.raises(AttestationError, match="other attributes"):
        verify(certificate(), [AUTHORITY], claimed, NOW)


@pytest.mark.parametrize("bit", [1, 4, 5, 16, 18])
def test_no_certificate_is_made_when_the_key_is_no_attestation_key(bit: int) -> None:
    with pytest.raises(AttestationError, match="no attestation key"):
        certificate(attestation_key=read_signing_key(public_area(attributes=ATTRIBUTES & ~(1 << bit))))


def test_refused_when_a_platform_signed_it_with_its_own_certificate() -> None:
    platform = x509.load_der_x509_certificate(certificate())
    forged = certify(platform, KEY, "host-c", PlatformKind.HARDWARE, PUBLIC, NOW)
    with pytest.raises(AttestationError, match="no authority"):
        verify(forged.public_bytes(Encoding.DER), [platform], PUBLIC, NOW)
    with pytest.raises(AttestationError, match="no enrolment authority"):
        check(forged.public_bytes(Encoding.DER))


def test_refused_when_it_is_cut_or_any_byte_is_another() -> None:
    good = certificate()
    for at in range(0, len(good), 7):
        with pytest.raises(AttestationError):
            check(good[:at])
        with pytest.raises(AttestationError):
            check(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


@pytest.mark.parametrize("version", [0, 1, 3, 9])
def test_refused_when_it_is_of_another_version(version: int) -> None:
    at = certificate().index(b"\xa0\x03\x02\x01\x02") + 4
    with pytest.raises(AttestationError, match="malformed"):
        check(certificate()[:at] + bytes([version]) + certificate()[at + 1 :])


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_no_certificate_is_made_when_the_name_is_unfit(name: str) -> None:
    with pytest.raises(UsageError, match="printable"):
        new_authority(name, AUTHORITY_KEY, NOW)
    with pytest.raises(UsageError, match="printable"):
        certificate(name=name)
