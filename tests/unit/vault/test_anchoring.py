"""What is acknowledged when, beside an anchor that answers late, wrongly or not at all; and in which order."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.unit.vault.world import (
    CREATED,
    ENGINE,
    HELD,
    LEAVING,
    LIMIT_S,
    MOVED,
    Bound,
    Gate,
    MemoryKeeper,
    bind,
    manufacture,
    new_record,
    open_store,
)
from vtpm.errors import StateError, StoreError, UnavailableError, UsageError
from vtpm.tpm.types import InstanceId, StateKind
from vtpm.vault.anchor import Anchoring, AnchorPolicy
from vtpm.vault.committer import MAX_GROUP_SAVES, Committer
from vtpm.vault.holding import Holding, Right
from vtpm.vault.records import Event, SaveAck
from vtpm.vault.root_record import AnchorValue
from vtpm.vault.sqlite_store import SqliteStore
from vtpm.vault.store import Store

HOUR_S = 3600.0
Start = Callable[..., Committer]


@pytest.fixture
def keeper() -> MemoryKeeper:
    return MemoryKeeper()


@pytest.fixture
def start(tmp_path: Path, keeper: MemoryKeeper) -> Iterator[Start]:
    """Start a committer on the store, which it closes before it starts another."""
    committers: list[Committer] = []

    def start(interval_s: float | None = None) -> Committer:
        for committer in committers:
            committer.close()
        committers.append(Committer(open_store(tmp_path / "vault", keeper), keeper, AnchorPolicy(interval_s)))
        return committers[-1]

    yield start
    keeper.go_on()
    for committer in committers:
        committer.close()


def made(committer: Committer, *names: str) -> list[Bound]:
    return committer.run(lambda store: [manufacture(store, name) for name in names]).result(LIMIT_S)


def version_of(committer: Committer) -> int:
    return committer.run(lambda store: store.value.version).result(LIMIT_S)


def waits_for_its_anchor(keeper: MemoryKeeper, ask: Callable[[], Future[Any]]) -> bool:
    """Tell whether an answer comes after its anchor, whose writing must begin at once."""
    attempts = keeper.attempts
    keeper.hang()
    answer = ask()
    # What may be answered before is answered before the writing begins.
    keeper.await_attempts(attempts + 1)
    waits = not answer.done()
    keeper.go_on()
    answer.result(LIMIT_S)
    return waits


# Each commit


def test_nothing_is_acknowledged_before_it_is_anchored_and_reads_are_when_the_keeper_hangs(
    start: Start, keeper: MemoryKeeper
) -> None:
    committer = start()
    (bound,) = made(committer, "web1")
    before = keeper.value
    keeper.hang()
    saved = committer.submit(bound.save(), patience_s=LIMIT_S)
    created = committer.run(lambda store: store.create_vtpm(new_record("web2")), patience_s=LIMIT_S)
    word = committer.run(lambda store: store.set_lifecycle(bound.id, "running"), patience_s=LIMIT_S)
    logged = committer.run(lambda store: store.append_event(Event(CREATED, 0, "note")), patience_s=LIMIT_S)
    names = committer.run(lambda store: [record.name for record in store.list_vtpms()]).result(LIMIT_S)
    assert names == ["web1", "web2"]
    assert keeper.value == before
    assert [future.done() for future in (saved, created, word, logged)] == [False] * 4
    keeper.go_on()
    for future in (saved, created, word, logged):
        future.result(LIMIT_S)
    assert keeper.value.version == version_of(committer)


def test_each_kind_of_change_is_anchored_before_its_answer(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    record, instance = new_record("web1"), InstanceId(uuid4())
    for operation in (
        lambda store: store.create_vtpm(record),
        lambda store: store.set_wrapped_key(record.id, b"other", expected=record.wrapped_key),
        lambda store: store.set_lifecycle(record.id, "starting"),
        lambda store: store.bind_instance(record.id, instance),
        lambda store: store.issue_permit(record.id, instance, ENGINE),
        lambda store: store.load_state(record.id, instance, ENGINE + 1),
        lambda store: store.append_event(Event(CREATED, 0, "note")),
        lambda store: store.unbind_instance(record.id, instance),
        lambda store: store.delete_vtpm(record.id),
    ):
        before = keeper.value.version
        committer.run(operation).result(LIMIT_S)
        assert keeper.value.version == before + 1


def test_one_write_anchors_all_when_many_changes_wait_together(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    bounds = made(committer, *(f"web{number}" for number in range(8)))
    writes = len(keeper.written)
    gate = Gate(committer)
    futures = [committer.submit(bound.save()) for bound in bounds]
    gate.open()
    for future in futures:
        future.result(LIMIT_S)
    assert len(keeper.written) == writes + 1


def test_the_next_write_anchors_all_that_was_done_during_one(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    bounds = made(committer, *(f"web{number}" for number in range(8)))
    writes, attempts = len(keeper.written), keeper.attempts
    keeper.hang()
    first = committer.submit(bounds[0].save(), patience_s=LIMIT_S)
    keeper.await_attempts(attempts + 1)
    futures = [
        committer.run(lambda store, bound=bound: store.set_lifecycle(bound.id, "running"), patience_s=LIMIT_S)
        for bound in bounds
    ]
    # Reads nothing, and is answered after what came before it was done.
    committer.run(lambda _: None).result(LIMIT_S)
    keeper.go_on()
    first.result(LIMIT_S)
    for future in futures:
        future.result(LIMIT_S)
    assert len(keeper.written) == writes + 2


def test_change_is_acknowledged_when_the_keeper_comes_back_within_patience(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    (bound,) = made(committer, "web1")
    keeper.failures_left = 3
    committer.submit(bound.save(), patience_s=LIMIT_S).result(LIMIT_S)
    keeper.answers_to_lose = 2
    committer.submit(bound.save(b"newer"), patience_s=LIMIT_S).result(LIMIT_S)
    assert keeper.value.version == version_of(committer)


@pytest.mark.parametrize("hanging", [False, True])
def test_change_fails_at_its_deadline_when_the_keeper_stays_away(
    start: Start, keeper: MemoryKeeper, hanging: bool
) -> None:
    committer = start()
    (bound,) = made(committer, "web1")
    keeper.failures_left = 1 << 30
    if hanging:
        keeper.hang()
    saved = committer.submit(bound.save(), patience_s=0.1)
    word = committer.run(lambda store: store.set_lifecycle(bound.id, "running"), patience_s=0.1)
    cause = "has not answered" if hanging else "the keeper does not answer"
    for future in (saved, word):
        with pytest.raises(StoreError, match=f"not anchored in time: .*{cause}"):
            future.result(LIMIT_S)
    keeper.failures_left = 0
    keeper.go_on()
    # The next of the same instance goes through, and with it what had failed.
    committer.submit(bound.save(b"newer"), patience_s=LIMIT_S).result(LIMIT_S)
    assert keeper.value.version == version_of(committer)


def test_change_made_already_is_not_acknowledged_before_it_is_anchored(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    (record,) = committer.run(lambda store: [bind(store).record]).result(LIMIT_S)
    keeper.failures_left = 1 << 30
    word = committer.run(lambda store: store.set_lifecycle(record.id, "other"), patience_s=0.1)
    with pytest.raises(StoreError):
        word.result(LIMIT_S)
    # Nothing is to be changed any more, and yet it does not count.
    again = committer.run(lambda store: store.set_lifecycle(record.id, "other"), patience_s=0.1)
    with pytest.raises(StoreError, match="not anchored"):
        again.result(LIMIT_S)


def test_replay_is_not_acknowledged_before_the_first_save_is_anchored(start: Start, keeper: MemoryKeeper) -> None:
    committer = start(HOUR_S)
    (bound,) = committer.run(lambda store: [bind(store)]).result(LIMIT_S)
    keeper.failures_left = 1 << 30
    first = bound.save(permit=bound.permit)
    for _ in range(2):
        with pytest.raises(StoreError, match="not anchored"):
            committer.submit(first, patience_s=0.1).result(LIMIT_S)


class CommitFails:
    """A connection whose commit comes to pass and is said to have failed, as when the flush of its log fails."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        cursor = self._db.execute(sql, *values)
        if sql == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return cursor


def test_first_save_is_anchored_before_its_answer_when_its_commit_failed_and_came_to_pass(
    start: Start, keeper: MemoryKeeper
) -> None:
    committer = start(HOUR_S)
    (bound,) = committer.run(lambda store: [bind(store)]).result(LIMIT_S)

    def break_commit(store: Store) -> None:
        assert isinstance(store, SqliteStore) and store._file._db is not None
        store._file._db = CommitFails(store._file._db)  # type: ignore[assignment]

    committer.run(break_commit).result(LIMIT_S)
    committer.submit(bound.save(permit=bound.permit), patience_s=LIMIT_S).result(LIMIT_S)
    assert keeper.value.version == version_of(committer)


def test_everything_is_refused_when_somebody_else_moved_the_anchor(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    (bound,) = made(committer, "web1")
    keeper.value = AnchorValue(keeper.value.version + 100, bytes(32))
    with pytest.raises(StateError, match="is not later"):
        committer.submit(bound.save(), patience_s=LIMIT_S).result(LIMIT_S)
    before = keeper.attempts
    with pytest.raises(StateError, match="is not later"):
        committer.submit(bound.save()).result(LIMIT_S)
    with pytest.raises(StateError, match="is not later"):
        committer.run(lambda store: store.list_vtpms()).result(LIMIT_S)
    assert keeper.attempts == before
    assert "is not later" in committer.stats().failure


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_waiting_fail_and_say_why_when_the_keeper_has_a_bug(start: Start, keeper: MemoryKeeper) -> None:
    committer = start()
    one, two = made(committer, "web1", "web2")
    keeper.bug = ZeroDivisionError("a bug")
    gate = Gate(committer)
    saved = [committer.submit(bound.save()) for bound in (one, two)]
    word = committer.run(lambda store: store.set_lifecycle(one.id, "running"))
    gate.open()
    for future in (*saved, word):
        with pytest.raises(StoreError, match="ZeroDivisionError: a bug"):
            future.result(LIMIT_S)


def test_committer_is_not_started_when_the_anchor_cannot_follow_the_store(tmp_path: Path, keeper: MemoryKeeper) -> None:
    keeper.failures_left = 1
    store = open_store(tmp_path / "vault", keeper)
    with pytest.raises(UnavailableError):
        Committer(store, keeper, AnchorPolicy())
    store.close()


def test_anchor_is_read_once_and_written_only_when_it_is_behind_the_store(
    start: Start, tmp_path: Path, keeper: MemoryKeeper
) -> None:
    committer = start()
    assert (keeper.reads, keeper.attempts) == (1, 1)
    made(committer, "web1")
    committer.close()
    attempts = keeper.attempts
    start().close()
    assert (keeper.reads, keeper.attempts) == (2, attempts)


def test_nothing_is_acknowledged_when_the_anchor_moved_while_the_store_was_opened(
    start: Start, tmp_path: Path, keeper: MemoryKeeper
) -> None:
    committer = start()
    (bound,) = made(committer, "web1")
    committer.close()
    store = open_store(tmp_path / "vault", keeper)
    keeper.value = AnchorValue(keeper.value.version + 5, bytes(32))
    moved = Committer(store, keeper, AnchorPolicy())
    try:
        with pytest.raises(StateError, match="is not later"):
            moved.submit(bound.save()).result(LIMIT_S)
        with pytest.raises(StateError):
            moved.run(lambda real: real.set_lifecycle(bound.id, "running")).result(LIMIT_S)
    finally:
        moved.close()


# Interval


@pytest.mark.parametrize("interval_s", [0, -1.0, float("nan")])
def test_policy_is_refused_when_its_interval_is_none(interval_s: float) -> None:
    with pytest.raises(UsageError):
        AnchorPolicy(interval_s)


def test_saves_are_acknowledged_unanchored_and_anchored_by_the_timer_when_in_interval_mode(
    start: Start, keeper: MemoryKeeper
) -> None:
    committer = start(0.2)
    (bound,) = made(committer, "web1")
    before = keeper.value.version
    keeper.hang()
    for _ in range(5):
        committer.submit(bound.save(), patience_s=0).result(LIMIT_S)
    assert keeper.value.version == before
    keeper.go_on()
    keeper.await_version(before + 5)
    assert version_of(committer) == before + 5


@pytest.mark.parametrize(
    "operation",
    [
        lambda store, bound: store.create_vtpm(new_record("web2")),
        lambda store, bound: store.set_wrapped_key(bound.id, b"other", expected=bound.record.wrapped_key),
        lambda store, bound: store.record_move(bound.id, HELD, LEAVING),
        lambda store, bound: (store.record_move(bound.id, HELD, LEAVING), store.record_move(bound.id, LEAVING, MOVED)),
        lambda store, bound: store.bind_instance(bound.id, InstanceId(uuid4()), replaces=bound.instance),
        lambda store, bound: store.load_state(bound.id, bound.instance, ENGINE),
        lambda store, bound: store.unbind_instance(bound.id, bound.instance),
        lambda store, bound: (store.unbind_instance(bound.id, bound.instance), store.delete_vtpm(bound.id)),
    ],
)
def test_change_of_the_right_to_run_is_anchored_at_once_when_in_interval_mode(
    start: Start, keeper: MemoryKeeper, operation: Callable[[Store, Bound], object]
) -> None:
    committer = start(HOUR_S)
    (bound,) = made(committer, "web1")
    committer.submit(bound.save(b"volatile", kind=StateKind.VOLATILE)).result(LIMIT_S)
    unanchored = keeper.value.version
    assert version_of(committer) > unanchored
    assert waits_for_its_anchor(
        keeper, lambda: committer.run(lambda store: operation(store, bound), patience_s=LIMIT_S)
    )
    assert keeper.value.version == version_of(committer) > unanchored


def test_end_of_a_freeze_is_anchored_at_once_and_words_wait_when_in_interval_mode(
    start: Start, keeper: MemoryKeeper
) -> None:
    committer = start(HOUR_S)
    (bound,) = made(committer, "web1")
    steps: list[tuple[Callable[[Store], None], bool]] = [
        (lambda store: store.set_lifecycle(bound.id, "running"), False),
        (lambda store: store.record_move(bound.id, HELD, LEAVING), True),
        (lambda store: store.record_move(bound.id, LEAVING, Holding(Right.HELD, 3)), True),
        (lambda store: store.set_lifecycle(bound.id, "starting"), False),
    ]
    for step, anchored in steps:
        committer.run(step).result(LIMIT_S)
        assert (keeper.value.version == version_of(committer)) is anchored


def test_use_of_a_permit_is_anchored_at_once_when_in_interval_mode(start: Start, keeper: MemoryKeeper) -> None:
    committer = start(HOUR_S)
    (bound,) = committer.run(lambda store: [bind(store)]).result(LIMIT_S)
    assert keeper.value.version == version_of(committer)
    first = bound.save(permit=bound.permit)
    assert waits_for_its_anchor(keeper, lambda: committer.submit(first, patience_s=LIMIT_S))
    assert keeper.value.version == version_of(committer)


def test_siblings_are_served_inside_the_window_when_one_waits_for_a_keeper_that_is_away(
    start: Start, keeper: MemoryKeeper
) -> None:
    committer = start(HOUR_S)
    stopping, sibling = made(committer, "web1", "web2")
    keeper.failures_left = 1 << 30
    stopped = committer.run(lambda store: store.unbind_instance(stopping.id, stopping.instance), patience_s=LIMIT_S)
    attempts = keeper.attempts
    for _ in range(3):
        committer.submit(sibling.save(), patience_s=0).result(LIMIT_S)
    keeper.await_attempts(attempts + 2)
    committer.submit(sibling.save(), patience_s=0).result(LIMIT_S)
    assert not stopped.done()
    keeper.failures_left = 0
    stopped.result(LIMIT_S)


def test_nothing_is_acknowledged_beyond_the_window_when_the_keeper_stays_away(
    start: Start, keeper: MemoryKeeper
) -> None:
    committer = start(0.1)
    (bound,) = made(committer, "web1")
    keeper.await_version(version_of(committer))
    keeper.failures_left = 1 << 30
    attempts = keeper.attempts
    committer.submit(bound.save(), patience_s=0).result(LIMIT_S)
    keeper.await_attempts(attempts + 1)
    with pytest.raises(StoreError, match="not anchored in time"):
        committer.submit(bound.save(), patience_s=0.1).result(LIMIT_S)
    assert committer.stats().failure


def test_records_name_the_anchor_alone_when_no_write_is_open(start: Start, keeper: MemoryKeeper) -> None:
    committer = start(HOUR_S)
    (bound,) = made(committer, "web1")
    for operation in (lambda store: store.set_lifecycle(bound.id, "other"), lambda store: None):
        committer.run(operation).result(LIMIT_S)
        committer.submit(bound.save()).result(LIMIT_S)
        record = committer.run(lambda store: store._file.ledger.record).result(LIMIT_S)
        assert record.version > keeper.value.version
        assert record.base == record.attempted == keeper.value


def test_age_counts_from_the_first_change_after_the_one_being_anchored(tmp_path: Path) -> None:
    store = open_store(tmp_path / "vault")
    anchoring = Anchoring(store, AnchorPolicy(HOUR_S))
    assert (anchoring.due_at(), anchoring.stats(90.0).oldest_unanchored_s) == (None, None)
    times = iter((100.0, 101.0, 105.0))
    for begin in (True, False, False):
        store.append_event(Event(CREATED, 0, "note"))
        anchoring.changed(next(times))
        if begin:
            assert anchoring.due_at() == 100.0 + HOUR_S
            anchoring.begin()
    assert anchoring.stats(110.0).oldest_unanchored_s == 10.0
    anchoring.succeeded()
    anchoring.changed(110.0)
    assert anchoring.stats(110.0).oldest_unanchored_s == 9.0
    assert anchoring.due_at() == 101.0 + HOUR_S
    store.close()


# End


def test_all_is_anchored_when_closed_in_order(start: Start, keeper: MemoryKeeper) -> None:
    committer = start(HOUR_S)
    (bound,) = made(committer, "web1")
    committer.submit(bound.save()).result(LIMIT_S)
    version = version_of(committer)
    assert keeper.value.version < version
    committer.close()
    assert keeper.value.version == version


@pytest.mark.parametrize("hanging", [False, True])
def test_closing_ends_and_nothing_is_lost_when_the_keeper_is_away(
    start: Start, keeper: MemoryKeeper, hanging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtpm.vault.committer.SAVE_PATIENCE_S", 0.1)
    committer = start(HOUR_S)
    (bound,) = made(committer, "web1")
    committer.submit(bound.save(b"unanchored")).result(LIMIT_S)
    keeper.failures_left = 1 << 30
    if hanging:
        keeper.hang()
    closing = threading.Thread(target=committer.close)
    closing.start()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    keeper.failures_left = 0
    keeper.go_on()
    (state,) = start(HOUR_S).run(lambda store: store.read_state(bound.id)).result(LIMIT_S)
    assert state.envelope == b"unanchored"


# Fairness


def test_each_is_served_before_a_flooding_vtpm_is_served_twice(start: Start) -> None:
    """A vTPM that saves again in the very moment it is answered has one save in each group, and no more."""
    committer = start(HOUR_S)
    flooder, *others = made(committer, *(f"web{number}" for number in range(9)))
    served: list[str] = []
    ended = threading.Event()

    def flood(last: Future[SaveAck]) -> None:
        last.result(0)
        served.append("flooder")
        if len(served) < 200:
            committer.submit(flooder.save()).add_done_callback(flood)
        else:
            ended.set()

    def serve(bound: Bound, last: Future[SaveAck] | None = None) -> None:
        if last is not None:
            served.append(bound.record.name)
        if not ended.is_set():
            committer.submit(bound.save()).add_done_callback(lambda done: serve(bound, done))

    gate = Gate(committer)
    committer.submit(flooder.save()).add_done_callback(flood)
    for bound in others:
        serve(bound)
    gate.open()
    assert ended.wait(LIMIT_S)
    turns = "".join("F" if name == "flooder" else "." for name in served).split("F")
    # Between two of the flooder's, each of the eight others was served once.
    assert set(map(len, turns[1:-1])) == {8}


def test_first_come_is_first_served_when_more_wait_than_one_group_holds(start: Start) -> None:
    committer = start(HOUR_S)
    bounds = made(committer, *(f"web{number}" for number in range(MAX_GROUP_SAVES + 40)))
    served: list[int] = []
    gate = Gate(committer)
    futures = []
    for number, bound in enumerate(bounds):
        futures.append(committer.submit(bound.save(), patience_s=LIMIT_S))
        futures[-1].add_done_callback(lambda _, number=number: served.append(number))
    gate.open()
    for future in futures:
        future.result(LIMIT_S)
    assert served == sorted(served)
