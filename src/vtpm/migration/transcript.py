"""The digests by which both sides name what was said. Pure."""

from __future__ import annotations

import hashlib

from vtpm.wire.migration import Offer, Propose, Prove, encode_message

_LABEL = b"vtpm migration transcript 1"


def proposal_digest(proposal: Propose) -> bytes:
    """Return the SHA-256 by which an offer names its proposal."""
    return hashlib.sha256(encode_message(proposal)).digest()


def transcript_digest(proposal: Propose, offer: Offer, proof: Prove) -> bytes:
    """Return the SHA-256 over all that was said before the state, which both sides bind into its encryption."""
    said = (hashlib.sha256(encode_message(message)).digest() for message in (proposal, offer, proof))
    return hashlib.sha256(_LABEL + b"".join(said)).digest()


def state_digest(sealed: bytes) -> bytes:
    """Return the SHA-256 by which both sides name a sealed state."""
    return hashlib.sha256(sealed).digest()
