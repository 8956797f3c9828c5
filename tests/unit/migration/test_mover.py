"""One vTPM between two hosts with real stores: what each change leaves, and what a crash at any point ends in."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.unit.vault.world import ENGINE, MAC_KEY, MemoryKeeper, new_record
from vtpm.errors import AttestationError, ConflictError, StateError, StoreError, UsageError, VtpmError
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind
from vtpm.migration.guards import channel_digest, offer_extra
from vtpm.migration.mover import MAX_INCOMING, NO_VM, Channel, Mover, Place
from vtpm.migration.payload import Payload
from vtpm.migration.steps import MigrationError, Send
from vtpm.migration.transcript import proposal_digest
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault.contents import Contents, begin, open_all
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.vault.records import DomainKind, SaveAck, SaveRequest, VtpmRecord
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store
from vtpm.wire import migration as wire

T = TypeVar("T")
STATES = {StateKind.PERMANENT: b"a whole TPM", StateKind.VOLATILE: b"its PCRs"}
TLS = {"a": b"TLS key of a", "b": b"TLS key of b"}


class Crash(Exception):
    """The host has lost its power."""


class Attester:
    """A perfect TPM: evidence is over what it is over, and says whose it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.believes = True

    def evidence(self, extra: bytes) -> bytes:
        return self.name.encode() + b" quotes " + extra

    def verify(self, evidence: bytes, extra: bytes) -> CertifiedPlatform:
        name, _, over = evidence.partition(b" quotes ")
        if over != extra or not self.believes:
            raise AttestationError("not believed")
        return CertifiedPlatform(name.decode(), PlatformKind.HARDWARE, 1)


class Host:
    """A host without processes: store, keys and mover; and its ground."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.other = "b" if name == "a" else "a"
        self.channel = Channel(TLS[name], TLS[self.other])
        self.attester = Attester(name)
        self.keeper = MemoryKeeper()
        self.keys: dict[bytes, bytes] = {}
        self.crash_in = 0
        self.changes = 0
        self.waiting: InstanceId | None = None
        self._one_at_a_time = threading.RLock()
        self._folder = folder / name
        self._store = SqliteStore(self._folder, MAC_KEY, self.keeper)
        self.mover = Mover(self, self.attester)

    def restart(self) -> None:
        """Lose all that is not durable."""
        self._store.close()
        self._store = SqliteStore(self._folder, MAC_KEY, self.keeper)
        self.keeper.value = self._store.value
        self.mover = Mover(self, self.attester)
        self.crash_in = 0

    def close(self) -> None:
        with self._one_at_a_time:
            self._store.close()

    def store(self, operation: Callable[[Store], T]) -> T:
        with self._one_at_a_time:
            return self._do(operation)

    def _do(self, operation: Callable[[Store], T]) -> T:
        before = self._store.value
        self._store.set_ancestors(self.keeper.value, self.keeper.value)
        done = operation(self._store)
        if self._store.value != before:
            self.changes += 1
            if self.crash_in and self.crash_in == self.changes * 2 - 1:
                # Durable, and not anchored: the next opening anchors it.
                raise Crash
            self.keeper.value = self._store.value
            if self.crash_in and self.crash_in == self.changes * 2:
                raise Crash
        return done

    def key(self, record: VtpmRecord) -> Secret:
        assert record.wrapped_key is not None
        return Secret(self.keys[record.wrapped_key])

    def new_key(self, vtpm_id: VtpmId) -> tuple[bytes, Secret]:
        wrapped = secrets.token_bytes(40)
        self.keys[wrapped] = secrets.token_bytes(32)
        return wrapped, Secret(self.keys[wrapped])

    def place(self, payload: Payload, mode: wire.Mode) -> Place:
        domain = DomainKind.of("process" if self.name == "a" else "qemu", payload.kind.make)
        return Place(domain, (1000, 1001), self.waiting, ENGINE if self.waiting else 0)

    # -- what tests ask ----------------------------------------------------------------------------------------------
    def manufactured(self) -> VtpmRecord:
        wrapped, key = self.new_key(VtpmId(NO_VM))
        record, states = begin(dataclasses.replace(new_record(), wrapped_key=wrapped), key, Contents(STATES, ENGINE))
        kept = [state for state in states if state.kind is StateKind.PERMANENT]
        self.store(lambda store: store.create_vtpm(record, kept))
        return record

    def record(self, vtpm_id: VtpmId) -> VtpmRecord:
        return self.store(lambda store: store.get_vtpm(vtpm_id))

    def usable(self, vtpm_id: VtpmId) -> bool:
        """Whether an instance can run here, with all that was saved."""
        if self.mover.holding(vtpm_id).right is not Right.HELD:
            return False
        record = self.record(vtpm_id)
        saved = self.store(lambda store: store.read_state(vtpm_id))
        assert open_all(self.key(record), record, saved, tuple(StateKind)).states == {
            StateKind.PERMANENT: STATES[StateKind.PERMANENT]
        }
        instance = InstanceId(NO_VM)
        self.store(lambda store: store.bind_instance(vtpm_id, instance))
        self.store(lambda store: store.unbind_instance(vtpm_id, instance))
        return True

    def kinds(self) -> list[str]:
        return [event.kind for event in self.store(lambda store: store.list_events())]


class Pair:
    """Two hosts with a network that delivers, and what is said between them."""

    def __init__(self, folder: Path) -> None:
        self.hosts = {name: Host(folder, name) for name in "ab"}
        self.said: list[str] = []

    def say(self, speaker: Host, vtpm_id: VtpmId, sends: Sequence[Send]) -> str:
        """Deliver messages and their answers until nobody has more to say; returns why a host refused."""
        waiting, reason = deque((speaker, send) for send in sends), ""
        while waiting:
            sender, send = waiting.popleft()
            self.said.append(type(send.message).__name__)
            if isinstance(send.message, wire.Decline | wire.Refuse):
                reason = send.message.reason
            to = self.hosts[send.peer]
            assert to is not sender
            # As it goes over the wire.
            way = (
                wire.Direction.TO_DESTINATION if isinstance(send.message, wire.FromSource) else wire.Direction.TO_SOURCE
            )
            message = wire.decode_message(wire.encode_message(send.message), way)
            waiting += [(to, answer) for answer in to.mover.receive(vtpm_id, sender.name, message, to.channel)]
        return reason

    def prove(self, source: Host, record: VtpmRecord) -> str:
        sends = source.mover.propose(record, source.other, wire.Mode.STOPPED, source.channel)
        return self.say(source, record.id, sends)

    def move(self, source: Host, record: VtpmRecord) -> None:
        self.prove(source, record)
        self.say(source, record.id, source.mover.freeze(record, 0))

    def leave_undecided(self, record: VtpmRecord) -> None:
        """Have it frozen at a, and inert at b, whose word that it is stored is lost."""
        a, b = self.hosts.values()
        self.prove(a, record)
        (state,) = a.mover.freeze(record, 0)
        b.mover.receive(record.id, "a", state.message, b.channel)

    def depart(self, mode: wire.Mode, instance: InstanceId | None = None) -> tuple[VtpmRecord, wire.State]:
        """Freeze a vTPM of a, under its guest, for b; returns what goes with the guest."""
        a = self.hosts["a"]
        record = a.manufactured()
        if instance is not None:
            a.store(lambda store: store.bind_instance(record.id, instance))
            a.store(lambda store: store.set_lifecycle(record.id, "running"))
        self.say(a, record.id, a.mover.propose(record, "b", mode, a.channel))
        (send,) = a.mover.freeze(record, 0, STATES[StateKind.VOLATILE])
        assert isinstance(send.message, wire.State)
        return record, send.message

    def settle(self, vtpm_id: VtpmId) -> None:
        """What both hosts do by themselves once they are back."""
        for _ in range(2):
            for host in self.hosts.values():
                self.say(host, vtpm_id, host.mover.remind(vtpm_id))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for host in made.hosts.values():
        host.close()


def test_vtpm_is_at_the_other_host_with_all_its_state_and_its_own_key_when_it_moved(pair: Pair) -> None:
    a, b = pair.hosts.values()
    before = a.manufactured()
    pair.move(a, before)
    assert pair.said == ["Propose", "Offer", "Prove", "State", "Stored", "Release", "Activated"]
    after = b.record(before.id)
    assert (after.name, after.vm_uuid, after.owner_uid) == (before.name, before.vm_uuid, before.owner_uid)
    assert (after.epoch, after.domain, after.lifecycle) == (2, DomainKind.QEMU, "stopped")
    assert after.wrapped_key not in a.keys
    assert a.mover.holding(before.id) == Holding(Right.MOVED, 2, b"", "b")
    assert [host.usable(before.id) for host in (a, b)] == [False, True]
    assert a.kinds() == ["leaving", "moved", "move_finished"]
    assert b.kinds() == ["arriving", "arrived"]


def test_vtpm_comes_back_and_goes_again_and_what_was_captured_is_useless(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    captured: list[Send] = []
    pair.prove(a, record)
    captured += a.mover.freeze(record, 0)
    pair.say(a, record.id, captured)
    captured += [Send("b", wire.Release(b.mover.holding(record.id).migration_id))]
    pair.move(b, b.record(record.id))
    assert [host.usable(record.id) for host in (a, b)] == [True, False]
    for send in captured:
        try:
            answers = b.mover.receive(record.id, "a", send.message, b.channel)
        except VtpmError:
            continue
        for answer in answers:
            assert a.mover.receive(record.id, "b", answer.message, a.channel) == []
    assert [host.usable(record.id) for host in (a, b)] == [True, False]
    pair.move(a, a.record(record.id))
    assert b.record(record.id).epoch == 4
    assert [host.usable(record.id) for host in (a, b)] == [False, True]


def test_nothing_leaves_when_the_destination_is_not_believed(pair: Pair) -> None:
    a, _ = pair.hosts.values()
    record = a.manufactured()
    a.attester.believes = False
    with pytest.raises(AttestationError):
        pair.prove(a, record)
    assert not a.mover.has_proof(record.id)
    with pytest.raises(MigrationError, match="no destination has proven itself"):
        a.mover.freeze(record, 0)
    assert a.usable(record.id)


def test_nothing_is_taken_in_when_the_source_is_not_believed(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    b.attester.believes = False
    with pytest.raises(AttestationError):
        pair.prove(a, record)
    assert a.usable(record.id)
    assert b.kinds() == []


def test_source_goes_on_when_the_destination_does_not_take_the_state(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    # Somebody has its name there.
    b.store(lambda store: store.create_vtpm(new_record()))
    pair.prove(a, record)
    sends = a.mover.freeze(record, 0)
    with pytest.raises(ConflictError, match="exists already"):
        pair.say(a, record.id, sends)
    assert a.mover.holding(record.id).right is Right.FROZEN
    pair.settle(record.id)
    assert a.record(record.id).epoch == 3
    assert [a.usable(record.id), b.mover.holding(record.id).right] == [True, Right.ABSENT]


def test_vtpm_is_declined_when_it_is_there_already(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    b.store(lambda store: store.create_vtpm(dataclasses.replace(new_record("other"), id=record.id)))
    assert "held on this host already" in pair.prove(a, record)
    assert not a.mover.has_proof(record.id)


def test_vtpm_that_was_never_started_does_not_move(pair: Pair) -> None:
    a, _ = pair.hosts.values()
    record = dataclasses.replace(new_record(), wrapped_key=a.new_key(VtpmId(NO_VM))[0])
    a.store(lambda store: store.create_vtpm(record))
    pair.prove(a, record)
    with pytest.raises(StateError, match="never started"):
        a.mover.freeze(record, 0)


def test_move_is_aborted_at_its_source_alone_and_never_once_it_has_moved(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    pair.prove(a, record)
    (state,) = a.mover.freeze(record, 7)
    b.mover.receive(record.id, "a", state.message, b.channel)
    with pytest.raises(MigrationError, match="only its source"):
        b.mover.abort(record.id, 7)
    pair.say(a, record.id, a.mover.abort(record.id, 7))
    assert (a.usable(record.id), b.mover.holding(record.id)) == (True, Holding(Right.ABSENT, 2))
    assert (a.kinds(), b.kinds()) == (["leaving", "move_aborted"], ["arriving", "arrival_discarded"])
    pair.move(a, a.record(record.id))
    with pytest.raises(MigrationError, match="cannot be taken back"):
        a.mover.abort(record.id, 7)
    assert b.usable(record.id)


def test_adopted_vtpm_runs_and_its_source_lets_go_when_it_comes_back(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    pair.leave_undecided(record)
    b.mover.adopt(record.id, 7)
    assert b.usable(record.id)
    (*_, event) = b.store(lambda store: store.list_events())
    assert (event.kind, event.actor_uid) == ("adopted", 7)
    a.restart()
    pair.say(a, record.id, a.mover.remind(record.id))
    assert a.mover.holding(record.id) == Holding(Right.MOVED, 2, b"", "b")
    assert [host.usable(record.id) for host in (a, b)] == [False, True]


@pytest.mark.parametrize("instance", [InstanceId(new_record().id), None])
def test_running_vtpm_goes_over_with_its_volatile_state_once_its_guest_has_arrived(
    pair: Pair, instance: InstanceId | None
) -> None:
    a, b = pair.hosts.values()
    b.waiting = instance
    record, state = pair.depart(wire.Mode.DRIVEN)
    with pytest.raises(MigrationError, match="not inert here"):
        b.mover.inert_states(record.id)
    # The state goes with the guest, and the answer by the managers' own way.
    assert b.mover.arrive(record.id, state) == STATES
    # Its instance may ask again, when the answer was lost.
    assert b.mover.arrive(record.id, state) == STATES
    inert = b.record(record.id)
    assert (inert.lifecycle, inert.instance_id, inert.owner_uid, inert.owner_gid) == ("inert", instance, 1000, 1001)
    assert [host.mover.holding(record.id).right for host in (a, b)] == [Right.FROZEN, Right.INERT]
    pair.say(a, record.id, a.mover.arrived(record.id))
    assert [host.mover.holding(record.id).right for host in (a, b)] == [Right.MOVED, Right.HELD]
    with pytest.raises(MigrationError, match="not inert here"):
        b.mover.inert_states(record.id)
    held = b.record(record.id)
    assert (held.lifecycle, held.instance_id) == ("stopped" if instance is None else "running", instance)
    kinds = [saved.kind for saved in b.store(lambda store: store.read_state(record.id))]
    assert kinds == [StateKind.PERMANENT], "its PCRs would be had twice"
    assert held.state_version > inert.state_version


def test_instance_that_waited_saves_when_its_vtpm_is_held_and_not_before(pair: Pair) -> None:
    _, b = pair.hosts.values()
    b.waiting = InstanceId(new_record().id)
    record, state = pair.depart(wire.Mode.FOREIGN)
    b.mover.arrive(record.id, state)

    def save(version: int) -> object:
        epoch = b.record(record.id).epoch
        request = SaveRequest(
            record.id, b.waiting, 1, bytes(32), StateKind.PERMANENT, epoch, version, secrets.token_bytes(99), None
        )
        (outcome,) = b.store(lambda store: store.commit_saves([request]))
        return outcome

    assert isinstance(save(10), ConflictError)
    pair.say(b, record.id, b.mover.remind(record.id, wanted=True))
    assert isinstance(save(11), SaveAck)


def test_running_vtpm_goes_on_at_its_source_when_the_attempt_is_aborted(pair: Pair) -> None:
    a, b = pair.hosts.values()
    instance = InstanceId(new_record().id)
    record, state = pair.depart(wire.Mode.FOREIGN, instance)
    assert a.record(record.id).lifecycle == "frozen"
    a.mover.abort(record.id, 0)
    back = a.record(record.id)
    assert (back.lifecycle, back.instance_id, back.epoch) == ("running", instance, record.epoch + 2)
    b.mover.arrive(record.id, state)
    pair.settle(record.id)
    assert b.mover.holding(record.id).right is Right.ABSENT


def test_what_comes_with_a_guest_is_refused_when_it_was_not_to_or_is_of_no_attempt(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    pair.prove(a, record)
    (send,) = a.mover.freeze(record, 0)
    assert isinstance(send.message, wire.State)
    with pytest.raises(MigrationError, match="without its guest"):
        b.mover.arrive(record.id, send.message)
    b.restart()
    with pytest.raises(MigrationError, match="not begun here"):
        b.mover.arrive(record.id, send.message)
    assert b.mover.holding(record.id) == NOWHERE


def test_state_is_refused_when_a_byte_of_it_was_changed_on_its_way_with_the_guest(pair: Pair) -> None:
    _, b = pair.hosts.values()
    record, state = pair.depart(wire.Mode.FOREIGN)
    changed = bytearray(state.sealed)
    changed[-1] ^= 1
    with pytest.raises(StateError):
        b.mover.arrive(record.id, wire.State(state.migration_id, bytes(changed)))
    assert b.mover.holding(record.id) == NOWHERE


@pytest.mark.parametrize("crashed", ["a", "b"])
@pytest.mark.parametrize("at", range(1, 9))
def test_exactly_one_host_can_run_it_when_one_crashed_before_or_after_any_anchor(
    pair: Pair, crashed: str, at: int
) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    for host in (a, b):
        host.changes = 0
    victim = pair.hosts[crashed]
    victim.crash_in = at
    try:
        pair.move(a, record)
    except Crash:
        victim.restart()
        rights = {host.mover.holding(record.id).right for host in (a, b)}
        assert rights != {Right.HELD}
        pair.settle(record.id)
    else:
        # Each of the two makes fewer changes than that.
        assert at > 2 * victim.changes
        victim.crash_in = 0
    assert sorted(host.usable(record.id) for host in (a, b)) == [False, True]


def test_what_came_is_refused_when_it_is_not_what_was_proposed(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    proposed = dataclasses.replace(record, vm_uuid=None)
    pair.prove(a, proposed)
    with pytest.raises(ConflictError, match="another VM"):
        pair.say(a, record.id, a.mover.freeze(record, 0))
    pair.settle(record.id)
    pair.prove(a, a.record(record.id))
    old = dataclasses.replace(record, epoch=1)
    with pytest.raises(StateError, match="of epoch 1 came as"):
        pair.say(a, record.id, a.mover.freeze(old, 0))
    pair.settle(record.id)
    assert [host.usable(record.id) for host in (a, b)] == [True, False]
    propose = wire.Propose(new_record().id, NO_VM, 1, wire.Mode.STOPPED, bytes(32))
    with pytest.raises(UsageError, match="under the name of"):
        b.mover.receive(record.id, "a", propose, b.channel)


def test_oldest_attempt_is_forgotten_when_a_peer_begins_very_many(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    pair.prove(a, record)
    for _ in range(MAX_INCOMING):
        other = new_record().id
        b.mover.receive(other, "a", wire.Propose(other, NO_VM, 1, wire.Mode.STOPPED, bytes(32)), b.channel)
    sends = a.mover.freeze(record, 0)
    with pytest.raises(MigrationError, match="not begun here, or is forgotten"):
        pair.say(a, record.id, sends)
    pair.settle(record.id)
    assert a.usable(record.id)


def test_nothing_is_sent_when_the_store_fails(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = pair.hosts.values()
    record = a.manufactured()
    pair.prove(a, record)

    def fails(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(SqliteStore, "record_move", fails)
    with pytest.raises(StoreError):
        a.mover.freeze(record, 0)
    monkeypatch.undo()
    assert a.usable(record.id)


def test_source_that_was_thought_lost_lets_go_though_its_vtpm_has_gone_on_from_where_it_was_adopted(
    pair: Pair,
) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    pair.leave_undecided(record)
    b.mover.adopt(record.id, 7)
    # It is to go on to another host, and the attempt is aborted: nothing of the first one is in the holding any more.
    sends = b.mover.propose(b.record(record.id), "c", wire.Mode.STOPPED, b.channel)
    (propose,) = (send.message for send in sends)
    assert isinstance(propose, wire.Propose)
    key = b"\x01" + bytes(range(32))
    extra = offer_extra(channel_digest(b.channel.own, b.channel.peer), propose, bytes(16), bytes(32), key)
    offer = wire.Offer(bytes(16), proposal_digest(propose), bytes(32), key, b"c quotes " + extra)
    b.mover.receive(record.id, "c", offer, b.channel)
    b.mover.freeze(b.record(record.id), 0)
    b.mover.abort(record.id, 0)
    assert b.mover.holding(record.id).epoch == 4
    a.restart()
    pair.say(a, record.id, a.mover.remind(record.id))
    assert a.mover.holding(record.id) == Holding(Right.MOVED, 2, b"", "b")
    assert [host.usable(record.id) for host in (a, b)] == [False, True]


def test_arrival_is_destroyed_when_an_operator_discards_it_and_its_source_takes_it_back(pair: Pair) -> None:
    a, b = pair.hosts.values()
    record = a.manufactured()
    pair.leave_undecided(record)
    b.mover.discard(record.id, 7)
    assert b.store(lambda store: store.list_vtpms()) == []
    pair.settle(record.id)
    assert a.usable(record.id)
    assert a.record(record.id).epoch == 3
