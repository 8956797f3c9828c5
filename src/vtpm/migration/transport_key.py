"""The key to which one attempt's state is encrypted: made for it by the destination, and gone with it. Pure.

HPKE (RFC 9180) in base mode with X25519, HKDF-SHA256 and AES-256-GCM. Who the recipient is follows from the evidence
that the offer's key is bound into. Who the sender is does not follow: the transcript is no secret, and whoever has
seen it can encrypt to the key; `guards` has what the state comes with for that.
"""

from __future__ import annotations

from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from vtpm.errors import AttestationError, StateError

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_KIND = b"\x01"
"""Of the keys that there are: in the destination manager's memory. One in its TPM would be another."""
_PUBLIC_BYTES = 32
_LABEL = b"vtpm migration state 1"


class TransportKey:
    """The destination's half; no repr, pickle or log shows it."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()

    @property
    def public(self) -> bytes:
        """What the offer has: u8 kind (1), 32 bytes X25519 public key as in RFC 7748."""
        return _KIND + self._key.public_key().public_bytes_raw()

    def open(self, transcript: bytes, sealed: bytes) -> bytes:
        """Return the state. Raises StateError: it was not sealed to this key under this transcript."""
        try:
            return _SUITE.decrypt(sealed, self._key, info=_LABEL + transcript)
        except InvalidTag:
            raise StateError("the state was not encrypted for this attempt, or was changed on the way") from None

    def __repr__(self) -> str:
        return "TransportKey(redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TransportKey is not serialised")


def seal(public: bytes, transcript: bytes, state: bytes) -> bytes:
    """Return the state encrypted to an offer's key.

    Args:
        public: see TransportKey.public; vouched for by evidence.
        transcript: all that was said before.
    Raises:
        AttestationError: it is no key of a kind that is known.
    """
    if len(public) != len(_KIND) + _PUBLIC_BYTES or not public.startswith(_KIND):
        raise AttestationError("the destination's key is of a kind that this version does not know")
    try:
        key = X25519PublicKey.from_public_bytes(public[len(_KIND) :])
        return _SUITE.encrypt(state, key, info=_LABEL + transcript)
    except ValueError:
        raise AttestationError("the destination's key is no X25519 key") from None
