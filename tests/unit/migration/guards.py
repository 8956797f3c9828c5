"""A guard that takes everything, or nothing, and says what it was asked."""

from __future__ import annotations

from vtpm.errors import AttestationError, StateError
from vtpm.migration.transcript import proposal_digest
from vtpm.wire.migration import Offer, Propose, Prove


class Guard:
    """Stands for platform TPM and cryptography. refuses: every verification fails."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.examined = 0
        self.transcripts: list[bytes] = []

    def offer(self, peer: str, proposal: Propose, migration_id: bytes, nonce: bytes) -> Offer:
        if self.refuses:
            raise AttestationError("policy takes no such vTPM")
        return Offer(migration_id, proposal_digest(proposal), nonce, b"key", b"quote")

    def examine(self, peer: str, proposal: Propose, offer: Offer, proof: Prove | None = None) -> None:
        self.examined += 1
        if self.refuses:
            raise StateError("the evidence is of another platform")

    def prove(self, proposal: Propose, offer: Offer) -> Prove:
        return Prove(offer.migration_id, bytes(32), b"proof")

    def seal(self, offer: Offer, transcript: bytes, state: bytes) -> bytes:
        self.transcripts.append(transcript)
        return b"sealed " + state

    def unseal(self, offer: Offer, proof: Prove, transcript: bytes, sealed: bytes) -> bytes:
        self.transcripts.append(transcript)
        if self.refuses or not sealed.startswith(b"sealed "):
            raise StateError("the state was not sealed for this")
        return sealed.removeprefix(b"sealed ")
