"""What the machines' decisions rest on, for one peer: evidence over all that must not be substituted, and encryption.

The offer's evidence is over the proposal, the attempt, both nonces, the destination's key and the two hosts' TLS keys:
it is of no use for another attempt, another key, or to somebody who sits between the two. The source's is over the
offer, and so over all of that again; and over the digest of a secret with which the state then comes. Whoever has the
source's TLS key and not its TPM cannot put another state in the place of the true one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Protocol

from vtpm.errors import AttestationError, StateError
from vtpm.migration.certificates import CertifiedPlatform
from vtpm.migration.transcript import proposal_digest
from vtpm.migration.transport_key import TransportKey, seal
from vtpm.wire.migration import Offer, Propose, Prove, encode_message

_CHANNEL_LABEL = b"vtpm migration channel 1"
_OFFER_LABEL = b"vtpm migration offer 1"
_PROOF_LABEL = b"vtpm migration proof 1"
_SECRET_BYTES = 32


class Attester(Protocol):
    """Makes this platform's evidence, and verifies another's; see wire.evidence and verifier."""

    def evidence(self, extra: bytes) -> bytes:
        """Return encoded evidence over qualifying data, 32 bytes. Raises VtpmError: it has none."""

    def verify(self, evidence: bytes, extra: bytes) -> CertifiedPlatform:
        """Return whose a peer's is. Raises AttestationError, ProtocolError: what is wrong with it."""


def channel_digest(source_key: bytes, destination_key: bytes) -> bytes:
    """Return the digest that stands for who is at both ends of the transport.

    Args:
        source_key, destination_key: the hosts' TLS public keys, SubjectPublicKeyInfo in DER.
    """
    keys = hashlib.sha256(source_key).digest() + hashlib.sha256(destination_key).digest()
    return hashlib.sha256(_CHANNEL_LABEL + keys).digest()


def offer_extra(channel: bytes, proposal: Propose, migration_id: bytes, nonce: bytes, key: bytes) -> bytes:
    """Return what the destination's quote has to be over."""
    parts = channel + proposal_digest(proposal) + migration_id + nonce + hashlib.sha256(key).digest()
    return hashlib.sha256(_OFFER_LABEL + parts).digest()


def proof_extra(channel: bytes, proposal: Propose, offer: Offer, commitment: bytes) -> bytes:
    """Return what the source's quote has to be over."""
    offered = hashlib.sha256(encode_message(offer)).digest()
    return hashlib.sha256(_PROOF_LABEL + channel + proposal_digest(proposal) + offered + commitment).digest()


class Guard:
    """SourceGuard and DestinationGuard for one vTPM towards one peer. Blocks: a quote takes a TPM its time.

    Args:
        attester: see Attester.
        channel: see channel_digest.
    """

    def __init__(self, attester: Attester, channel: bytes) -> None:
        self._attester = attester
        self._channel = channel
        self._migration_id = b""
        self._key: TransportKey | None = None
        self._secret = b""

    def offer(self, peer: str, proposal: Propose, migration_id: bytes, nonce: bytes) -> Offer:
        """See DestinationGuard. The key of an offer that was made before is gone."""
        key = TransportKey()
        extra = offer_extra(self._channel, proposal, migration_id, nonce, key.public)
        evidence = self._attester.evidence(extra)
        self._migration_id, self._key = migration_id, key
        return Offer(migration_id, proposal_digest(proposal), nonce, key.public, evidence)

    def examine(self, peer: str, proposal: Propose, offer: Offer, proof: Prove | None = None) -> None:
        """See SourceGuard; with a proof, see DestinationGuard."""
        if proof is None:
            extra = offer_extra(self._channel, proposal, offer.migration_id, offer.nonce, offer.key)
            platform = self._attester.verify(offer.evidence, extra)
        else:
            extra = proof_extra(self._channel, proposal, offer, proof.commitment)
            platform = self._attester.verify(proof.evidence, extra)
        if platform.name != peer:
            raise AttestationError(
                f"{peer} shows the evidence of {platform.name}",
                next_step="Name the peer as its platform is enrolled: vtpm peer add",
            )

    def prove(self, proposal: Propose, offer: Offer) -> Prove:
        """See SourceGuard."""
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        commitment = hashlib.sha256(self._secret).digest()
        evidence = self._attester.evidence(proof_extra(self._channel, proposal, offer, commitment))
        return Prove(offer.migration_id, commitment, evidence)

    def seal(self, offer: Offer, transcript: bytes, state: bytes) -> bytes:
        """See SourceGuard."""
        return seal(offer.key, transcript, self._secret + state)

    def unseal(self, offer: Offer, proof: Prove, transcript: bytes, sealed: bytes) -> bytes:
        """See DestinationGuard. The key is used once."""
        if self._key is None or offer.migration_id != self._migration_id:
            raise StateError("the key of this attempt is gone: it is to be begun anew")
        opened = self._key.open(transcript, sealed)
        self._key = None
        if not hmac.compare_digest(hashlib.sha256(opened[:_SECRET_BYTES]).digest(), proof.commitment):
            raise StateError("the state is not from the platform that has proven itself")
        return opened[_SECRET_BYTES:]
