"""One message of each type that two managers send each other."""

from __future__ import annotations

from uuid import UUID

from vtpm.wire import migration as mg

MIGRATION_ID = bytes(range(0xA0, 0xB0))
NONCE = bytes(range(32))
DIGEST = bytes(range(64, 96))
VTPM_ID = UUID("6f0c9e0e-5a39-4bd0-8f4c-6d4d2a3c9a11")
VM_ID = UUID("0b5d1f22-77aa-4c31-9a56-b0c1d2e3f405")

MIGRATION_EXAMPLES: dict[str, mg.MigrationMessage] = {
    "propose": mg.Propose(VTPM_ID, VM_ID, 7, mg.Mode.DRIVEN, NONCE),
    "offer": mg.Offer(MIGRATION_ID, DIGEST, NONCE, b"a public key", b"a quote"),
    "decline": mg.Decline(DIGEST, "no room"),
    "prove": mg.Prove(MIGRATION_ID, bytes(range(32)), b"a quote"),
    "state": mg.State(MIGRATION_ID, b"ciphertext"),
    "stored": mg.Stored(MIGRATION_ID, DIGEST),
    "refuse": mg.Refuse(MIGRATION_ID, "nothing of it is here"),
    "ask": mg.Ask(MIGRATION_ID),
    "release": mg.Release(MIGRATION_ID),
    "activated": mg.Activated(MIGRATION_ID),
    "query": mg.Query(MIGRATION_ID, DIGEST, wanted=True),
    "aborted": mg.Aborted(MIGRATION_ID),
}
