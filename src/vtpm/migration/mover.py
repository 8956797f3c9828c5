"""One host's part in migrations: the machines of both sides with this host's store, keys and evidence.

Blocks, for stores and TPMs take their time; the caller serialises the calls for one vTPM, and carries what they return
to the peers. What a call returns follows from what is durable and anchored by then.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, TypeVar
from uuid import UUID

from vtpm.errors import ConflictError, StateError, UsageError
from vtpm.migration.destination import Destination, Incoming
from vtpm.migration.guards import Attester, Guard, channel_digest
from vtpm.migration.payload import Payload, pack, unpack
from vtpm.migration.source import Asking, Outgoing, Source
from vtpm.migration.steps import MigrationError, Send, Step, carry_out
from vtpm.secret import Secret
from vtpm.tpm.types import MAX_SEALED_BYTES, InstanceId, StateKind, VtpmId
from vtpm.vault.contents import Contents, begin, open_all
from vtpm.vault.holding import Holding, Right
from vtpm.vault.records import DomainKind, Event, SavedState, VtpmRecord
from vtpm.vault.rules import INERT
from vtpm.vault.store import Store
from vtpm.wire.migration import (
    ID_BYTES,
    NONCE_BYTES,
    FromSource,
    MigrationMessage,
    Mode,
    Propose,
    State,
    encode_message,
)

MAX_INCOMING = 256
"""Attempts of one peer that are remembered before their state has come; its oldest is forgotten, and begins anew."""
NO_VM = UUID(int=0)
"""Stands for the VM of a vTPM that is bound to none."""
S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Channel:
    """Who is at both ends of a conversation: TLS public keys, SubjectPublicKeyInfo in DER."""

    own: bytes
    peer: bytes


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a vTPM that arrives is to live.

    Args:
        owner: uid and gid; None: as it had.
        instance_id, engine_version: of the instance that is to go on with it, as its guest arrives; None, 0: there is
            none.
    """

    domain: DomainKind
    owner: tuple[int, int] | None = None
    instance_id: InstanceId | None = None
    engine_version: int = 0


class Ground(Protocol):
    """What a mover stands on. All of it blocks."""

    def store(self, operation: Callable[[Store], T]) -> T:
        """Have the store do something, anchored when it must be."""

    def key(self, record: VtpmRecord) -> Secret:
        """Return a vTPM's own key. Raises as KeeperClient.unwrap_key."""

    def new_key(self, vtpm_id: VtpmId) -> tuple[bytes, Secret]:
        """Make a key for a vTPM; returns it wrapped, and as it is."""

    def place(self, payload: Payload, mode: Mode) -> Place:
        """Return where a vTPM that arrives is to live. Raises VtpmError: this host has no such place."""


_NO_CHANNEL = Channel(b"", b"")
"""Of a state: it is bound to the channel of its attempt by what it is sealed to."""


class Mover:
    """See the module.

    Args:
        ground: see Ground.
        attester: makes this platform's evidence, and verifies the peers'.
    """

    def __init__(self, ground: Ground, attester: Attester) -> None:
        self._ground = ground
        self._attester = attester
        self._leaving: dict[VtpmId, tuple[Outgoing | None, Source]] = {}
        self._arriving: dict[VtpmId, tuple[Incoming | None, Destination]] = {}

    # -- what operators ask ------------------------------------------------------------------------------------------
    def propose(self, record: VtpmRecord, peer: str, mode: Mode, channel: Channel) -> Sequence[Send]:
        """Ask a peer to take a vTPM. Raises MigrationError: it is not this host's to give."""
        source = Source(Guard(self._attester, channel_digest(channel.own, channel.peer)))
        holding = self.holding(record.id)
        nonce = secrets.token_bytes(NONCE_BYTES)
        step = source.propose(holding, peer, record.id, record.vm_uuid or NO_VM, mode, nonce)
        return self._leave(record.id, source, holding, step, None)

    def has_proof(self, vtpm_id: VtpmId) -> bool:
        """Whether the destination that was asked has proven itself, so that the vTPM can be frozen."""
        session = self._leaving.get(vtpm_id, (None, None))[0]
        return isinstance(session, Asking) and session.proof is not None

    def freeze(self, record: VtpmRecord, actor_uid: int | None, passing: bytes | None = None) -> Sequence[Send]:
        """Freeze a vTPM that stands still, and send its state.

        Args:
            passing: volatile state of one that runs, whose guest is paused and whose answered saves are all durable.
        Raises:
            MigrationError: nobody has proven himself, or it is not this host's to give.
        """
        saved = self._ground.store(lambda store: store.read_state(record.id))
        key = self._ground.key(record)
        try:
            payload = pack(key, record, saved, datetime.now(UTC), passing)
        finally:
            key.wipe()
        session, source = self._source(record.id)
        holding = self.holding(record.id)
        step = source.freeze(holding, session, payload)
        for send in step.sends:
            # Nothing is frozen that cannot be sent.
            size = len(encode_message(send.message))
            if passing is not None and size > MAX_SEALED_BYTES:
                raise StateError(f"the state of vTPM {record.name} has {size} bytes; a guest takes {MAX_SEALED_BYTES}")
        return self._leave(record.id, source, holding, step, actor_uid)

    def arrived(self, vtpm_id: VtpmId) -> Sequence[Send]:
        """Note that the guest is at the destination, paused. Raises MigrationError: no move is driven from here."""
        holding = self.holding(vtpm_id)
        session, source = self._source(vtpm_id)
        return self._leave(vtpm_id, source, holding, source.arrived(holding, session), None)

    def inert_states(self, vtpm_id: VtpmId) -> Mapping[StateKind, bytes]:
        """Return the plain states of an inert vTPM, to load and not to run. Raises MigrationError: it is not inert."""
        if self.holding(vtpm_id).right is not Right.INERT:
            raise MigrationError("the vTPM is not inert here: nothing of it is loaded before its time")
        record, saved = self._ground.store(lambda store: (store.get_vtpm(vtpm_id), store.read_state(vtpm_id)))
        key = self._ground.key(record)
        try:
            return open_all(key, record, saved, tuple(StateKind)).states
        finally:
            key.wipe()

    def abort(self, vtpm_id: VtpmId, actor_uid: int | None) -> Sequence[Send]:
        """End an attempt at its source. Raises MigrationError: it has moved, or is not this host's to give."""
        holding = self.holding(vtpm_id)
        if holding.right in (Right.INERT, Right.ABSENT):
            raise MigrationError(f"the vTPM is {holding.right.value} here: only its source can abort the move")
        _, source = self._source(vtpm_id)
        return self._leave(vtpm_id, source, holding, source.abort(holding), actor_uid)

    def adopt(self, vtpm_id: VtpmId, actor_uid: int | None) -> None:
        """Take an inert vTPM for this host's own. Raises MigrationError: it is not inert."""
        holding = self.holding(vtpm_id)
        _, destination = self._destination(vtpm_id)
        self._arrive(vtpm_id, destination, holding, destination.adopt(holding), actor_uid, adopted=True)

    def discard(self, vtpm_id: VtpmId, actor_uid: int | None) -> None:
        """Destroy what is inert here. Raises MigrationError: it is not inert."""
        holding = self.holding(vtpm_id)
        _, destination = self._destination(vtpm_id)
        self._arrive(vtpm_id, destination, holding, destination.discard(holding), actor_uid)

    def remind(self, vtpm_id: VtpmId, *, wanted: bool = False) -> Sequence[Send]:
        """Return what is to be said again of an attempt that is not over."""
        holding = self.holding(vtpm_id)
        if holding.right is Right.INERT:
            incoming, destination = self._destination(vtpm_id)
            return destination.remind(holding, incoming, wanted=wanted).sends
        outgoing, source = self._source(vtpm_id)
        return source.remind(holding, outgoing).sends

    def forget(self, vtpm_id: VtpmId) -> None:
        """Forget what was said at the source of an attempt that has not frozen anything."""
        self._leaving.pop(vtpm_id, None)

    def holding(self, vtpm_id: VtpmId) -> Holding:
        """Return what this host holds of a vTPM."""
        return self._ground.store(lambda store: store.holding(vtpm_id)).holding

    # -- what peers say ----------------------------------------------------------------------------------------------
    def receive(self, vtpm_id: VtpmId, peer: str, message: MigrationMessage, channel: Channel) -> Sequence[Send]:
        """Take a message of a peer, as the transport has authenticated it.

        Raises:
            MigrationError: it does not fit what this host holds. AttestationError: the peer's evidence is not believed.
            StateError: what came is damaged or foreign. UsageError: it is about another vTPM than it says.
        """
        if isinstance(message, State):
            self._check_no_guest(vtpm_id, peer)
        if isinstance(message, FromSource):
            return self._from_source(vtpm_id, peer, message, channel)
        session, source = self._source(vtpm_id)
        holding = self.holding(vtpm_id)
        return self._leave(vtpm_id, source, holding, source.receive(holding, session, peer, message), None)

    def _from_source(self, vtpm_id: VtpmId, peer: str, message: FromSource, channel: Channel) -> Sequence[Send]:
        if isinstance(message, Propose) and message.vtpm_id != vtpm_id:
            raise UsageError(f"{peer} proposes vTPM {message.vtpm_id} under the name of {vtpm_id}")
        session, destination = self._destination(vtpm_id)
        if isinstance(message, Propose) and (session is None or session.proposal != message):
            destination = Destination(Guard(self._attester, channel_digest(channel.peer, channel.own)))
        holding = self.holding(vtpm_id)
        fresh = secrets.token_bytes(ID_BYTES + NONCE_BYTES)
        step = destination.receive(holding, session, peer, message, fresh)
        vm_id = session.proposal.vm_id if session is not None else None
        return self._arrive(vtpm_id, destination, holding, step, None, vm_id=vm_id)

    def arrive(self, vtpm_id: VtpmId, state: State) -> Mapping[StateKind, bytes]:
        """Take in what came with a guest, by whoever's hands, and return the plain states, to load and not to run.

        It opens only if the peer whose attempt it is has sealed it; that peer hears nothing of it from here.

        Raises:
            MigrationError: no attempt with a guest is under way.
            StateError: it is damaged, foreign or of another attempt.
        """
        attempt = self._attempt(vtpm_id)
        if attempt is None:
            raise MigrationError("the attempt by which the guest has come was not begun here, or is forgotten")
        peer, mode = attempt
        if mode is Mode.STOPPED:
            raise MigrationError(f"{peer} has proposed the vTPM without its guest")
        self._from_source(vtpm_id, peer, state, _NO_CHANNEL)
        return self.inert_states(vtpm_id)

    def _attempt(self, vtpm_id: VtpmId) -> tuple[str, Mode] | None:
        """Return peer and mode of the attempt by which a vTPM arrives here; None: of none."""
        holding = self.holding(vtpm_id)
        if holding.right is Right.INERT:
            return holding.peer, holding.mode
        incoming, _ = self._destination(vtpm_id)
        return None if incoming is None else (incoming.peer, incoming.proposal.mode)

    def _check_no_guest(self, vtpm_id: VtpmId, peer: str) -> None:
        attempt = self._attempt(vtpm_id)
        if attempt is not None and attempt[1] is not Mode.STOPPED:
            raise MigrationError(f"{peer} sends the state of a vTPM that is to come with its guest")

    # -- how it takes effect -----------------------------------------------------------------------------------------
    def _source(self, vtpm_id: VtpmId) -> tuple[Outgoing | None, Source]:
        return self._leaving.get(vtpm_id) or (None, Source(Guard(self._attester, b"")))

    def _destination(self, vtpm_id: VtpmId) -> tuple[Incoming | None, Destination]:
        return self._arriving.get(vtpm_id) or (None, Destination(Guard(self._attester, b"")))

    def _leave(
        self, vtpm_id: VtpmId, source: Source, holding: Holding, step: Step[Outgoing], actor_uid: int | None
    ) -> Sequence[Send]:
        sends = _carried_out(holding, step, _Journal(self._ground, vtpm_id, actor_uid))
        if step.session is None:
            self._leaving.pop(vtpm_id, None)
        else:
            self._leaving[vtpm_id] = (step.session, source)
        return sends

    def _arrive(
        self,
        vtpm_id: VtpmId,
        destination: Destination,
        holding: Holding,
        step: Step[Incoming],
        actor_uid: int | None,
        *,
        vm_id: UUID | None = None,
        adopted: bool = False,
    ) -> Sequence[Send]:
        journal = _Journal(self._ground, vtpm_id, actor_uid, vm_id, adopted=adopted)
        sends = _carried_out(holding, step, journal)
        self._arriving.pop(vtpm_id, None)
        if step.session is not None:
            self._arriving[vtpm_id] = (step.session, destination)
            peers = [
                one for one, (incoming, _) in self._arriving.items() if incoming and incoming.peer == step.session.peer
            ]
            for oldest in peers[:-MAX_INCOMING]:
                del self._arriving[oldest]
        return sends


def _carried_out(holding: Holding, step: Step[S], journal: _Journal) -> Sequence[Send]:
    sends: list[Send] = []
    carry_out(holding, step, journal, sends.append)
    return sends


_KINDS = {
    (Right.HELD, Right.FROZEN): "leaving",
    (Right.FROZEN, Right.HELD): "move_aborted",
    (Right.FROZEN, Right.MOVED): "moved",
    (Right.MOVED, Right.MOVED): "move_finished",
    (Right.ABSENT, Right.INERT): "arriving",
    (Right.MOVED, Right.INERT): "arriving",
    (Right.INERT, Right.HELD): "arrived",
    (Right.INERT, Right.ABSENT): "arrival_discarded",
}
"""Kinds of audit event, by change."""


@dataclasses.dataclass(frozen=True)
class _Journal:
    """Makes holdings durable in the vault; see steps.Journal.

    Args:
        vm_id: what the proposal said of the vTPM's VM.
        adopted: whether an operator takes the place of a release.
    """

    ground: Ground
    vtpm_id: VtpmId
    actor_uid: int | None
    vm_id: UUID | None = None
    adopted: bool = False

    def record(self, before: Holding, after: Holding, state: bytes | None) -> None:
        arriving = None if state is None else self._arriving(after, state)
        name = arriving[0].name if arriving else self.ground.store(lambda store: store.holding(self.vtpm_id)).name
        event = self._event(before, after, name)
        self.ground.store(lambda store: store.record_move(self.vtpm_id, before, after, arriving=arriving, event=event))

    def _event(self, before: Holding, after: Holding, name: str) -> Event:
        detail = {"peer": before.peer or after.peer, "epoch": str(after.epoch)}
        kind = "adopted" if self.adopted else _KINDS[before.right, after.right]
        return Event(datetime.now(UTC), self.actor_uid, kind, name, self.vtpm_id, json.dumps(detail))

    def _arriving(self, after: Holding, state: bytes) -> tuple[VtpmRecord, Sequence[SavedState]]:
        payload = unpack(state)
        vtpm = payload.vtpm
        if (vtpm.vtpm_id, vtpm.epoch + 1) != (self.vtpm_id, after.epoch):
            raise StateError(f"vTPM {vtpm.vtpm_id} of epoch {vtpm.epoch} came as {self.vtpm_id} of {after.epoch - 1}")
        if (vtpm.vm_uuid or NO_VM) != self.vm_id:
            raise ConflictError(f"vTPM {vtpm.name} is bound to another VM than it was proposed with")
        place = self.ground.place(payload, after.mode)
        owner_uid, owner_gid = place.owner or (vtpm.owner_uid, vtpm.owner_gid)
        wrapped, key = self.ground.new_key(self.vtpm_id)
        record = VtpmRecord(
            id=self.vtpm_id,
            name=vtpm.name,
            owner_uid=owner_uid,
            owner_gid=owner_gid,
            vm_uuid=vtpm.vm_uuid,
            tpm_version=vtpm.tpm_version,
            domain=place.domain,
            created_at=datetime.now(UTC),
            epoch=after.epoch,
            lifecycle=INERT,
            wrapped_key=wrapped,
            state_version=vtpm.state_version,
            instance_id=place.instance_id,
            engine_version=place.engine_version,
        )
        try:
            return begin(record, key, Contents(vtpm.states, vtpm.engine_version))
        finally:
            key.wipe()
