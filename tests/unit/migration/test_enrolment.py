"""A platform is certified as what the authority knows it to be, and the certificate opens for its own keys alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.migration.enrolment_examples import NOW, Signer, authority, ek_certificate, request
from tests.unit.tpm.attest_examples import ATTRIBUTES, KEY, public_area
from tests.unit.tpm.ek_examples import endorsement_area
from tests.unit.tpm.test_credential import opened
from vtpm.errors import AttestationError, UsageError
from vtpm.migration.certificates import ATTESTATION_KEY_PURPOSE, PlatformKind, certify, new_authority, verify
from vtpm.migration.enrolment import (
    MAX_FILE_BYTES,
    EnrolmentRequest,
    SealedCertificate,
    certify_request,
    decode_request,
    decode_sealed,
    encode_file,
    endorsement_fingerprint,
    kind_by_fingerprint,
    kind_by_manufacturer,
    open_sealed,
)
from vtpm.tpm.attest import read_signing_key
from vtpm.tpm.credential import Credential

AUTHORITY_KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = new_authority("enrolment", AUTHORITY_KEY, NOW)
MINE = read_signing_key(public_area())
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())


def activated(sealed: SealedCertificate, name: bytes = MINE.name) -> bytes:
    """What the TPM gives out that has both keys."""
    return opened(Credential(sealed.credential, sealed.encrypted_secret), name)


# -- the exchange ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(PlatformKind))
def test_certificate_is_of_the_platform_when_its_tpm_opens_it(kind: PlatformKind) -> None:
    asked = decode_request(encode_file(request()))
    assert asked == request()
    sealed = decode_sealed(encode_file(certify_request(AUTHORITY, AUTHORITY_KEY, asked, kind, NOW)))
    certificate, said = open_sealed(sealed, activated(sealed), public_area())
    assert (said.name, said.kind) == ("host-b", kind)
    assert verify(certificate, [AUTHORITY], MINE, NOW) == said


def test_certificate_does_not_open_when_the_attestation_key_is_another() -> None:
    sealed = certify_request(AUTHORITY, AUTHORITY_KEY, request(), PlatformKind.HARDWARE, NOW)
    secret = activated(sealed)
    for other in (public_area(OTHER_KEY), public_area(attributes=ATTRIBUTES ^ 0x40)):
        with pytest.raises(AttestationError, match="changed on its way, or is another platform's"):
            open_sealed(sealed, secret, other)


def test_certificate_is_not_kept_when_it_was_issued_for_another_key() -> None:
    # An authority that lies, or took the wrong file: it is sealed to this platform, and of another key.
    mine = certify_request(AUTHORITY, AUTHORITY_KEY, request(), PlatformKind.HARDWARE, NOW)
    secret = activated(mine)
    other = certify(
        AUTHORITY, AUTHORITY_KEY, "host-b", PlatformKind.HARDWARE, read_signing_key(public_area(OTHER_KEY)), NOW
    )
    box = AESGCM(secret).encrypt(
        bytes(12), other.public_bytes(Encoding.DER), b"vtpm sealed platform certificate 1" + MINE.name
    )
    with pytest.raises(AttestationError, match="is of another key"):
        open_sealed(dataclasses.replace(mine, sealed=bytes(12) + box), secret, public_area())


@pytest.mark.parametrize("at", [0, 12, -1])
def test_certificate_does_not_open_when_it_was_changed(at: int) -> None:
    sealed = certify_request(AUTHORITY, AUTHORITY_KEY, request(), PlatformKind.HARDWARE, NOW)
    changed = bytearray(sealed.sealed)
    changed[at] ^= 1
    for other in (bytes(changed), sealed.sealed[:12], sealed.sealed[:5], b""):
        with pytest.raises(AttestationError, match="changed on its way"):
            open_sealed(dataclasses.replace(sealed, sealed=other), activated(sealed), public_area())


def test_certificate_does_not_open_when_the_secret_is_none() -> None:
    sealed = certify_request(AUTHORITY, AUTHORITY_KEY, request(), PlatformKind.HARDWARE, NOW)
    with pytest.raises(AttestationError, match="16 bytes, not 32"):
        open_sealed(sealed, bytes(16), public_area())
    with pytest.raises(AttestationError, match="changed on its way"):
        open_sealed(sealed, bytes(32), public_area())


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"attestation_key": public_area(attributes=ATTRIBUTES & ~0x10000)}, "no attestation key"),
        ({"attestation_key": public_area(attributes=ATTRIBUTES & ~0x2)}, "no attestation key"),
        ({"attestation_key": endorsement_area()}, "the public area has"),
        ({"endorsement_key": public_area()}, "the endorsement key has the attributes"),
        ({"endorsement_key": b""}, "the endorsement key is cut off"),
    ],
)
def test_nothing_is_certified_when_a_key_is_not_what_it_must_be(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(AttestationError, match=why):
        certify_request(AUTHORITY, AUTHORITY_KEY, dataclasses.replace(request(), **wrong), PlatformKind.HARDWARE, NOW)


def test_nothing_is_certified_when_the_name_is_none() -> None:
    for called in ("", "two\nlines"):
        with pytest.raises(UsageError, match="printable"):
            certify_request(AUTHORITY, AUTHORITY_KEY, request(called=called), PlatformKind.HARDWARE, NOW)


# -- files -----------------------------------------------------------------------------------------------------------
def spoiled(**changes: object) -> bytes:
    return json.dumps(json.loads(encode_file(request())) | changes).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "does not say that it is one"),
        (b'{"form": 7}', "does not say that it is one"),
        (encode_file(SealedCertificate(b"c", b"e", b"s")), "does not say that it is one"),
        (spoiled(version=2), "another version than 1"),
        (spoiled(version=None), "another version than 1"),
        (spoiled(kind="paper"), "kind"),
        (spoiled(more=1), "more"),
        (spoiled(name=7), "name"),
        (spoiled(name="n" * 65), "name"),
        (spoiled(attestation_key="no base64!"), "attestation_key"),
        (b" " * (MAX_FILE_BYTES + 1), "more than 16384 bytes"),
    ],
)
def test_request_is_refused_when_it_is_not_of_the_form(data: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=f"no vtpm platform enrolment request: .*{why}"):
        decode_request(data)


def test_sealed_certificate_is_refused_when_it_is_a_request() -> None:
    with pytest.raises(UsageError, match="no vtpm sealed platform certificate: it does not say"):
        decode_sealed(encode_file(request()))


# -- of what kind it is ----------------------------------------------------------------------------------------------
def test_platform_is_hardware_when_the_operator_names_its_endorsement_key() -> None:
    fingerprint = endorsement_fingerprint(request())
    assert kind_by_fingerprint(request(), fingerprint) is PlatformKind.HARDWARE
    assert kind_by_fingerprint(request(), fingerprint.upper()) is PlatformKind.HARDWARE
    with pytest.raises(AttestationError, match=f"not of the endorsement key that was named: it is {fingerprint}"):
        kind_by_fingerprint(request(), "ab" * 32)
    for none in ("", "ab", "xy" * 32, f"{fingerprint} "):
        with pytest.raises(UsageError, match="64 hex digits"):
            kind_by_fingerprint(request(), none)


def chain(*names: str) -> list[Signer]:
    signers: list[Signer] = []
    for text in names:
        signers.append(authority(text, signers[-1] if signers else None))
    return signers


def by_manufacturer(asked: EnrolmentRequest, *signers: Signer) -> PlatformKind:
    return kind_by_manufacturer(asked, [signer.certificate for signer in signers], NOW)


@pytest.mark.parametrize("names", [("root",), ("root", "model"), ("root", "family", "model")])
def test_platform_is_hardware_when_its_manufacturer_certifies_it(names: tuple[str, ...]) -> None:
    signers = chain(*names)
    asked = request(ek_certificate(signers[-1]))
    assert by_manufacturer(asked, *chain("another"), *signers) is PlatformKind.HARDWARE


def test_platform_is_not_hardware_when_it_says_of_itself_that_it_is_embedded() -> None:
    (root,) = chain("root")
    asked = request(ek_certificate(root), kind=PlatformKind.EMBEDDED)
    with pytest.raises(AttestationError, match="says of itself"):
        by_manufacturer(asked, root)
    with pytest.raises(AttestationError, match="says of itself"):
        kind_by_fingerprint(asked, endorsement_fingerprint(asked))


def test_platform_is_not_hardware_when_the_root_is_another() -> None:
    (root,), (other,) = chain("root"), chain("root")
    with pytest.raises(AttestationError, match="leads to none of the roots"):
        by_manufacturer(request(ek_certificate(root)), other)


def test_platform_is_not_hardware_when_what_is_between_is_missing() -> None:
    root, _, last = chain("root", "family", "model")
    with pytest.raises(AttestationError, match="leads to none of the roots"):
        by_manufacturer(request(ek_certificate(last)), root, last)


def test_roots_are_needed_and_one_on_the_way_is_none() -> None:
    _, last = chain("root", "model")
    for signers in ((), (last,)):
        with pytest.raises(UsageError, match="no root of a TPM manufacturer"):
            by_manufacturer(request(ek_certificate(last)), *signers)


def _through(middle: Callable[[Signer], Signer]) -> tuple[EnrolmentRequest, tuple[Signer, ...]]:
    root = authority("root")
    between = middle(root)
    return request(ek_certificate(between)), (root, between)


@pytest.mark.parametrize(
    ("asked", "signers"),
    [
        _through(lambda root: authority("leaf", root, ca=False)),
        _through(lambda root: authority("leaf", root, signs=False)),
        _through(lambda root: authority("old", root, days=-1)),
    ],
    ids=["no-authority", "may-not-sign", "too-late"],
)
def test_platform_is_not_hardware_when_one_on_the_way_may_not_certify(
    asked: EnrolmentRequest, signers: tuple[Signer, ...]
) -> None:
    with pytest.raises(AttestationError, match="leads to none of the roots"):
        by_manufacturer(asked, *signers)


def test_platform_is_not_hardware_when_the_way_is_longer_than_its_root_allows() -> None:
    root = authority("root", path_length=0)
    middle = authority("model", root)
    with pytest.raises(AttestationError, match="leads to none of the roots"):
        by_manufacturer(request(ek_certificate(middle)), root, middle)
    assert by_manufacturer(request(ek_certificate(root)), root) is PlatformKind.HARDWARE


@pytest.mark.parametrize(
    ("certificate", "why"),
    [
        (lambda root: b"", "has no certificate by its manufacturer"),
        (lambda root: b"no DER", "malformed"),
        (lambda root: ek_certificate(root, OTHER_KEY.public_key()), "of another endorsement key"),
        (lambda root: ek_certificate(root, KEY.public_key()), "of another endorsement key"),
        (lambda root: ek_certificate(root, purposes=()), "leads to none"),
        (lambda root: ek_certificate(root, purposes=(ATTESTATION_KEY_PURPOSE,)), "leads to none"),
        (lambda root: ek_certificate(root, ca=True), "leads to none"),
        (lambda root: ek_certificate(root, days=0), None),
        (lambda root: ek_certificate(root) + b"\0", "malformed"),
    ],
)
def test_platform_is_not_hardware_when_its_certificate_is_not_right(
    certificate: Callable[[Signer], bytes], why: str | None
) -> None:
    (root,) = chain("root")
    asked = request(certificate(root))
    if why is None:  # until then it is
        assert by_manufacturer(asked, root) is PlatformKind.HARDWARE
        with pytest.raises(AttestationError, match="leads to none"):
            kind_by_manufacturer(asked, [root.certificate], NOW + timedelta(days=1))
        return
    with pytest.raises(AttestationError, match=why):
        by_manufacturer(asked, root)
