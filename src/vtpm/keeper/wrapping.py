"""vTPMs' keys wrapped by the root key. Pure but for random numbers; for the keeper alone.

A wrapped key is u8 version 1, 32 bytes salt, 12 bytes nonce, AES-256-GCM of the key (48 bytes). The wrapping key is
HKDF-SHA256 of the root key with this salt, so no two wraps share one. The associated data binds version, purpose and
the vTPM's uuid: a key wrapped for one vTPM does not open for another.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpm.errors import StateError
from vtpm.secret import KEY_BYTES, Secret
from vtpm.tpm.types import VtpmId

VERSION = 1
PURPOSE = b"vtpm-dek"
_SALT_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
_HEAD_BYTES = 1 + _SALT_BYTES + _NONCE_BYTES
WRAPPED_BYTES = _HEAD_BYTES + KEY_BYTES + _TAG_BYTES


def wrap_key(root: Secret, vtpm_id: VtpmId, key: Secret) -> bytes:
    """Return a vTPM's key in the form in which it may be stored, WRAPPED_BYTES bytes."""
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    sealed = _cipher(root, salt).encrypt(nonce, key.reveal(), _associated_data(vtpm_id))
    return bytes((VERSION,)) + salt + nonce + sealed


def unwrap_key(root: Secret, vtpm_id: VtpmId, wrapped: bytes) -> Secret:
    """Return the key that was wrapped for this vTPM.

    Args:
        wrapped: untrusted.
    Raises:
        StateError: damaged, wrapped for another vTPM or by another root key, or of another version.
    """
    if len(wrapped) != WRAPPED_BYTES or wrapped[0] != VERSION:
        raise StateError(f"the wrapped key of vTPM {vtpm_id} is damaged or of another version than {VERSION}")
    salt, nonce = wrapped[1 : 1 + _SALT_BYTES], wrapped[1 + _SALT_BYTES : _HEAD_BYTES]
    try:
        return Secret(_cipher(root, salt).decrypt(nonce, wrapped[_HEAD_BYTES:], _associated_data(vtpm_id)))
    except InvalidTag:
        raise StateError(
            f"the wrapped key of vTPM {vtpm_id} does not open: damaged, another vTPM's, or of another root key",
            next_step="Put the state directory back as it was, root file and store together",
        ) from None


def _cipher(root: Secret, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, b"vtpm keeper wrapping key").derive(root.reveal()))


def _associated_data(vtpm_id: VtpmId) -> bytes:
    return bytes((VERSION,)) + PURPOSE + vtpm_id.bytes
