"""Public areas of the objects that platform_tpm makes. For platform_tpm alone."""

from __future__ import annotations

import hashlib

from tpm2_pytss import TPM2_ALG, TPM2B_PUBLIC, TPMA_OBJECT, TPMT_PUBLIC, TSS2_Exception

from vtpm.errors import StateError
from vtpm.platform_tpm.sealed_blob import SealedBlob

# TCG TPM v2.0 Provisioning Guidance, storage primary key (SRK), ECC P-256.
_PARENT_ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)
_ENDORSEMENT_ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.ADMINWITHPOLICY
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.DECRYPT
)
# PolicySecret of the endorsement hierarchy.
_ENDORSEMENT_POLICY = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_ATTESTATION_ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.SIGN_ENCRYPT
)
_ATTESTATION_LABEL = b"vtpm attestation key 1"
# No userWithAuth: the policy is the only way in.
_SEALED_ATTRIBUTES = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.ADMINWITHPOLICY | TPMA_OBJECT.NODA


def parent_template() -> TPM2B_PUBLIC:
    """Return the template of the storage primary key; a TPM makes the same key of it until it is cleared."""
    return TPM2B_PUBLIC.parse("ecc256:aes128cfb", objectAttributes=_PARENT_ATTRIBUTES)


def endorsement_template() -> TPM2B_PUBLIC:
    """Return the template of the endorsement key; a TPM makes the same key of it also after it was cleared.

    Source: TCG EK Credential Profile for TPM Family 2.0, template L-2 (ECC NIST P-256).
    """
    template = TPM2B_PUBLIC.parse("ecc256:aes128cfb", objectAttributes=_ENDORSEMENT_ATTRIBUTES)
    template.publicArea.authPolicy = _ENDORSEMENT_POLICY
    template.publicArea.unique.ecc.x = bytes(32)
    template.publicArea.unique.ecc.y = bytes(32)
    return template


def attestation_template() -> TPM2B_PUBLIC:
    """Return the template of the attestation key; a TPM makes the same key of it also after it was cleared."""
    template = TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=_ATTESTATION_ATTRIBUTES)
    # What tells it from other keys of these attributes that somebody makes on the same platform.
    template.publicArea.unique.ecc.x = hashlib.sha256(_ATTESTATION_LABEL).digest()
    template.publicArea.unique.ecc.y = bytes(32)
    return template


def sealed_template(policy_digest: bytes) -> TPM2B_PUBLIC:
    """Return the template of a sealed secret that opens under a policy."""
    template = TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.KEYEDHASH,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=_SEALED_ATTRIBUTES,
            authPolicy=policy_digest,
        )
    )
    template.publicArea.parameters.keyedHashDetail.scheme.scheme = TPM2_ALG.NULL
    return template


def read_sealed_public(blob: SealedBlob) -> TPM2B_PUBLIC:
    """Return a blob's public area, checked to be one that sealing makes, under the policy that the blob claims.

    Raises:
        StateError: it is not.
    """
    try:
        area, used = TPMT_PUBLIC.unmarshal(blob.public)
    except (TSS2_Exception, ValueError, TypeError):
        area, used = None, 0
    if (
        area is None
        or used != len(blob.public)
        or area.type != TPM2_ALG.KEYEDHASH
        or area.nameAlg != TPM2_ALG.SHA256
        or area.objectAttributes != _SEALED_ATTRIBUTES
        or bytes(area.authPolicy) != blob.policy_digest
    ):
        raise StateError(
            "the sealed key is damaged: its public area is not as it was written",
            next_step="Put back the root file from a backup",
        )
    return TPM2B_PUBLIC(publicArea=area)
