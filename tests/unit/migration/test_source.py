"""The source lets go of a vTPM to whom it asked and believed, once, and takes it back only while it still can."""

from __future__ import annotations

import dataclasses

import pytest

from tests.unit.migration.guards import Guard
from tests.unit.wire.migration_examples import DIGEST, MIGRATION_ID, NONCE, VM_ID, VTPM_ID
from vtpm.errors import StateError
from vtpm.migration.source import Asking, Outgoing, Source, Waiting
from vtpm.migration.steps import MigrationError, Send, Step
from vtpm.migration.transcript import proposal_digest, state_digest, transcript_digest
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire import migration as mg

HELD = Holding(Right.HELD, 7)
SEALED = b"sealed state"
FROZEN = Holding(Right.FROZEN, 7, MIGRATION_ID, "b", state_digest(SEALED))
MOVED = Holding(Right.MOVED, 8, MIGRATION_ID, "b")
INERT = Holding(Right.INERT, 7, MIGRATION_ID, "b", DIGEST)
OTHER_ID = bytes(16)
STORED = mg.Stored(MIGRATION_ID, FROZEN.digest)


def frozen(mode: mg.Mode) -> Holding:
    return dataclasses.replace(FROZEN, mode=mode)


def asking(source: Source, mode: mg.Mode = mg.Mode.STOPPED) -> tuple[Asking, mg.Propose]:
    step = source.propose(HELD, "b", VTPM_ID, VM_ID, mode, NONCE)
    (send,) = step.sends
    assert send.peer == "b" and isinstance(send.message, mg.Propose) and isinstance(step.session, Asking)
    assert step.holding == HELD
    return step.session, send.message


def offer_to(proposal: mg.Propose) -> mg.Offer:
    return mg.Offer(MIGRATION_ID, proposal_digest(proposal), NONCE, b"key", b"quote")


def believed(source: Source, mode: mg.Mode = mg.Mode.STOPPED) -> Step[Outgoing]:
    session, proposal = asking(source, mode)
    return source.receive(HELD, session, "b", offer_to(proposal))


def test_state_leaves_sealed_and_frozen_when_the_destination_was_believed() -> None:
    guard = Guard()
    source = Source(guard)
    step = believed(source, mg.Mode.FOREIGN)
    proof = mg.Prove(MIGRATION_ID, bytes(32), b"proof")
    assert step.sends == (Send("b", proof),) and step.holding == HELD and guard.examined == 1
    step = source.freeze(HELD, step.session, b"state")
    assert step.holding == frozen(mg.Mode.FOREIGN)
    assert step.sends == (Send("b", mg.State(MIGRATION_ID, SEALED)),) and step.session == Waiting()
    _, proposal = asking(source, mg.Mode.FOREIGN)
    assert guard.transcripts == [transcript_digest(proposal, offer_to(proposal), proof)]


def test_no_state_leaves_when_no_destination_has_proven_itself() -> None:
    source = Source(Guard())
    session, _ = asking(source)
    for nothing in (None, session, Waiting(stored=True)):
        with pytest.raises(MigrationError, match="no destination has proven itself"):
            source.freeze(HELD, nothing, b"state")


def test_offer_is_not_taken_when_its_evidence_is_not_believed() -> None:
    session, proposal = asking(Source(Guard()))
    with pytest.raises(StateError, match="another platform"):
        Source(Guard(refuses=True)).receive(HELD, session, "b", offer_to(proposal))


def test_offer_is_not_taken_when_it_was_not_asked_for() -> None:
    source = Source(Guard())
    session, proposal = asking(source)
    offer = offer_to(proposal)
    for holding, remembered, peer in ((HELD, None, "b"), (HELD, session, "c"), (FROZEN, session, "b")):
        with pytest.raises(MigrationError, match="was not asked"):
            source.receive(holding, remembered, peer, offer)
    with pytest.raises(MigrationError, match="another proposal"):
        source.receive(HELD, session, "b", dataclasses.replace(offer, proposal=DIGEST))


def test_first_offer_counts_when_there_are_two() -> None:
    source = Source(Guard())
    step = believed(source)
    _, proposal = asking(source)
    with pytest.raises(MigrationError, match="already"):
        source.receive(HELD, step.session, "b", dataclasses.replace(offer_to(proposal), migration_id=OTHER_ID))


@pytest.mark.parametrize("holding", [NOWHERE, FROZEN, MOVED, INERT], ids=lambda holding: holding.right.value)
def test_nothing_moves_from_here_when_the_right_is_not_held(holding: Holding) -> None:
    source = Source(Guard())
    with pytest.raises(MigrationError, match="cannot move"):
        source.propose(holding, "b", VTPM_ID, VM_ID, mg.Mode.STOPPED, NONCE)
    with pytest.raises(MigrationError, match="no state to give"):
        source.freeze(holding, believed(source).session, b"state")


def test_right_goes_over_when_the_destination_has_stored_the_state() -> None:
    for remembered in (Waiting(), None):
        step = Source(Guard()).receive(FROZEN, remembered, "b", STORED)
        assert step == Step(MOVED, None, (Send("b", mg.Release(MIGRATION_ID)),))


def test_right_stays_when_another_or_of_another_attempt_has_stored_something() -> None:
    source = Source(Guard())
    for peer, message, why in (
        ("c", STORED, "not under way with it"),
        ("b", mg.Stored(OTHER_ID, FROZEN.digest), "not under way with it"),
        ("b", mg.Stored(MIGRATION_ID, DIGEST), "another state"),
    ):
        with pytest.raises(MigrationError, match=why):
            source.receive(FROZEN, Waiting(), peer, message)
    with pytest.raises(MigrationError, match="not under way"):
        source.receive(HELD, None, "b", STORED)
    with pytest.raises(MigrationError, match="is over"):
        source.receive(INERT, None, "b", STORED)


def test_right_waits_for_the_guest_when_the_move_is_driven() -> None:
    source, holding = Source(Guard()), frozen(mg.Mode.DRIVEN)
    step = source.receive(holding, Waiting(), "b", STORED)
    assert step == Step(holding, Waiting(stored=True))
    assert source.arrived(holding, step.session).holding.right is Right.MOVED
    step = source.arrived(holding, None)
    assert step == Step(holding, Waiting(arrived=True), (Send("b", mg.Ask(MIGRATION_ID)),))
    assert source.receive(holding, step.session, "b", STORED).holding.right is Right.MOVED


def test_nothing_has_arrived_when_no_move_is_driven() -> None:
    for holding in (HELD, FROZEN, frozen(mg.Mode.FOREIGN), dataclasses.replace(MOVED, mode=mg.Mode.DRIVEN)):
        with pytest.raises(MigrationError, match="no migration that is driven"):
            Source(Guard()).arrived(holding, None)


def test_right_waits_for_the_guests_first_command_when_somebody_else_drives() -> None:
    source, holding = Source(Guard()), frozen(mg.Mode.FOREIGN)
    query = mg.Query(MIGRATION_ID, FROZEN.digest)
    for message in (STORED, query):
        assert source.receive(holding, None, "b", message) == Step(holding, Waiting(stored=True))
    step = source.receive(holding, None, "b", dataclasses.replace(query, wanted=True))
    assert step.holding.right is Right.MOVED and step.sends == (Send("b", mg.Release(MIGRATION_ID)),)
    with pytest.raises(MigrationError, match="another state"):
        source.receive(holding, None, "b", mg.Query(MIGRATION_ID, DIGEST, wanted=True))


def test_release_is_said_again_when_the_destination_asks_again() -> None:
    source, release = Source(Guard()), (Send("b", mg.Release(MIGRATION_ID)),)
    for message in (STORED, mg.Query(MIGRATION_ID, DIGEST)):
        assert source.receive(MOVED, None, "b", message) == Step(MOVED, None, release)
        with pytest.raises(MigrationError):
            source.receive(MOVED, None, "c", message)
    assert source.remind(MOVED, None) == Step(MOVED, None, release)


def test_move_is_over_when_its_destination_is_active() -> None:
    source, over = Source(Guard()), Holding(Right.MOVED, 8, b"", "b")
    assert source.receive(MOVED, None, "b", mg.Activated(MIGRATION_ID)) == Step(over, None)
    for holding, peer, migration_id in (
        (MOVED, "c", MIGRATION_ID),
        (MOVED, "b", OTHER_ID),
        (FROZEN, "c", MIGRATION_ID),
        (FROZEN, "b", OTHER_ID),
    ):
        assert source.receive(holding, None, peer, mg.Activated(migration_id)) == Step(holding, None)
    assert source.remind(over, None) == Step(over, None)
    aborted = (Send("b", mg.Aborted(MIGRATION_ID)),)
    assert source.receive(over, None, "b", mg.Query(MIGRATION_ID, DIGEST)) == Step(over, None, aborted)


def test_frozen_source_lets_go_when_an_operator_has_said_at_the_destination_that_it_is_lost() -> None:
    over = Holding(Right.MOVED, 8, b"", "b")
    assert Source(Guard()).receive(FROZEN, None, "b", mg.Activated(MIGRATION_ID)) == Step(over, None)


def test_vtpm_goes_on_here_under_an_epoch_of_its_own_when_the_move_is_aborted() -> None:
    source, kept = Source(Guard()), Holding(Right.HELD, 9)
    for step in (source.abort(FROZEN), source.receive(FROZEN, None, "b", mg.Refuse(MIGRATION_ID, "full"))):
        assert step == Step(kept, None, (Send("b", mg.Aborted(MIGRATION_ID)),))


def test_nothing_is_taken_back_when_it_has_moved() -> None:
    source = Source(Guard())
    with pytest.raises(MigrationError, match="has moved to b"):
        source.abort(MOVED)
    with pytest.raises(MigrationError, match="not under way"):
        source.receive(MOVED, None, "b", mg.Refuse(MIGRATION_ID, "full"))


def test_attempt_is_forgotten_when_it_is_aborted_before_anything_left() -> None:
    source = Source(Guard())
    assert source.abort(HELD) == Step(HELD, None)
    session, proposal = asking(source)
    decline = mg.Decline(proposal_digest(proposal), "no room")
    assert source.receive(HELD, session, "b", decline) == Step(HELD, None)
    offered = believed(source).session
    assert source.receive(HELD, offered, "b", mg.Refuse(MIGRATION_ID, "full")) == Step(HELD, None)


def test_refusal_is_not_taken_when_it_is_of_another_or_of_something_else() -> None:
    source = Source(Guard())
    session, proposal = asking(source)
    offered = believed(source).session
    decline = mg.Decline(proposal_digest(proposal), "no room")
    for remembered, peer, message in (
        (None, "b", decline),
        (session, "c", decline),
        (offered, "b", decline),
        (session, "b", mg.Decline(DIGEST, "no room")),
        (session, "b", mg.Refuse(MIGRATION_ID, "full")),
        (offered, "c", mg.Refuse(MIGRATION_ID, "full")),
        (offered, "b", mg.Refuse(OTHER_ID, "full")),
    ):
        with pytest.raises(MigrationError):
            source.receive(HELD, remembered, peer, message)
    for peer, migration_id in (("c", MIGRATION_ID), ("b", OTHER_ID)):
        with pytest.raises(MigrationError):
            source.receive(FROZEN, None, peer, mg.Refuse(migration_id, "full"))


def test_attempt_is_called_aborted_when_it_can_never_release() -> None:
    source = Source(Guard())
    query = mg.Query(OTHER_ID, DIGEST)
    for holding in (HELD, FROZEN, MOVED, INERT):
        step = source.receive(holding, None, "b", query)
        assert step == Step(holding, None, (Send("b", mg.Aborted(OTHER_ID)),))


def test_attempt_is_not_called_aborted_when_it_may_still_freeze_or_nothing_is_known() -> None:
    source = Source(Guard())
    offered = believed(source).session
    with pytest.raises(MigrationError, match="cannot have yet"):
        source.receive(HELD, offered, "b", mg.Query(MIGRATION_ID, DIGEST))
    with pytest.raises(MigrationError, match="knows nothing"):
        source.receive(NOWHERE, None, "b", mg.Query(MIGRATION_ID, DIGEST))


def test_destination_is_asked_when_a_frozen_source_comes_back() -> None:
    source = Source(Guard())
    assert source.remind(FROZEN, None) == Step(FROZEN, None, (Send("b", mg.Ask(MIGRATION_ID)),))
    assert source.remind(HELD, None) == Step(HELD, None)
