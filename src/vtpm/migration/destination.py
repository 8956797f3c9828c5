"""The destination of a migration: what it takes in, and the one thing that lets it run. Pure.

Every function takes what this host holds and remembers, and returns the step that follows; MigrationError means that
nothing follows. Whoever calls them serialises the steps of one vTPM, and knows from whom a message came.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from vtpm.errors import AttestationError, ConflictError
from vtpm.migration.steps import MigrationError, Send, Step
from vtpm.migration.transcript import proposal_digest, state_digest, transcript_digest
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire.migration import (
    ID_BYTES,
    Aborted,
    Activated,
    Ask,
    Decline,
    FromSource,
    Offer,
    Propose,
    Prove,
    Query,
    Refuse,
    Release,
    State,
    Stored,
)


@dataclass(frozen=True)
class Incoming:
    """What a destination remembers of an attempt until it crashes; the private key of the offer lives as long.

    Args:
        peer: the source.
        proposal: what it asked.
        offer: what it was answered.
        proof: its evidence, believed; None: not yet.
    """

    peer: str
    proposal: Propose
    offer: Offer
    proof: Prove | None = None


class DestinationGuard(Protocol):
    """What a destination's decisions rest on: platform TPM, policy and cryptography."""

    def offer(self, peer: str, proposal: Propose, migration_id: bytes, nonce: bytes) -> Offer:
        """Return the answer, with a fresh key and evidence over all.

        Raises:
            ConflictError, AttestationError: the vTPM is not taken; the source hears why. VtpmError: it is not, either.
        """

    def examine(self, peer: str, proposal: Propose, offer: Offer, proof: Prove) -> None:
        """Verify the source's evidence. Raises AttestationError: what is wrong with it."""

    def unseal(self, offer: Offer, proof: Prove, transcript: bytes, sealed: bytes) -> bytes:
        """Return the state. Raises StateError: it was not sealed for this offer and transcript, or by another."""


class Destination:
    """See the module.

    Args:
        guard: see DestinationGuard.
    """

    def __init__(self, guard: DestinationGuard) -> None:
        self._guard = guard

    def adopt(self, holding: Holding) -> Step[Incoming]:
        """Take an inert vTPM for one's own without a release: an operator says that its source is lost for good."""
        if holding.right is not Right.INERT:
            raise MigrationError(f"the vTPM is {holding.right.value} on this host, and waits for no release")
        adopted = holding.adopted + holding.migration_id
        return Step(dataclasses.replace(holding, right=Right.HELD, digest=b"", adopted=adopted), None)

    def discard(self, holding: Holding) -> Step[Incoming]:
        """Destroy an inert vTPM: an operator says that its source has it, or that nobody is to have it."""
        if holding.right is not Right.INERT:
            raise MigrationError(f"the vTPM is {holding.right.value} on this host, and no arrival to discard")
        return Step(Holding(Right.ABSENT, holding.epoch, adopted=holding.adopted), None)

    def remind(self, holding: Holding, session: Incoming | None, *, wanted: bool = False) -> Step[Incoming]:
        """Ask the source what has become of the attempt; after a restart, and from time to time.

        Args:
            wanted: whether the guest has sent a TPM command here, waiting for the answer.
        """
        if holding.right is not Right.INERT:
            return Step(holding, session)
        return Step(holding, session, (Send(holding.peer, Query(holding.migration_id, holding.digest, wanted)),))

    def receive(
        self, holding: Holding, session: Incoming | None, peer: str, message: FromSource, fresh: bytes
    ) -> Step[Incoming]:
        """Take a message of a source.

        Args:
            peer: whom the transport has authenticated.
            fresh: 48 random bytes, never used before: id and nonce, should an offer follow.
        Raises:
            MigrationError: it does not fit. AttestationError, StateError: of the guard.
        """
        match message:
            case Propose():
                return self._proposed(holding, session, peer, message, fresh)
            case Prove():
                return self._proven(holding, session, peer, message)
            case State():
                return self._state(holding, session, peer, message)
            case Ask():
                return _asked(holding, session, peer, message)
            case Release():
                return _released(holding, session, peer, message)
            case Aborted():
                return _aborted(holding, session, peer, message)

    def _proposed(
        self, holding: Holding, session: Incoming | None, peer: str, proposal: Propose, fresh: bytes
    ) -> Step[Incoming]:
        if session is not None and (session.peer, session.proposal) == (peer, proposal):
            return Step(holding, session, (Send(peer, session.offer),))
        try:
            _check_vacant(holding, peer, proposal)
            if session is not None and session.proof is not None and session.peer != peer:
                raise MigrationError("another host's attempt to move the vTPM here is under way")
            offer = self._guard.offer(peer, proposal, fresh[:ID_BYTES], fresh[ID_BYTES:])
        except (ConflictError, AttestationError) as error:
            # What else is wrong is this host's own trouble, and no peer's to know.
            return Step(holding, session, (Send(peer, Decline(proposal_digest(proposal), error.message)),))
        return Step(holding, Incoming(peer, proposal, offer), (Send(peer, offer),))

    def _proven(self, holding: Holding, session: Incoming | None, peer: str, proof: Prove) -> Step[Incoming]:
        session = _session_of(session, peer, proof.migration_id)
        if session.proof is None:
            self._guard.examine(peer, session.proposal, session.offer, proof)
        elif session.proof != proof:
            raise MigrationError(f"{peer} proves itself a second time, in another way")
        return Step(holding, dataclasses.replace(session, proof=proof))

    def _state(self, holding: Holding, session: Incoming | None, peer: str, message: State) -> Step[Incoming]:
        digest = state_digest(message.sealed)
        if holding.right is Right.INERT and holding.is_of(peer, message.migration_id):
            if digest != holding.digest:
                raise MigrationError(f"{peer} sends a second state for one attempt")
            return Step(holding, None, (Send(peer, Stored(message.migration_id, digest)),))
        session = _session_of(session, peer, message.migration_id)
        if session.proof is None:
            raise MigrationError(f"{peer} sends a state before it has proven itself")
        _check_vacant(holding, peer, session.proposal)
        transcript = transcript_digest(session.proposal, session.offer, session.proof)
        state = self._guard.unseal(session.offer, session.proof, transcript, message.sealed)
        inert = Holding(
            Right.INERT,
            session.proposal.epoch + 1,
            message.migration_id,
            peer,
            digest,
            session.proposal.mode,
            holding.adopted,
        )
        return Step(inert, None, (Send(peer, Stored(message.migration_id, digest)),), state)


def _check_vacant(holding: Holding, peer: str, proposal: Propose) -> None:
    if holding.right not in (Right.ABSENT, Right.MOVED):
        raise MigrationError(f"the vTPM is {holding.right.value} on this host already")
    if proposal.epoch < holding.epoch:
        raise MigrationError(f"the vTPM is proposed with epoch {proposal.epoch}, which has passed: {holding.epoch}")
    if holding.right is Right.MOVED and holding.migration_id and holding.peer != peer:
        # The release would be forgotten, and what waits for it be told that it is worthless. To say it again ends this.
        raise MigrationError(f"{holding.peer} has not said yet that the vTPM, which moved there, is active")


def _session_of(session: Incoming | None, peer: str, migration_id: bytes) -> Incoming:
    if session is None or session.peer != peer or session.offer.migration_id != migration_id:
        raise MigrationError(f"{peer} goes on with an attempt that was not begun here, or is forgotten")
    return session


def _asked(holding: Holding, session: Incoming | None, peer: str, ask: Ask) -> Step[Incoming]:
    if holding.is_of(peer, ask.migration_id):
        if holding.right is Right.INERT:
            return Step(holding, session, (Send(peer, Stored(ask.migration_id, holding.digest)),))
        return Step(holding, session, (Send(peer, Activated(ask.migration_id)),))
    if holding.has_adopted(ask.migration_id):
        return Step(holding, session, (Send(peer, Activated(ask.migration_id)),))
    # Said of no attempt that can still store: what was offered is forgotten first.
    if session is not None and session.offer.migration_id == ask.migration_id:
        session = None
    return Step(holding, session, (Send(peer, Refuse(ask.migration_id, "no state of this attempt is here")),))


def _released(holding: Holding, session: Incoming | None, peer: str, release: Release) -> Step[Incoming]:
    if holding.right is Right.INERT:
        if not holding.is_of(peer, release.migration_id):
            raise MigrationError(f"{peer} releases another attempt than the one whose state is here")
        holding = dataclasses.replace(holding, right=Right.HELD, digest=b"")
    elif holding == NOWHERE:
        raise MigrationError(f"{peer} releases a vTPM that this host knows nothing of")
    # Where it is inert no more it was active: a source releases nothing that was not stored here, and aborted nothing.
    return Step(holding, session, (Send(peer, Activated(release.migration_id)),))


def _aborted(holding: Holding, session: Incoming | None, peer: str, message: Aborted) -> Step[Incoming]:
    if session is not None and (session.peer, session.offer.migration_id) == (peer, message.migration_id):
        session = None
    if holding.right is Right.INERT and holding.is_of(peer, message.migration_id):
        return Step(Holding(Right.ABSENT, holding.epoch, adopted=holding.adopted), session)
    return Step(holding, session)
