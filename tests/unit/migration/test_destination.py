"""The destination takes in what it asked for from whom it believed, and runs it on the source's word alone."""

from __future__ import annotations

import dataclasses

import pytest

from tests.unit.migration.guards import Guard
from tests.unit.wire.migration_examples import MIGRATION_ID, NONCE, VM_ID, VTPM_ID
from vtpm.errors import StateError
from vtpm.migration.destination import Destination, Incoming
from vtpm.migration.steps import MigrationError, Send, Step
from vtpm.migration.transcript import proposal_digest, state_digest, transcript_digest
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire import migration as mg

FRESH = MIGRATION_ID + NONCE
PROPOSAL = mg.Propose(VTPM_ID, VM_ID, 7, mg.Mode.DRIVEN, NONCE)
OFFER = mg.Offer(MIGRATION_ID, proposal_digest(PROPOSAL), NONCE, b"key", b"quote")
PROOF = mg.Prove(MIGRATION_ID, bytes(32), b"proof")
STATE = mg.State(MIGRATION_ID, b"sealed state")
OFFERED = Incoming("a", PROPOSAL, OFFER)
PROVEN = Incoming("a", PROPOSAL, OFFER, PROOF)
INERT = Holding(Right.INERT, 8, MIGRATION_ID, "a", state_digest(STATE.sealed), mg.Mode.DRIVEN)
HELD = Holding(Right.HELD, 8, MIGRATION_ID, "a", mode=mg.Mode.DRIVEN)
GONE = Holding(Right.MOVED, 7, b"", "c")
COMES_BACK = Holding(Right.MOVED, 7, bytes(16), "a")
OTHER_ID = bytes(16)


def receive(
    holding: Holding, session: Incoming | None, message: mg.FromSource, peer: str = "a", guard: Guard | None = None
) -> Step[Incoming]:
    return Destination(guard or Guard()).receive(holding, session, peer, message, FRESH)


@pytest.mark.parametrize(
    "holding", [NOWHERE, Holding(Right.ABSENT, 7), GONE, COMES_BACK], ids=["new", "discarded", "gone", "back"]
)
def test_state_is_stored_inert_when_all_went_in_order(holding: Holding) -> None:
    guard = Guard()
    step = receive(holding, None, PROPOSAL, guard=guard)
    assert step == Step(holding, OFFERED, (Send("a", OFFER),))
    step = receive(holding, step.session, PROOF, guard=guard)
    assert step == Step(holding, PROVEN) and guard.examined == 1
    step = receive(holding, step.session, STATE, guard=guard)
    assert step == Step(INERT, None, (Send("a", mg.Stored(MIGRATION_ID, INERT.digest)),), b"state")
    assert not step.holding.may_run
    assert guard.transcripts == [transcript_digest(PROPOSAL, OFFER, PROOF)]


def test_same_offer_is_given_when_the_same_is_proposed_again() -> None:
    assert receive(NOWHERE, PROVEN, PROPOSAL) == Step(NOWHERE, PROVEN, (Send("a", OFFER),))
    other = dataclasses.replace(PROPOSAL, nonce=bytes(32))
    session = receive(NOWHERE, PROVEN, other).session
    assert session is not None and session.proposal == other and session.proof is None


@pytest.mark.parametrize(
    ("holding", "why"),
    [
        (HELD, "held on this host already"),
        (Holding(Right.INERT, 7, OTHER_ID, "c"), "inert on this host already"),
        (Holding(Right.FROZEN, 7, MIGRATION_ID, "c"), "frozen on this host already"),
        (Holding(Right.ABSENT, 8), "has passed: 8"),
        (Holding(Right.MOVED, 8, b"", "c"), "has passed: 8"),
        (Holding(Right.MOVED, 7, OTHER_ID, "c"), "has not said yet"),
    ],
    ids=["held", "inert", "frozen", "discarded", "moved", "released"],
)
def test_vtpm_is_declined_when_it_is_here_or_of_a_past_epoch(holding: Holding, why: str) -> None:
    step = receive(holding, None, PROPOSAL)
    (send,) = step.sends
    assert (step.holding, step.session) == (holding, None)
    assert isinstance(send.message, mg.Decline) and why in send.message.reason
    assert send.message.proposal == proposal_digest(PROPOSAL)
    with pytest.raises(MigrationError, match=why.partition(":")[0]):
        receive(holding, PROVEN, mg.State(MIGRATION_ID, b"sealed other"))


def test_vtpm_is_declined_when_the_guard_does_not_take_it() -> None:
    step = receive(NOWHERE, None, PROPOSAL, guard=Guard(refuses=True))
    decline = mg.Decline(proposal_digest(PROPOSAL), "policy takes no such vTPM")
    assert step == Step(NOWHERE, None, (Send("a", decline),))


def test_source_is_not_believed_when_its_evidence_is_not() -> None:
    with pytest.raises(StateError, match="another platform"):
        receive(NOWHERE, OFFERED, PROOF, guard=Guard(refuses=True))


def test_first_proof_counts_when_there_are_two() -> None:
    guard = Guard()
    assert receive(NOWHERE, PROVEN, PROOF, guard=guard) == Step(NOWHERE, PROVEN) and guard.examined == 0
    with pytest.raises(MigrationError, match="second time"):
        receive(NOWHERE, PROVEN, mg.Prove(MIGRATION_ID, bytes(32), b"other"))


def test_state_is_refused_when_the_source_has_not_proven_itself() -> None:
    with pytest.raises(MigrationError, match="before it has proven"):
        receive(NOWHERE, OFFERED, STATE)


def test_proof_and_state_are_refused_when_of_another_or_of_a_forgotten_attempt() -> None:
    for message in (PROOF, STATE):
        other = dataclasses.replace(message, migration_id=OTHER_ID)
        for session, peer, said in ((None, "a", message), (PROVEN, "c", message), (PROVEN, "a", other)):
            with pytest.raises(MigrationError, match="not begun here"):
                receive(NOWHERE, session, said, peer)


def test_state_is_refused_when_it_was_not_sealed_for_this() -> None:
    with pytest.raises(StateError, match="not sealed for this"):
        receive(NOWHERE, PROVEN, mg.State(MIGRATION_ID, b"something"))


def test_stored_is_said_again_when_the_state_or_the_question_comes_again() -> None:
    stored = (Send("a", mg.Stored(MIGRATION_ID, INERT.digest)),)
    assert receive(INERT, None, STATE) == Step(INERT, None, stored)
    assert receive(INERT, None, mg.Ask(MIGRATION_ID)) == Step(INERT, None, stored)
    with pytest.raises(MigrationError, match="second state"):
        receive(INERT, None, mg.State(MIGRATION_ID, b"sealed other"))


def test_vtpm_runs_when_its_source_has_released_it() -> None:
    activated = (Send("a", mg.Activated(MIGRATION_ID)),)
    step = receive(INERT, None, mg.Release(MIGRATION_ID))
    assert step == Step(HELD, None, activated) and step.holding.may_run
    assert receive(HELD, None, mg.Release(MIGRATION_ID)) == Step(HELD, None, activated)
    assert receive(HELD, None, mg.Ask(MIGRATION_ID)) == Step(HELD, None, activated)


def test_vtpm_does_not_run_when_another_or_another_attempt_is_released() -> None:
    for peer, migration_id in (("c", MIGRATION_ID), ("a", OTHER_ID)):
        with pytest.raises(MigrationError, match="another attempt"):
            receive(INERT, None, mg.Release(migration_id), peer)
    with pytest.raises(MigrationError, match="knows nothing"):
        receive(NOWHERE, None, mg.Release(MIGRATION_ID))


def test_state_is_discarded_when_its_source_has_aborted() -> None:
    step = receive(INERT, None, mg.Aborted(MIGRATION_ID))
    assert step == Step(Holding(Right.ABSENT, 8), None)
    assert receive(NOWHERE, PROVEN, mg.Aborted(MIGRATION_ID)) == Step(NOWHERE, None)


def test_state_is_kept_when_another_or_another_attempt_was_aborted() -> None:
    for peer, migration_id in (("c", MIGRATION_ID), ("a", OTHER_ID)):
        assert receive(INERT, None, mg.Aborted(migration_id), peer) == Step(INERT, None)
        assert receive(NOWHERE, PROVEN, mg.Aborted(migration_id), peer) == Step(NOWHERE, PROVEN)
    assert receive(HELD, None, mg.Aborted(MIGRATION_ID)) == Step(HELD, None)


def test_attempt_is_refused_and_forgotten_when_its_source_asks_before_the_state_came() -> None:
    for session in (None, OFFERED, PROVEN):
        step = receive(NOWHERE, session, mg.Ask(MIGRATION_ID))
        (send,) = step.sends
        assert step.session is None and isinstance(send.message, mg.Refuse)
    assert receive(NOWHERE, PROVEN, mg.Ask(OTHER_ID)).session == PROVEN


def test_source_is_asked_when_an_inert_destination_waits() -> None:
    destination = Destination(Guard())
    for wanted in (False, True):
        query = mg.Query(MIGRATION_ID, INERT.digest, wanted)
        assert destination.remind(INERT, None, wanted=wanted) == Step(INERT, None, (Send("a", query),))
    assert destination.remind(HELD, None) == Step(HELD, None)
    assert destination.remind(NOWHERE, PROVEN) == Step(NOWHERE, PROVEN)


def test_inert_vtpm_is_held_without_a_release_when_an_operator_says_that_its_source_is_lost() -> None:
    destination = Destination(Guard())
    inert = Holding(Right.INERT, 8, MIGRATION_ID, "a", bytes(32))
    assert destination.adopt(inert).holding == Holding(Right.HELD, 8, MIGRATION_ID, "a", adopted=MIGRATION_ID)
    for other in (NOWHERE, Holding(Right.HELD, 8), Holding(Right.MOVED, 8), Holding(Right.FROZEN, 8)):
        with pytest.raises(MigrationError, match="waits for no release"):
            destination.adopt(other)


def test_source_that_comes_back_hears_that_its_vtpm_was_adopted_whatever_has_become_of_it_since() -> None:
    destination, ask = Destination(Guard()), mg.Ask(MIGRATION_ID)
    adopted = destination.adopt(Holding(Right.INERT, 8, MIGRATION_ID, "a", bytes(32))).holding
    later = [
        dataclasses.replace(adopted, right=Right.FROZEN, migration_id=bytes(16), peer="c"),
        Holding(Right.MOVED, 9, b"", "c", adopted=adopted.adopted),
        Holding(Right.HELD, 10, adopted=bytes(16) + adopted.adopted),
        Holding(Right.ABSENT, 10, adopted=adopted.adopted),
    ]
    for holding in later:
        (send,) = destination.receive(holding, None, "a", ask, b"").sends
        assert send.message == mg.Activated(MIGRATION_ID)
    (send,) = destination.receive(Holding(Right.HELD, 10, adopted=bytes(16)), None, "a", ask, b"").sends
    assert isinstance(send.message, mg.Refuse)


def test_attempt_that_has_proven_itself_is_not_displaced_by_another_host() -> None:
    destination = Destination(Guard())
    step = destination.receive(NOWHERE, PROVEN, "c", PROPOSAL, bytes(48))
    (send,) = step.sends
    assert isinstance(send.message, mg.Decline) and "under way" in send.message.reason
    assert step.session == PROVEN
    # The one that has begun it may begin anew.
    anew = dataclasses.replace(PROPOSAL, nonce=bytes(32))
    (send,) = destination.receive(NOWHERE, PROVEN, PROVEN.peer, anew, bytes(48)).sends
    assert isinstance(send.message, mg.Offer)


def test_arrival_is_discarded_by_an_operators_word_and_its_epoch_stays_known() -> None:
    destination = Destination(Guard())
    inert = Holding(Right.INERT, 8, MIGRATION_ID, "a", bytes(32), adopted=bytes(16))
    assert destination.discard(inert) == Step(Holding(Right.ABSENT, 8, adopted=bytes(16)), None)
    for other in (NOWHERE, Holding(Right.HELD, 8), Holding(Right.MOVED, 8), Holding(Right.FROZEN, 8)):
        with pytest.raises(MigrationError, match="no arrival to discard"):
            destination.discard(other)
