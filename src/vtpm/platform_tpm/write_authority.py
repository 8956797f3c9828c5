"""WriteAuthority: who may write the policy index and the anchor index. For platform_tpm alone.

It is an HMAC key derived from the root key, so it is where the root key is and nowhere else. The indexes are written
under PolicySigned by it: one HMAC for the TPM, no public-key operation. Each signature covers the session's nonce and
the cpHash of the one command that it allows, so that whoever stands on the bus can neither keep it for later nor use
it for another write.

Spec: TPM 2.0 Part 3 (revision 1.59), TPM2_PolicySigned; Part 1, 16.7, cpHash.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from tpm2_pytss import (
    TPM2_ALG,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE,
    TPMA_OBJECT,
    TPMT_PUBLIC,
    TPMT_SENSITIVE,
    TPMT_SIGNATURE,
)

from vtpm.platform_tpm.root_policy import signed_digest
from vtpm.secret import KEY_BYTES, Secret

_TPM_CC_NV_WRITE = 0x00000137
_KEY_LABEL = b"vtpm platform nv write authority key"
_SEED_LABEL = b"vtpm platform nv write authority seed"
# No userWithAuth and an empty policy, which nothing satisfies: while it is loaded, nobody else who can reach the TPM
# can have it sign. PolicySigned needs no authorization to verify with it.
_ATTRIBUTES = TPMA_OBJECT.SIGN_ENCRYPT | TPMA_OBJECT.ADMINWITHPOLICY | TPMA_OBJECT.NODA


class WriteAuthority:
    """The key that signs writes.

    Args:
        root: the root key.
    """

    def __init__(self, root: Secret) -> None:
        self._key = Secret(HKDFExpand(SHA256(), KEY_BYTES, _KEY_LABEL).derive(root.reveal()))
        # The obfuscation value of TPMT_SENSITIVE: `unique` is public, and with it says nothing of the key.
        self._seed = Secret(HKDFExpand(SHA256(), KEY_BYTES, _SEED_LABEL).derive(root.reveal()))
        self.name = bytes(self.public().get_name())
        """TPM Name of the loaded key."""

    def public(self) -> TPM2B_PUBLIC:
        """Return the public area for LoadExternal."""
        area = TPMT_PUBLIC(type=TPM2_ALG.KEYEDHASH, nameAlg=TPM2_ALG.SHA256, objectAttributes=_ATTRIBUTES)
        area.parameters.keyedHashDetail.scheme.scheme = TPM2_ALG.HMAC
        area.parameters.keyedHashDetail.scheme.details.hmac.hashAlg = TPM2_ALG.SHA256
        area.unique.keyedHash = hashlib.sha256(self._seed.reveal() + self._key.reveal()).digest()
        return TPM2B_PUBLIC(area)

    def sensitive(self) -> TPM2B_SENSITIVE:
        """Return the sensitive area for LoadExternal; it crosses the bus encrypted only."""
        area = TPMT_SENSITIVE(sensitiveType=TPM2_ALG.KEYEDHASH, seedValue=self._seed.reveal())
        area.sensitive.bits = self._key.reveal()
        return TPM2B_SENSITIVE(area)

    def policy_digest(self, policy_ref: bytes) -> bytes:
        """Return the policy of an index that this key alone writes, under a reference of its own."""
        return signed_digest(self.name, policy_ref)

    def sign(self, nonce: bytes, cp_hash: bytes, policy_ref: bytes) -> TPMT_SIGNATURE:
        """Return the signature for PolicySigned with these parameters and no expiration."""
        a_hash = hashlib.sha256(nonce + bytes(4) + cp_hash + policy_ref).digest()
        signature = TPMT_SIGNATURE(sigAlg=TPM2_ALG.HMAC)
        signature.signature.hmac.hashAlg = TPM2_ALG.SHA256
        signature.signature.hmac.digest.sha256 = hmac.digest(self._key.reveal(), a_hash, "sha256")
        return signature

    def wipe(self) -> None:
        """Drop the key; it signs no more."""
        self._key.wipe()
        self._seed.wipe()


def write_cp_hash(index_name: bytes, data: bytes) -> bytes:
    """Return the cpHash of NV_Write of the whole of an index, authorized by the index itself."""
    parameters = struct.pack(">H", len(data)) + data + struct.pack(">H", 0)
    return hashlib.sha256(struct.pack(">I", _TPM_CC_NV_WRITE) + index_name + index_name + parameters).digest()
