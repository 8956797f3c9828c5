"""The source of a migration: who may let go of a vTPM, to whom, and when it never takes it back. Pure.

Every function takes what this host holds and remembers, and returns the step that follows; MigrationError means that
nothing follows. Whoever calls them serialises the steps of one vTPM, and knows from whom a message came.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from vtpm.migration.steps import MigrationError, Send, Step
from vtpm.migration.transcript import proposal_digest, state_digest, transcript_digest
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire.migration import (
    Aborted,
    Activated,
    Ask,
    Decline,
    FromDestination,
    Mode,
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
class Asking:
    """What a source remembers before it is frozen.

    Args:
        peer: who was asked.
        proposal: what was asked.
        offer: the answer, believed; None: not yet.
        proof: what the destination was given in return.
    """

    peer: str
    proposal: Propose
    offer: Offer | None = None
    proof: Prove | None = None


@dataclass(frozen=True)
class Waiting:
    """What a frozen source remembers.

    Args:
        stored: whether the destination has said that the state is durable there.
        arrived: whether whoever drives both QEMUs has said that the guest is there, paused.
    """

    stored: bool = False
    arrived: bool = False


Outgoing = Asking | Waiting


class SourceGuard(Protocol):
    """What a source's decisions rest on: platform TPM, policy and cryptography."""

    def examine(self, peer: str, proposal: Propose, offer: Offer) -> None:
        """Verify the destination's evidence. Raises AttestationError: what is wrong with it."""

    def prove(self, proposal: Propose, offer: Offer) -> Prove:
        """Return this platform's evidence over all that was said, and the commitment to a secret of this attempt."""

    def seal(self, offer: Offer, transcript: bytes, state: bytes) -> bytes:
        """Return the attempt's secret and the state, encrypted to the offer's key alone and bound to the transcript."""


class Source:
    """See the module.

    Args:
        guard: see SourceGuard.
    """

    def __init__(self, guard: SourceGuard) -> None:
        self._guard = guard

    def propose(
        self, holding: Holding, peer: str, vtpm_id: UUID, vm_id: UUID, mode: Mode, nonce: bytes
    ) -> Step[Outgoing]:
        """Ask a destination; an attempt that has not frozen the vTPM is forgotten."""
        if holding.right is not Right.HELD:
            raise MigrationError(f"the vTPM is {holding.right.value} on this host and cannot move from it")
        proposal = Propose(vtpm_id, vm_id, holding.epoch, mode, nonce)
        return Step(holding, Asking(peer, proposal), (Send(peer, proposal),))

    def freeze(self, holding: Holding, session: Outgoing | None, state: bytes) -> Step[Outgoing]:
        """Freeze the vTPM and send its state, which is whole and changes no more: it is stopped, or its guest is."""
        if holding.right is not Right.HELD:
            raise MigrationError(f"the vTPM is {holding.right.value} on this host and has no state to give")
        if not isinstance(session, Asking) or session.offer is None or session.proof is None:
            raise MigrationError("no destination has proven itself: the state stays here")
        offer = session.offer
        sealed = self._guard.seal(offer, transcript_digest(session.proposal, offer, session.proof), state)
        frozen = dataclasses.replace(
            holding,
            right=Right.FROZEN,
            migration_id=offer.migration_id,
            peer=session.peer,
            digest=state_digest(sealed),
            mode=session.proposal.mode,
        )
        return Step(frozen, Waiting(), (Send(session.peer, State(offer.migration_id, sealed)),))

    def arrived(self, holding: Holding, session: Outgoing | None) -> Step[Outgoing]:
        """Note that the source's QEMU has completed and the destination's is paused; again after a crash."""
        if holding.right is not Right.FROZEN or holding.mode is not Mode.DRIVEN:
            raise MigrationError("no migration that is driven from here is under way")
        waiting = dataclasses.replace(_waiting(session), arrived=True)
        if waiting.stored:
            return _commit(holding)
        return Step(holding, waiting, (Send(holding.peer, Ask(holding.migration_id)),))

    def abort(self, holding: Holding) -> Step[Outgoing]:
        """End the attempt without a move; the vTPM may run here again, under an epoch that nobody else can have."""
        if holding.right is Right.MOVED:
            raise MigrationError(f"the vTPM has moved to {holding.peer}: that cannot be taken back")
        if holding.right is not Right.FROZEN:
            return Step(holding, None)
        kept = Holding(Right.HELD, holding.epoch + 2, adopted=holding.adopted)
        return Step(kept, None, (Send(holding.peer, Aborted(holding.migration_id)),))

    def remind(self, holding: Holding, session: Outgoing | None) -> Step[Outgoing]:
        """Say again what the destination may have missed; after a restart, and from time to time."""
        if holding.right is Right.FROZEN:
            return Step(holding, session, (Send(holding.peer, Ask(holding.migration_id)),))
        if holding.right is Right.MOVED and holding.migration_id:
            return Step(holding, None, (Send(holding.peer, Release(holding.migration_id)),))
        return Step(holding, session)

    def receive(
        self, holding: Holding, session: Outgoing | None, peer: str, message: FromDestination
    ) -> Step[Outgoing]:
        """Take a message of a destination.

        Args:
            peer: whom the transport has authenticated.
        Raises:
            MigrationError: it does not fit. AttestationError: of the guard.
        """
        match message:
            case Offer():
                return self._offered(holding, session, peer, message)
            case Decline():
                return _declined(holding, session, peer, message)
            case Stored():
                return _stored(holding, session, peer, message.migration_id, message.digest, wanted=False)
            case Query():
                return _queried(holding, session, peer, message)
            case Refuse():
                return self._refused(holding, session, peer, message)
            case Activated():
                return _activated(holding, session, peer, message)

    def _offered(self, holding: Holding, session: Outgoing | None, peer: str, offer: Offer) -> Step[Outgoing]:
        if holding.right is not Right.HELD or not isinstance(session, Asking) or session.peer != peer:
            raise MigrationError(f"{peer} was not asked for an offer")
        if offer.proposal != proposal_digest(session.proposal):
            raise MigrationError(f"the offer of {peer} answers another proposal")
        if session.offer is not None:
            raise MigrationError(f"{peer} has made its offer already")
        self._guard.examine(peer, session.proposal, offer)
        proof = self._guard.prove(session.proposal, offer)
        return Step(holding, dataclasses.replace(session, offer=offer, proof=proof), (Send(peer, proof),))

    def _refused(self, holding: Holding, session: Outgoing | None, peer: str, refusal: Refuse) -> Step[Outgoing]:
        if holding.right is Right.FROZEN and holding.is_of(peer, refusal.migration_id):
            return self.abort(holding)
        if _has_offer(session, peer, refusal.migration_id):
            return Step(holding, None)
        raise MigrationError(f"{peer} refuses an attempt that is not under way")


def _declined(holding: Holding, session: Outgoing | None, peer: str, message: Decline) -> Step[Outgoing]:
    if (
        not isinstance(session, Asking)
        or session.peer != peer
        or session.offer is not None
        or message.proposal != proposal_digest(session.proposal)
    ):
        raise MigrationError(f"{peer} declines what it was not asked")
    return Step(holding, None)


def _activated(holding: Holding, session: Outgoing | None, peer: str, message: Activated) -> Step[Outgoing]:
    """Note that the move is over: a destination that asks for its release once more is one of the past.

    Where this host has not released it yet, an operator has said there that this host is lost.
    """
    if holding.right is Right.FROZEN and holding.is_of(peer, message.migration_id):
        holding = _released(holding)
    if holding.right is Right.MOVED and holding.is_of(peer, message.migration_id):
        return Step(dataclasses.replace(holding, migration_id=b""), None)
    return Step(holding, session)


def _queried(holding: Holding, session: Outgoing | None, peer: str, query: Query) -> Step[Outgoing]:
    migration_id = query.migration_id
    if holding.migration_id == migration_id and holding.right in (Right.FROZEN, Right.MOVED):
        return _stored(holding, session, peer, migration_id, query.digest, wanted=query.wanted)
    if isinstance(session, Asking) and session.offer is not None and session.offer.migration_id == migration_id:
        raise MigrationError(f"{peer} asks after an attempt whose state it cannot have yet")
    if holding == NOWHERE:
        raise MigrationError(f"{peer} asks after a vTPM that this host knows nothing of")
    # Neither frozen nor to be released, and its offer is forgotten: this attempt can do neither any more.
    return Step(holding, session, (Send(peer, Aborted(migration_id)),))


def _stored(
    holding: Holding, session: Outgoing | None, peer: str, migration_id: bytes, digest: bytes, *, wanted: bool
) -> Step[Outgoing]:
    if not holding.is_of(peer, migration_id):
        raise MigrationError(f"{peer} has the state of an attempt that is not under way with it")
    if holding.right is Right.MOVED:
        return Step(holding, None, (Send(peer, Release(migration_id)),))
    if holding.right is not Right.FROZEN:
        raise MigrationError(f"{peer} has the state of an attempt that is over")
    if digest != holding.digest:
        raise MigrationError(f"{peer} has stored another state than was sent")
    waiting = dataclasses.replace(_waiting(session), stored=True)
    match holding.mode:
        case Mode.STOPPED:
            return _commit(holding)
        case Mode.DRIVEN if waiting.arrived:
            return _commit(holding)
        case Mode.FOREIGN if wanted:
            return _commit(holding)
    return Step(holding, waiting)


def _commit(holding: Holding) -> Step[Outgoing]:
    """The commit: from here on this host never runs the vTPM under this right again."""
    return Step(_released(holding), None, (Send(holding.peer, Release(holding.migration_id)),))


def _released(holding: Holding) -> Holding:
    return dataclasses.replace(holding, right=Right.MOVED, epoch=holding.epoch + 1, digest=b"")


def _waiting(session: Outgoing | None) -> Waiting:
    return session if isinstance(session, Waiting) else Waiting()


def _has_offer(session: Outgoing | None, peer: str, migration_id: bytes) -> bool:
    return (
        isinstance(session, Asking)
        and session.peer == peer
        and session.offer is not None
        and session.offer.migration_id == migration_id
    )
