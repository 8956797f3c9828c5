"""Enrolment of a platform by an authority that need not reach it: one file there, one file back. Pure.

The request has the platform's endorsement key and attestation key. The authority issues the attestation key's
certificate and encrypts it under a secret that only the TPM that has both keys gives out (TPM2_MakeCredential): a
platform that asked with a key of somebody else gets nothing that it can read. This is how TCG's Privacy CA did it.

That both keys are in one TPM is what the exchange proves. That this TPM is hardware, and whose it is, it does not: that
follows from what the authority knows of the endorsement key (`decide_kind`).

Source: TPM 2.0 Part 1 (revision 1.59), 24; TCG EK Credential Profile for TPM Family 2.0, 3 (EK certificate).
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from vtpm.errors import AttestationError, ProtocolError, UsageError
from vtpm.migration import certificates
from vtpm.migration.certificates import MALFORMED, CertifiedPlatform, PlatformKind
from vtpm.tpm.attest import read_signing_key
from vtpm.tpm.credential import EndorsementKey, make_credential, read_endorsement_key
from vtpm.wire.service import MaxLength
from vtpm.wire.service_codec import codec_of

MAX_FILE_BYTES = 16 * 1024
ENDORSEMENT_KEY_PURPOSE = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate."""
_VERSION = 1
_REQUEST = "vtpm platform enrolment request"
_SEALED = "vtpm sealed platform certificate"
_LABEL = b"vtpm sealed platform certificate 1"
_SECRET_BYTES = 32
_NONCE_BYTES = 12
_MAX_CHAIN = 5
"""Authorities between an endorsement key's certificate and a root."""


@dataclass(frozen=True)
class EnrolmentRequest:
    """What a platform asks an authority to certify; all of it is the platform's own word.

    Args:
        name: under which its peers are to know it.
        kind: what holds its keys.
        endorsement_key, attestation_key: public areas, TPMT_PUBLIC.
        endorsement_certificate: by the TPM's manufacturer, DER; empty when there is none.
        form, version: of the file.
    """

    name: Annotated[str, MaxLength(certificates.MAX_NAME_CHARS)]
    kind: PlatformKind
    endorsement_key: Annotated[bytes, MaxLength(512)]
    endorsement_certificate: Annotated[bytes, MaxLength(4096)]
    attestation_key: Annotated[bytes, MaxLength(512)]
    form: Annotated[str, MaxLength(64)] = _REQUEST
    version: int = _VERSION


@dataclass(frozen=True)
class SealedCertificate:
    """A platform's certificate that the platform's TPM alone can open.

    Args:
        credential, encrypted_secret: contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET: the key.
        sealed: nonce (12 bytes), and the certificate's DER in AES-256-GCM, bound to the attestation key's Name.
        form, version: of the file.
    """

    credential: Annotated[bytes, MaxLength(132)]
    encrypted_secret: Annotated[bytes, MaxLength(512)]
    sealed: Annotated[bytes, MaxLength(8 * 1024)]
    form: Annotated[str, MaxLength(64)] = _SEALED
    version: int = _VERSION


_CODECS = {_REQUEST: codec_of(EnrolmentRequest), _SEALED: codec_of(SealedCertificate)}


def encode_file(content: EnrolmentRequest | SealedCertificate) -> bytes:
    """Return the file's content: JSON, bytes in base64."""
    return json.dumps(_CODECS[content.form].encode(content), indent=1).encode("ascii") + b"\n"


def decode_request(data: bytes) -> EnrolmentRequest:
    """Read a request. Raises UsageError: it is none, or of another version."""
    read: EnrolmentRequest = _decode(_REQUEST, data, "Make one with `vtpm platform enroll --name NAME --out FILE`")
    return read


def decode_sealed(data: bytes) -> SealedCertificate:
    """Read a sealed certificate. Raises UsageError: it is none, or of another version."""
    read: SealedCertificate = _decode(_SEALED, data, "Have one made with `vtpm authority certify`")
    return read


def endorsement_fingerprint(request: EnrolmentRequest) -> str:
    """Return the SHA-256 over the endorsement key's TPMT_PUBLIC, in hex. Raises AttestationError: it is no such key."""
    return read_endorsement_key(request.endorsement_key).fingerprint


def kind_by_fingerprint(request: EnrolmentRequest, fingerprint: str) -> PlatformKind:
    """Return the kind of a platform whose endorsement key the operator has named.

    This is the operator's word that the key with this fingerprint is a hardware TPM's, of the very host that is meant:
    it was read on that host while it was known to be good. It needs no manufacturer, and proves nothing about one.

    Args:
        fingerprint: SHA-256 over the endorsement key's TPMT_PUBLIC, in hex.
    Raises:
        UsageError: it is no SHA-256.
        AttestationError: the request is another key's, or says of itself that it is embedded.
    """
    wanted = fingerprint.lower()
    if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
        raise UsageError(
            "an endorsement key's fingerprint is a SHA-256, 64 hex digits",
            next_step="Take what `vtpm platform enroll` printed on that host",
        )
    found = endorsement_fingerprint(request)
    if not hmac.compare_digest(found, wanted):
        raise AttestationError(
            f"the request of {request.name!r} is not of the endorsement key that was named: it is {found}",
            next_step="Ask on that host with `vtpm platform enroll`; certify nothing until both are the same",
        )
    return _hardware(request)


def kind_by_manufacturer(request: EnrolmentRequest, trusted: Sequence[x509.Certificate], now: datetime) -> PlatformKind:
    """Return the kind of a platform whose endorsement key its manufacturer has certified.

    This is the manufacturer's word that the key is in a TPM that they made, as good as the roots that are trusted. It
    says that it is hardware, and not whose: whoever has any TPM of theirs can ask to be certified under any name.

    Args:
        trusted: certificates of manufacturers' authorities; those that are self-signed are roots, the others lie on the
            way to one.
        now: aware of its time zone.
    Raises:
        UsageError: there is no root among them.
        AttestationError: the request has no certificate, of another key, or it leads to no root.
    """
    roots = [one for one in trusted if one.subject == one.issuer]
    if not roots:
        raise UsageError(
            "there is no root of a TPM manufacturer to hold the certificate against",
            next_step="Put the roots' certificates into the folder, in PEM",
        )
    endorsement = read_endorsement_key(request.endorsement_key)
    if not request.endorsement_certificate:
        raise AttestationError(
            f"the TPM of {request.name!r} has no certificate by its manufacturer",
            next_step="Name its endorsement key with --ek, or certify it as --embedded",
        )
    try:
        read = x509.load_der_x509_certificate(request.endorsement_certificate)
        if _encoded(read.public_key()) != _encoded(endorsement.key):
            raise AttestationError(
                f"the manufacturer's certificate in the request of {request.name!r} is of another endorsement key"
            )
        verifier = (
            PolicyBuilder()
            .store(Store(roots))
            .time(now)
            .max_chain_depth(_MAX_CHAIN)
            .extension_policies(ca_policy=_AUTHORITIES, ee_policy=_ENDORSEMENT)
            .build_client_verifier()
        )
        verifier.verify(read, [one for one in trusted if one not in roots])
    except VerificationError as error:
        raise AttestationError(
            f"the manufacturer's certificate in the request of {request.name!r} leads to none of the roots: {error}",
            next_step="Put the roots and what is between into the folder, if they are the manufacturer's",
        ) from error
    except MALFORMED as error:
        raise AttestationError(
            f"the manufacturer's certificate in the request of {request.name!r} is malformed: {error}"
        ) from error
    return _hardware(request)


def certify_request(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    request: EnrolmentRequest,
    kind: PlatformKind,
    now: datetime,
) -> SealedCertificate:
    """Issue the certificate that is asked for, so that the TPM with both keys of the request alone can open it.

    Args:
        kind: as `kind_by_fingerprint` or `kind_by_manufacturer` gave it, or EMBEDDED.
    Raises:
        UsageError: the name is none.
        AttestationError: a key of the request is not what it must be.
    """
    endorsement = read_endorsement_key(request.endorsement_key)
    key = read_signing_key(request.attestation_key)
    certificate = certificates.certify(authority, authority_key, request.name, kind, key, now)
    return _seal(endorsement, key.name, certificate.public_bytes(Encoding.DER))


def open_sealed(sealed: SealedCertificate, secret: bytes, attestation_key: bytes) -> tuple[bytes, CertifiedPlatform]:
    """Return the certificate that was sealed, checked to be of this very key, and what it says.

    Args:
        secret: what the TPM gave out for the credential.
        attestation_key: public area of the TPM's attestation key.
    Raises:
        AttestationError: it was sealed for another key, was changed, or is of another key.
    """
    key = read_signing_key(attestation_key)
    if len(secret) != _SECRET_BYTES:
        raise AttestationError(f"the secret of the sealed certificate has {len(secret)} bytes, not {_SECRET_BYTES}")
    nonce, box = sealed.sealed[:_NONCE_BYTES], sealed.sealed[_NONCE_BYTES:]
    try:
        certificate = AESGCM(secret).decrypt(nonce, box, _LABEL + key.name)
    except (InvalidTag, ValueError):
        raise AttestationError(
            "the sealed certificate was changed on its way, or is another platform's",
            next_step="Carry it over again, or ask for another with `vtpm platform enroll --name NAME`",
        ) from None
    return certificate, certificates.read_certified(certificate, key)


def _seal(endorsement: EndorsementKey, name: bytes, certificate: bytes) -> SealedCertificate:
    secret, nonce = os.urandom(_SECRET_BYTES), os.urandom(_NONCE_BYTES)
    made = make_credential(endorsement, name, secret)
    box = AESGCM(secret).encrypt(nonce, certificate, _LABEL + name)
    return SealedCertificate(made.credential, made.encrypted_secret, nonce + box)


def _hardware(request: EnrolmentRequest) -> PlatformKind:
    if request.kind is not PlatformKind.HARDWARE:
        raise AttestationError(
            f"the platform {request.name!r} says of itself that its TPM is an embedded stand-in",
            next_step="Certify it as --embedded, or not at all",
        )
    return PlatformKind.HARDWARE


def _decode(named: str, data: bytes, next_step: str) -> Any:
    def refused(why: str) -> UsageError:
        return UsageError(f"the file is no {named}: {why}", next_step=next_step)

    if len(data) > MAX_FILE_BYTES:
        raise refused(f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        members = json.loads(data)
    except (ValueError, RecursionError):
        raise refused("it is not JSON") from None
    if not isinstance(members, dict) or members.get("form") != named:
        raise refused("it does not say that it is one")
    if members.get("version") != _VERSION:
        raise refused(f"it is of another version than {_VERSION}")
    try:
        return _CODECS[named].decode(members)
    except ProtocolError as error:
        raise refused(error.message) from None


def _encoded(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise AttestationError("the manufacturer's certificate is of a key that is on no curve")
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _may_sign(_: Policy, __: x509.Certificate, extension: x509.KeyUsage) -> None:
    if not extension.key_cert_sign:
        raise ValueError("one on the way may not sign certificates")


def _is_no_authority(_: Policy, __: x509.Certificate, extension: x509.BasicConstraints | None) -> None:
    if extension is not None and extension.ca:
        raise ValueError("it is an authority's")


def _is_of_an_endorsement_key(_: Policy, __: x509.Certificate, extension: x509.ExtendedKeyUsage) -> None:
    if ENDORSEMENT_KEY_PURPOSE not in extension:
        raise ValueError("it is not of an endorsement key")


# Manufacturers' certificates are none of the web's: what those need, or must not have, does not count here. That who
# certifies is an authority, and how long the way may be, is checked by the library whatever the policy is.
_AUTHORITIES = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    .require_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_sign)
)
_ENDORSEMENT = (
    ExtensionPolicy.permit_all()
    .may_be_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_no_authority)
    .require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _is_of_an_endorsement_key)
)
