from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path

import pytest

from tests.unit.vault.world import LIMIT_S, MAC_KEY, Bound, Gate, MemoryKeeper, manufacture, new_record
from vtpm.errors import ConflictError, NotFoundError, ProtocolError, StateError, StoreError
from vtpm.vault.anchor import AnchorPolicy
from vtpm.vault.committer import MAX_CALLS_S, Committer
from vtpm.vault.records import SaveAck, SaveEffect, SaveRequest
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import SaveOutcome, Store


class FaultyStore(SqliteStore):
    """The real store, and faults on demand before or after its own commit."""

    def __init__(self, directory: Path, keeper: MemoryKeeper) -> None:
        super().__init__(directory, MAC_KEY, keeper)
        self.groups: list[int] = []
        self.order: list[str] = []
        self.reopened = 0
        self.failures_left = 0
        self.fail_after_commit = False
        self.fail_above_bytes = 1 << 30
        self.bug: Exception | None = None

    def reopen(self) -> None:
        self.reopened += 1
        super().reopen()

    def commit_saves(self, batch: Sequence[SaveRequest]) -> Sequence[SaveOutcome]:
        self.groups.append(len(batch))
        self.order.append("saves")
        if self.bug is not None:
            raise self.bug
        too_large = any(len(save.envelope) > self.fail_above_bytes for save in batch)
        failing = too_large or self.failures_left > 0
        self.failures_left -= 1
        if failing and not self.fail_after_commit:
            raise StoreError("fault before the commit")
        outcomes = super().commit_saves(batch)
        if failing:
            raise StoreError("fault after the commit")
        return outcomes


@pytest.fixture
def keeper() -> MemoryKeeper:
    return MemoryKeeper()


@pytest.fixture
def store(tmp_path: Path, keeper: MemoryKeeper) -> FaultyStore:
    return FaultyStore(tmp_path / "vault", keeper)


@pytest.fixture
def committer(store: FaultyStore, keeper: MemoryKeeper) -> Iterator[Committer]:
    committer = Committer(store, keeper, AnchorPolicy())
    yield committer
    committer.close()


def manufactured(committer: Committer, store: FaultyStore, count: int) -> list[Bound]:
    def create(real: Store) -> list[Bound]:
        return [manufacture(real, f"web{number}") for number in range(count)]

    bounds = committer.run(create).result(LIMIT_S)
    store.groups.clear()
    store.order.clear()
    return bounds


def test_saves_become_one_transaction_when_they_wait_together(store: FaultyStore, committer: Committer) -> None:
    bounds = manufactured(committer, store, 32)
    gate = Gate(committer)
    futures = [committer.submit(bound.save(b"new")) for bound in bounds]
    gate.open()
    assert [future.result(LIMIT_S) for future in futures] == [SaveAck(SaveEffect.COMMITTED, 2)] * 32
    assert store.groups == [32]


def test_transactions_are_far_fewer_than_saves_when_32_save_at_once(store: FaultyStore, committer: Committer) -> None:
    bounds = manufactured(committer, store, 32)
    begin = threading.Barrier(32)

    def save_many(bound: Bound) -> None:
        begin.wait(LIMIT_S)
        for number in range(10):
            committer.submit(bound.save(bytes(20000) + bytes([number]))).result(LIMIT_S)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(save_many, bounds))
    assert sum(store.groups) == 320
    assert len(store.groups) < 320 / 4


def test_each_has_its_own_outcome_when_one_of_the_group_is_refused(store: FaultyStore, committer: Committer) -> None:
    good, bad = manufactured(committer, store, 2)
    gate = Gate(committer)
    refused, done = committer.submit(bad.save(epoch=9)), committer.submit(good.save())
    gate.open()
    assert done.result(LIMIT_S).version == 2
    with pytest.raises(StateError, match="epoch"):
        refused.result(LIMIT_S)


def test_save_is_tried_again_when_the_store_comes_back(store: FaultyStore, committer: Committer) -> None:
    (bound,) = manufactured(committer, store, 1)
    store.failures_left = 3
    assert committer.submit(bound.save(b"new"), patience_s=LIMIT_S).result(LIMIT_S).version == 2
    assert len(store.groups) == 4
    assert store.reopened == 3


def test_save_is_acknowledged_once_when_the_failed_commit_was_durable(store: FaultyStore, committer: Committer) -> None:
    (bound,) = manufactured(committer, store, 1)
    store.failures_left, store.fail_after_commit = 1, True
    ack = committer.submit(bound.save(b"new"), patience_s=LIMIT_S).result(LIMIT_S)
    assert ack == SaveAck(SaveEffect.REPLAYED, 2)


def test_save_fails_at_its_deadline_when_the_store_stays_away(store: FaultyStore, committer: Committer) -> None:
    (bound,) = manufactured(committer, store, 1)
    store.failures_left = 1 << 30
    begin = time.monotonic()
    with pytest.raises(StoreError, match="fault"):
        committer.submit(bound.save(b"new"), patience_s=0.3).result(LIMIT_S)
    assert 0.3 <= time.monotonic() - begin < 2
    store.failures_left = 0
    # The next save of the same instance goes through.
    assert committer.submit(bound.save(b"newer")).result(LIMIT_S).version == 3


def test_small_saves_go_through_when_a_large_one_of_the_group_cannot(store: FaultyStore, committer: Committer) -> None:
    large, *small = manufactured(committer, store, 4)
    store.fail_above_bytes = 1000
    gate = Gate(committer)
    failing = committer.submit(large.save(bytes(2000)), patience_s=0.5)
    futures = [committer.submit(bound.save(), patience_s=LIMIT_S) for bound in small]
    gate.open()
    assert [future.result(LIMIT_S).version for future in futures] == [2, 2, 2]
    with pytest.raises(StoreError):
        failing.result(LIMIT_S)


def test_newcomers_are_served_when_an_earlier_save_is_still_retried(store: FaultyStore, committer: Committer) -> None:
    large, small = manufactured(committer, store, 2)
    store.fail_above_bytes = 1000
    failing = committer.submit(large.save(bytes(2000)), patience_s=LIMIT_S)
    for _ in range(20):
        committer.submit(small.save()).result(LIMIT_S)
    assert not failing.done()
    store.fail_above_bytes = 1 << 30
    assert failing.result(LIMIT_S).version == 2


def test_second_save_is_refused_when_one_of_the_instance_is_outstanding(
    store: FaultyStore, committer: Committer
) -> None:
    (bound,) = manufactured(committer, store, 1)
    gate = Gate(committer)
    first = committer.submit(bound.save())
    with pytest.raises(ProtocolError, match="before the one before"):
        committer.submit(bound.save())
    gate.open()
    assert first.result(LIMIT_S).version == 2


def test_saves_come_first_and_other_operations_in_order_when_both_wait(
    store: FaultyStore, committer: Committer
) -> None:
    first, second = manufactured(committer, store, 2)
    gate = Gate(committer)
    names = ("one", "two", "three")
    waiting = [committer.run(lambda _, name=name: store.order.append(name)) for name in names]
    saved = [committer.submit(bound.save()) for bound in (first, second)]
    gate.open()
    for done in (*waiting, *saved):
        done.result(LIMIT_S)
    assert store.order == ["saves", *names]
    committer.run(lambda real: real.unbind_instance(second.id, second.instance)).result(LIMIT_S)
    # What was answered comes before what is asked then.
    with pytest.raises(ConflictError):
        committer.submit(second.save()).result(LIMIT_S)


def test_a_save_waits_for_few_other_operations_when_a_long_row_of_them_waits(
    store: FaultyStore, committer: Committer
) -> None:
    (bound,) = manufactured(committer, store, 1)
    saved: list[Future[SaveAck]] = []

    def read(number: int) -> None:
        store.order.append(str(number))
        if number == 3:
            saved.append(committer.submit(bound.save()))
        # Two of them are all that a save waits for.
        time.sleep(MAX_CALLS_S * 0.6)

    gate = Gate(committer)
    reads = [committer.run(lambda _, number=number: read(number)) for number in range(40)]
    gate.open()
    for done in reads:
        done.result(LIMIT_S)
    saved[0].result(LIMIT_S)
    assert [word for word in store.order if word != "saves"] == [str(number) for number in range(40)]
    assert 4 <= store.order.index("saves") <= 6


def test_caller_gets_the_error_and_others_are_served_when_an_operation_fails(committer: Committer) -> None:
    record = new_record()
    with pytest.raises(NotFoundError):
        committer.run(lambda store: store.get_vtpm(record.id)).result(LIMIT_S)
    with pytest.raises(ZeroDivisionError):
        committer.run(lambda store: 1 // 0).result(LIMIT_S)
    committer.run(lambda store: store.create_vtpm(record)).result(LIMIT_S)


def test_operation_is_not_repeated_when_the_store_fails(store: FaultyStore, committer: Committer) -> None:
    calls: list[Store] = []

    def fail(real: Store) -> None:
        calls.append(real)
        raise StoreError("fault")

    with pytest.raises(StoreError, match="fault"):
        committer.run(fail).result(LIMIT_S)
    assert len(calls) == 1
    assert committer.run(lambda real: len(real.list_vtpms())).result(LIMIT_S) == 0
    assert store.reopened == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_waiting_fail_and_say_why_when_the_store_has_a_bug(store: FaultyStore, keeper: MemoryKeeper) -> None:
    committer = Committer(store, keeper, AnchorPolicy())
    first, second, third = manufactured(committer, store, 3)
    store.bug = ZeroDivisionError("a bug")
    gate = Gate(committer)
    futures: list[Future[object]] = [committer.submit(first.save()), committer.submit(second.save())]
    futures.append(committer.run(lambda real: real.list_vtpms()))
    gate.open()
    wait_for(futures, LIMIT_S)
    for future in futures:
        assert isinstance(future.exception(0), StoreError)
        assert "ZeroDivisionError: a bug" in str(future.exception(0))
        assert isinstance(future.exception(0).__cause__, ZeroDivisionError)
    committer.close()
    with pytest.raises(StoreError, match="a bug"):
        committer.submit(third.save())


def test_what_waits_is_finished_when_closed(store: FaultyStore, keeper: MemoryKeeper) -> None:
    committer = Committer(store, keeper, AnchorPolicy())
    bounds = manufactured(committer, store, 4)
    gate = Gate(committer)
    futures = [committer.submit(bound.save()) for bound in bounds]
    closing = threading.Thread(target=committer.close)
    closing.start()
    gate.open()
    closing.join(LIMIT_S)
    assert [future.result(0).version for future in futures] == [2, 2, 2, 2]
    with pytest.raises(StoreError, match="closed"):
        committer.run(lambda real: None)
    committer.close()


def test_submitting_is_refused_when_too_much_waits(
    store: FaultyStore, committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtpm.vault.committer.MAX_WAITING", 2)
    bounds = manufactured(committer, store, 3)
    gate = Gate(committer)
    futures = [committer.submit(bound.save()) for bound in bounds[:2]]
    with pytest.raises(StoreError, match="2 operations wait"):
        committer.submit(bounds[2].save())
    gate.open()
    assert [future.result(LIMIT_S).version for future in futures] == [2, 2]
    assert committer.submit(bounds[2].save(version=5)).result(LIMIT_S).version == 5
