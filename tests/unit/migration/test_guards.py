"""Evidence is bound to all that must not be substituted, and the state to the one attempt."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from tests.unit.wire.migration_examples import MIGRATION_ID, NONCE, VM_ID, VTPM_ID
from vtpm.errors import AttestationError, StateError
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind
from vtpm.migration.destination import Destination, Incoming
from vtpm.migration.guards import Guard, channel_digest
from vtpm.migration.source import Outgoing, Source
from vtpm.migration.transcript import proposal_digest
from vtpm.migration.transport_key import TransportKey, seal
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire import migration as mg

HELD = Holding(Right.HELD, 7)
CHANNEL = channel_digest(b"key of a", b"key of b")
TRANSCRIPT = bytes(range(32))


class Quotes:
    """An attester whose evidence is true, and says whose it is and what it is over."""

    def __init__(self, name: str) -> None:
        self._name = name

    def evidence(self, extra: bytes) -> bytes:
        assert len(extra) == 32
        return self._name.encode() + b" quotes " + extra

    def verify(self, evidence: bytes, extra: bytes) -> CertifiedPlatform:
        name, _, over = evidence.partition(b" quotes ")
        if over != extra:
            raise AttestationError("the quote was made for something else")
        return CertifiedPlatform(name.decode(), PlatformKind.HARDWARE, 1)


def guard(channel: bytes = CHANNEL, name: str = "a") -> Guard:
    return Guard(Quotes(name), channel)


def message(step: object) -> mg.MigrationMessage:
    (send,) = step.sends  # type: ignore[attr-defined]
    found: mg.MigrationMessage = send.message
    return found


def asked(source: Source) -> tuple[Outgoing, mg.Propose]:
    step = source.propose(HELD, "b", VTPM_ID, VM_ID, mg.Mode.STOPPED, NONCE)
    proposal = message(step)
    assert step.session is not None and isinstance(proposal, mg.Propose)
    return step.session, proposal


def offered(destination: Destination, proposal: mg.Propose, fresh: bytes) -> tuple[Incoming, mg.Offer]:
    step = destination.receive(NOWHERE, None, "a", proposal, fresh)
    offer = message(step)
    assert step.session is not None and isinstance(offer, mg.Offer)
    return step.session, offer


def test_state_comes_over_when_both_are_who_they_say() -> None:
    source, destination = Source(guard()), Destination(guard(name="b"))
    out, proposal = asked(source)
    into, offer = offered(destination, proposal, MIGRATION_ID + NONCE)
    step = source.receive(HELD, out, "b", offer)
    proof = message(step)
    assert isinstance(proof, mg.Prove)
    proven = destination.receive(NOWHERE, into, "a", proof, b"").session
    frozen = source.freeze(HELD, step.session, b"a whole TPM")
    state = message(frozen)
    assert isinstance(state, mg.State) and b"a whole TPM" not in state.sealed
    stored = destination.receive(NOWHERE, proven, "a", state, b"")
    assert (stored.holding.right, stored.holding.epoch, stored.state) == (Right.INERT, 8, b"a whole TPM")
    assert stored.holding.digest == frozen.holding.digest


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": bytes(32)},
        {"key": TransportKey().public},
        {"migration_id": bytes(16)},
        {"evidence": b"quote " + bytes(32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_offer_is_not_believed_when_something_in_it_was_substituted(change: dict[str, bytes]) -> None:
    source = Source(guard())
    out, proposal = asked(source)
    _, offer = offered(Destination(guard(name="b")), proposal, MIGRATION_ID + NONCE)
    with pytest.raises(AttestationError, match="something else"):
        source.receive(HELD, out, "b", dataclasses.replace(offer, **change))


def test_offer_is_not_believed_when_it_was_made_for_another_proposal() -> None:
    source = Source(guard())
    out, proposal = asked(source)
    older = dataclasses.replace(proposal, nonce=bytes(32))
    _, replayed = offered(Destination(guard(name="b")), older, MIGRATION_ID + NONCE)
    forged = dataclasses.replace(replayed, proposal=proposal_digest(proposal))
    with pytest.raises(AttestationError, match="something else"):
        source.receive(HELD, out, "b", forged)


def test_neither_is_believed_when_somebody_sits_between_them() -> None:
    """Who relays has other TLS keys: towards the source as destination, and towards the destination as source."""
    to_source, to_destination = channel_digest(b"key of a", b"key of m"), channel_digest(b"key of m", b"key of b")
    source, destination = Source(guard(to_source)), Destination(guard(to_destination, "b"))
    out, proposal = asked(source)
    into, offer = offered(destination, proposal, MIGRATION_ID + NONCE)
    with pytest.raises(AttestationError, match="something else"):
        source.receive(HELD, out, "b", offer)
    proof = guard(to_source).prove(proposal, offer)
    with pytest.raises(AttestationError, match="something else"):
        destination.receive(NOWHERE, into, "a", proof, b"")
    assert channel_digest(b"key of a", b"key of b") != channel_digest(b"key of b", b"key of a")


def test_proof_is_not_believed_when_it_is_of_another_offer() -> None:
    destination = Destination(guard(name="b"))
    _, proposal = asked(Source(guard()))
    into, offer = offered(destination, proposal, MIGRATION_ID + NONCE)
    other = dataclasses.replace(offer, key=TransportKey().public)
    with pytest.raises(AttestationError, match="something else"):
        destination.receive(NOWHERE, into, "a", guard().prove(proposal, other), b"")


def test_proof_is_not_believed_when_its_commitment_was_substituted() -> None:
    destination = Destination(guard(name="b"))
    _, proposal = asked(Source(guard()))
    into, offer = offered(destination, proposal, MIGRATION_ID + NONCE)
    proof = guard().prove(proposal, offer)
    with pytest.raises(AttestationError, match="something else"):
        destination.receive(NOWHERE, into, "a", dataclasses.replace(proof, commitment=bytes(32)), b"")
    destination.receive(NOWHERE, into, "a", proof, b"")


def test_state_is_not_taken_when_it_is_not_from_who_has_proven_itself() -> None:
    destination = guard(name="b")
    _, proposal = asked(Source(guard()))
    offer = destination.offer("a", proposal, MIGRATION_ID, NONCE)
    source, thief = guard(), guard()
    proof = source.prove(proposal, offer)
    thief.prove(proposal, offer)
    with pytest.raises(StateError, match="not from the platform"):
        destination.unseal(offer, proof, TRANSCRIPT, thief.seal(offer, TRANSCRIPT, b"another TPM"))


def test_state_does_not_open_when_key_transcript_or_a_byte_is_another() -> None:
    key = TransportKey()
    sealed = seal(key.public, TRANSCRIPT, b"state")
    assert key.open(TRANSCRIPT, sealed) == b"state"
    for bad_key, transcript, bad in (
        (TransportKey(), TRANSCRIPT, sealed),
        (key, bytes(32), sealed),
        (key, TRANSCRIPT, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (key, TRANSCRIPT, sealed[:-1]),
        (key, TRANSCRIPT, b""),
    ):
        with pytest.raises(StateError, match="not encrypted for this attempt"):
            bad_key.open(transcript, bad)


@pytest.mark.parametrize("public", [b"", b"\x02" + bytes(32), b"\x01" + bytes(31), b"\x01" + bytes(33)])
def test_nothing_is_sealed_when_the_key_is_none_that_is_known(public: bytes) -> None:
    with pytest.raises(AttestationError, match="does not know"):
        seal(public, TRANSCRIPT, b"state")


def test_nothing_is_sealed_when_the_key_is_a_point_of_small_order() -> None:
    with pytest.raises(AttestationError, match="no X25519 key"):
        seal(b"\x01" + bytes(32), TRANSCRIPT, b"state")


def test_key_is_used_once_and_for_its_own_attempt() -> None:
    destination = guard(name="b")
    _, proposal = asked(Source(guard()))
    offer = destination.offer("a", proposal, MIGRATION_ID, NONCE)
    source = guard()
    proof = source.prove(proposal, offer)
    sealed = source.seal(offer, TRANSCRIPT, b"state")
    with pytest.raises(StateError, match="is gone"):
        destination.unseal(dataclasses.replace(offer, migration_id=bytes(16)), proof, TRANSCRIPT, sealed)
    assert destination.unseal(offer, proof, TRANSCRIPT, sealed) == b"state"
    with pytest.raises(StateError, match="is gone"):
        destination.unseal(offer, proof, TRANSCRIPT, sealed)
    second = destination.offer("a", proposal, bytes(16), NONCE)
    destination.offer("a", proposal, MIGRATION_ID, NONCE)
    with pytest.raises(StateError, match="is gone"):
        destination.unseal(second, proof, TRANSCRIPT, source.seal(second, TRANSCRIPT, b"state"))


def test_key_does_not_show_when_printed_or_pickled() -> None:
    key = TransportKey()
    assert repr(key) == "TransportKey(redacted)"
    with pytest.raises(TypeError, match="not serialised"):
        pickle.dumps(key)


def test_offer_is_not_believed_when_another_platform_made_it_than_the_peer() -> None:
    source = Source(guard())
    out, proposal = asked(source)
    _, offer = offered(Destination(guard(name="c")), proposal, MIGRATION_ID + NONCE)
    with pytest.raises(AttestationError, match="b shows the evidence of c"):
        source.receive(HELD, out, "b", offer)


def test_proof_is_not_believed_when_another_platform_made_it_than_the_peer() -> None:
    destination = Destination(guard(name="b"))
    _, proposal = asked(Source(guard()))
    into, offer = offered(destination, proposal, MIGRATION_ID + NONCE)
    with pytest.raises(AttestationError, match="a shows the evidence of c"):
        destination.receive(NOWHERE, into, "a", guard(name="c").prove(proposal, offer), b"")
