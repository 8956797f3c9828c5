"""What was said has one digest, and anything else another."""

from __future__ import annotations

import dataclasses
import itertools

from tests.unit.wire.migration_examples import DIGEST, MIGRATION_ID, NONCE, VM_ID, VTPM_ID
from vtpm.migration.transcript import proposal_digest, transcript_digest
from vtpm.wire import migration as mg

PROPOSAL = mg.Propose(VTPM_ID, VM_ID, 7, mg.Mode.STOPPED, NONCE)
OFFER = mg.Offer(MIGRATION_ID, DIGEST, NONCE, b"key", b"quote")
PROOF = mg.Prove(MIGRATION_ID, bytes(32), b"proof")


def test_digest_differs_when_anything_that_was_said_differs() -> None:
    proposals = [
        PROPOSAL,
        dataclasses.replace(PROPOSAL, vtpm_id=VM_ID),
        dataclasses.replace(PROPOSAL, vm_id=VTPM_ID),
        dataclasses.replace(PROPOSAL, epoch=8),
        dataclasses.replace(PROPOSAL, mode=mg.Mode.DRIVEN),
        dataclasses.replace(PROPOSAL, nonce=DIGEST),
    ]
    offers = [
        OFFER,
        dataclasses.replace(OFFER, migration_id=bytes(16)),
        dataclasses.replace(OFFER, proposal=NONCE),
        dataclasses.replace(OFFER, nonce=DIGEST),
        dataclasses.replace(OFFER, key=b"keyq", evidence=b"uote"),
        dataclasses.replace(OFFER, evidence=b"another"),
    ]
    proofs = [
        PROOF,
        dataclasses.replace(PROOF, evidence=b"another"),
        mg.Prove(bytes(16), bytes(32), b"proof"),
        dataclasses.replace(PROOF, commitment=b"c" * 32),
    ]
    said = list(itertools.product(proposals, offers, proofs))
    assert len({transcript_digest(*three) for three in said}) == len(said)
    assert len({proposal_digest(proposal) for proposal in proposals}) == len(proposals)
