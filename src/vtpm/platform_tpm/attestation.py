"""The platform's identity: a key that signs nothing but what the TPM says of itself. For platform_tpm alone.

The attestation key is a primary key of the endorsement hierarchy, made anew of its template at each use: there is
nothing to store or to lose, and it is the same until the manufacturer's seed changes. Who it belongs to is proven once,
by TPM2_ActivateCredential with the endorsement key.

Source: TPM 2.0 Part 3 (revision 1.59), TPM2_Quote, TPM2_Certify, TPM2_ActivateCredential; TCG EK Credential Profile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_DATA,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPMA_SESSION,
    TPML_PCR_SELECTION,
    TPMT_SIG_SCHEME,
    TSS2_Exception,
)

from vtpm.errors import AttestationError
from vtpm.platform_tpm import faults
from vtpm.platform_tpm.connection import Connection
from vtpm.platform_tpm.objects import attestation_template, endorsement_template
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.secret import Secret

# Buffers of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET in tpm2-tss.
_MAX_CREDENTIAL_BYTES = 132
_MAX_ENCRYPTED_SECRET_BYTES = 512
_CERTIFICATE_INDEX = 0x01C0000A
_MAX_CERTIFICATE_BYTES = 4096
_NV_READ_BYTES = 512
"""TPM_PT_NV_BUFFER_MAX is at least this (PC Client Platform TPM Profile)."""


@dataclass(frozen=True)
class Identity:
    """The public areas (TPMT_PUBLIC) of the endorsement key and of the attestation key."""

    endorsement: bytes
    attestation: bytes


@dataclass(frozen=True)
class SignedAttest:
    """A TPMS_ATTEST and the TPMT_SIGNATURE of the attestation key over it."""

    attest: bytes
    signature: bytes


@contextmanager
def _attestation_key(connection: Connection) -> Iterator[tuple[Any, Any]]:
    with connection.primary(attestation_template(), ESYS_TR.ENDORSEMENT) as key:
        yield key


def identity(connection: Connection) -> Identity:
    """Return the public areas of the two keys."""
    with connection.primary(endorsement_template(), ESYS_TR.ENDORSEMENT) as (_, endorsement):
        ek = bytes(endorsement.publicArea.marshal())
    with _attestation_key(connection) as (_, attestation):
        return Identity(ek, bytes(attestation.publicArea.marshal()))


def endorsement_certificate(connection: Connection) -> bytes:
    """Return the manufacturer's certificate of the endorsement key as it lies in NV memory; empty when none does.

    Source: TCG EK Credential Profile for TPM Family 2.0, 2.2.1.4: index 0x01C0000A for template L-2, read with an empty
    authValue. Some manufacturers fill up the index behind the certificate.
    """
    esapi = connection.esapi
    try:
        index = esapi.tr_from_tpmpublic(_CERTIFICATE_INDEX)
    except TSS2_Exception as error:
        if faults.tpm_code(error) != faults.RC_HANDLE:
            raise
        return b""
    public, _ = esapi.nv_read_public(index)
    size = int(public.nvPublic.dataSize)
    if size > _MAX_CERTIFICATE_BYTES:
        return b""
    found = b""
    try:
        while len(found) < size:
            found += bytes(esapi.nv_read(index, min(size - len(found), _NV_READ_BYTES), len(found)))
    except TSS2_Exception as error:
        if faults.tpm_code(error) in {
            *faults.NOT_OUR_INDEX,
            faults.RC_AUTH_UNAVAILABLE,
        }:  # not written, or not for all to read
            return b""
        raise
    return _without_filling(found)


def _without_filling(found: bytes) -> bytes:
    """Return the DER SEQUENCE at the beginning; empty when there is none that is whole."""
    # Of 128 bytes to 64 KiB, as certificates are: ITU-T X.690, 8.1.3.5.
    if found[:1] != b"\x30" or found[1:2] not in (b"\x81", b"\x82"):
        return b""
    head = 2 + found[1] - 0x80
    size = head + int.from_bytes(found[2:head], "big")
    return found[:size] if size <= len(found) else b""


def quote(connection: Connection, selection: PcrSelection, extra: bytes) -> SignedAttest:
    """Return a quote over PCRs.

    Args:
        extra: qualifying data, at most 64 bytes.
    """
    with _attestation_key(connection) as (key, _):
        attest, signature = connection.esapi.quote(
            key, TPML_PCR_SELECTION.parse(str(selection)), TPM2B_DATA(extra), TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
        )
        return SignedAttest(bytes(attest), bytes(signature.marshal()))


def activate(connection: Connection, credential: bytes, encrypted_secret: bytes) -> Secret:
    """Return the secret that was made for this platform's two keys together.

    Args:
        credential: contents of a TPM2B_ID_OBJECT.
        encrypted_secret: contents of a TPM2B_ENCRYPTED_SECRET.
    Raises:
        AttestationError: it was made for another endorsement key or another attestation key.
    """
    if len(credential) > _MAX_CREDENTIAL_BYTES or len(encrypted_secret) > _MAX_ENCRYPTED_SECRET_BYTES:
        raise AttestationError("the credential is longer than any can be")
    with (
        connection.storage_primary() as (srk, _),
        _attestation_key(connection) as (key, _),
        connection.primary(endorsement_template(), ESYS_TR.ENDORSEMENT) as (endorsement, _),
        connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION.ENCRYPT) as encrypting,
        connection.session(srk, TPM2_SE.POLICY, 0) as policy,
    ):
        connection.esapi.policy_secret(ESYS_TR.ENDORSEMENT, policy, b"", b"", b"", 0)
        try:
            secret = connection.esapi.activate_credential(
                key,
                endorsement,
                TPM2B_ID_OBJECT(credential),
                TPM2B_ENCRYPTED_SECRET(encrypted_secret),
                session1=ESYS_TR.PASSWORD,
                session2=policy,
                session3=encrypting,
            )
        except TSS2_Exception as error:
            if faults.tpm_code(error) in faults.NOT_FOR_THIS:
                raise AttestationError("the credential was made for another platform or another key") from None
            raise
        return Secret(bytes(secret))
