"""Group commit: one thread owns the store, and saves that wait together become durable and anchored together.

While a transaction is under way, arriving saves gather; they are the next group. Meanwhile the root record of an
earlier one is on its way to the platform TPM, in a thread of its own: one write at a time, of the latest record there
is. What was done is acknowledged when it is durable and anchored as the policy says; it fails when its patience ends.
Imported by the manager.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from vtpm.errors import ProtocolError, StoreError, VtpmError
from vtpm.tpm.types import InstanceId
from vtpm.vault.anchor import Anchoring, AnchorKeeper, AnchorPolicy, AnchorStats
from vtpm.vault.records import SaveAck, SaveEffect, SaveRequest
from vtpm.vault.root_record import AnchorValue
from vtpm.vault.store import Store

_log = logging.getLogger("vtpm.vault")
T = TypeVar("T")

SAVE_PATIENCE_S = 1.3
"""How long a save waits for the store by default: less than the 1.5 s of an instance, which so hears why it failed."""
MAX_WAITING = 4096
MAX_GROUP_SAVES = 256
MAX_GROUP_BYTES = 16 * 1024 * 1024
MAX_TURN_CALLS = 64
MAX_CALLS_S = 0.002
"""Bounds on other operations between two looks at what came meanwhile: a save waits for no more, and one of them."""

_RETRY_PAUSE_S = 0.05
_LONE_RETRY_PAUSE_S = 1.0
"""Between attempts to anchor when nobody waits for it."""


@dataclass(eq=False)
class _Save:
    request: SaveRequest
    deadline: float
    future: Future[SaveAck]


@dataclass(eq=False)
class _Call:
    operation: Callable[[Store], Any]
    patience_s: float
    future: Future[Any]


@dataclass(eq=False)
class _Done:
    """What is durable and not yet acknowledged; see Anchoring.counts."""

    item: _Save | _Call
    result: Any
    version: int
    must: int
    deadline: float


def _started_future() -> Future[T]:
    """Return a future that cannot be cancelled: what waits for the store may be under way at any moment."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


class Committer:
    """Owns a store and its thread. On return the store is anchored as it was opened, and nothing was done yet.

    Args:
        store: used by this committer's thread alone from here on; closed by `close`.
        keeper: of the anchor that the store was opened with; used by one thread at a time.
        policy: when changes are anchored.
    Raises:
        UnavailableError, PlatformTpmError, StoreError: the anchor is behind the store and cannot be moved now.
        StateError: the anchor is no longer what it was when the store was opened.
    """

    def __init__(self, store: Store, keeper: AnchorKeeper, policy: AnchorPolicy) -> None:
        # Not read again, which is slow on hardware. Only this host's keeper can have moved it since the store was
        # opened, and its one client is this manager: the locks of both see to that. A second look would find what moves
        # it before this line, and nothing after it. For both there is the write: the keeper refuses a version that is
        # not above the last that it knows of, and a refusal ends all acknowledgement.
        if store.found_anchor != store.value:
            keeper.write(store.value)
        self._store = store
        self._keeper = keeper
        self._anchoring = Anchoring(store, policy)
        self._saves: deque[_Save] = deque()
        self._calls: deque[_Call] = deque()
        self._turn: deque[_Save | _Call] = deque()
        self._retries: list[_Save] = []
        self._retry_at = 0.0
        self._done: list[_Done] = []
        # Whether one is under way, and why the last one failed.
        self._writing = False
        self._failed: BaseException | None = None
        self._failed_at: float | None = None
        # At most one save of each instance, so that none can fill the queue or a group.
        self._outstanding: dict[InstanceId, _Save] = {}
        self._changed = threading.Condition()
        self._accepting = True
        self._close_by = 0.0
        self._ended_because = "the vault is closed"
        self._broken = False
        self._to_anchor: queue.SimpleQueue[AnchorValue | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="vault-committer", daemon=True)
        self._thread.start()
        # Ends by itself, after a write that may hang in the platform TPM: nobody waits for it.
        threading.Thread(target=self._write_anchors, name="vault-anchor", daemon=True).start()

    def submit(self, request: SaveRequest, *, patience_s: float = SAVE_PATIENCE_S) -> Future[SaveAck]:
        """Have one save committed with others.

        Args:
            patience_s: how long a store or anchor that fails is given to come back, from now on. One transaction
                that hangs in the kernel may take longer: bound the wait on the future too.
        Returns:
            Future of the acknowledgement, not to be cancelled; its callbacks run in the committer's thread
            and must be short. It fails with StoreError when the patience ends (nothing acknowledged; a later
            save may succeed), otherwise with what the store refused it for.
        Raises:
            ProtocolError: this instance has a save outstanding.
            StoreError: too much is waiting already, or the committer has ended.
        """
        save = _Save(request, time.monotonic() + patience_s, _started_future())
        with self._changed:
            if request.instance_id in self._outstanding:
                raise ProtocolError(
                    f"vTPM {request.vtpm_id}: save {request.seq} comes before the one before it was answered"
                )
            self._enqueue(save)
            self._outstanding[request.instance_id] = save
        return save.future

    def run(self, operation: Callable[[Store], T], *, patience_s: float = SAVE_PATIENCE_S) -> Future[T]:
        """Run any other operation in the store's thread, in order of arrival, but after the saves that wait.

        Saves come first, for guests wait for them. So an operation takes a few milliseconds at most; what is longer is
        done page by page.

        It is tried once: only its caller knows whether it may be repeated. What it raises is the future's. One that
        only reads has its result at once; one that changes, or found its change made already, when that is anchored.

        Args:
            patience_s: how long the anchor is given once the operation is done; after it the future fails with
                StoreError though the change is durable, and may still be anchored.
        Raises:
            StoreError: too much is waiting already, or the committer has ended.
        """
        future: Future[T] = _started_future()
        with self._changed:
            self._enqueue(_Call(operation, patience_s, future))
        return future

    def stats(self) -> AnchorStats:
        """Return what there is to say of the anchor. From any thread."""
        with self._changed:
            return self._anchoring.stats(time.monotonic())

    def close(self) -> None:
        """Finish what waits, each within its patience, anchor all if that is possible, and close the store.

        Again does nothing.
        """
        with self._changed:
            self._accepting = False
            self._close_by = time.monotonic() + SAVE_PATIENCE_S
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, item: _Save | _Call) -> None:
        if not self._accepting:
            raise StoreError(f"{self._ended_because}; nothing was acknowledged")
        if len(self._saves) + len(self._calls) >= MAX_WAITING:
            raise StoreError(f"{MAX_WAITING} operations wait for the store; nothing was acknowledged")
        if isinstance(item, _Save):
            self._saves.append(item)
        else:
            self._calls.append(item)
        self._changed.notify()

    def _serve(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _step(self) -> bool:
        """Wait for the next piece of work and do it; False when there will be none."""
        with self._changed:
            while not self._saves and not self._calls and self._failed is None:
                pause_s = self._pause_s()
                if pause_s is None and not self._accepting:
                    return False
                if pause_s is not None and pause_s <= 0:
                    break
                self._changed.wait(pause_s)
            failed, self._failed = self._failed, None
            self._take()
        if failed is not None:
            self._note_failed(failed)
        if self._retries and time.monotonic() >= self._retry_at:
            retries, self._retries = self._retries, []
            # Each alone from now on, so that one that cannot fit holds no other back.
            for save in retries:
                self._commit([save])
        self._do()
        self._acknowledge()
        self._anchor()
        return True

    def _pause_s(self) -> float | None:
        """Return how long there is nothing to do if nothing comes, or None for ever."""
        now = time.monotonic()
        times = [done.deadline for done in self._done]
        if self._retries:
            times.append(self._retry_at)
        if not self._accepting and not times and now >= self._close_by:
            # What is durable and not anchored is no loss: it is anchored when the store is opened again.
            return None
        anchor_at = self._anchor_at()
        if anchor_at is not None:
            times.append(anchor_at)
        if not self._accepting and self._writing:
            times.append(self._close_by)
        return min(times) - now if times else None

    def _take(self) -> None:
        """Take from the queues what is done before the next look at them: saves first, both in order of arrival."""
        size_bytes = 0
        while self._saves and len(self._turn) < MAX_GROUP_SAVES and size_bytes < MAX_GROUP_BYTES:
            save = self._saves.popleft()
            self._turn.append(save)
            size_bytes += len(save.request.envelope)
        for _ in range(min(len(self._calls), MAX_TURN_CALLS)):
            self._turn.append(self._calls.popleft())

    def _do(self) -> None:
        """Do what was taken: the saves in one transaction, then of the other operations what there is time for."""
        group: list[_Save] = []
        while self._turn and isinstance(self._turn[0], _Save):
            save = self._turn.popleft()
            assert isinstance(save, _Save)
            group.append(save)
        if group:
            self._commit(group)
        began = time.monotonic()
        while self._turn:
            call = self._turn.popleft()
            assert isinstance(call, _Call)
            self._call(call)
            if time.monotonic() - began >= MAX_CALLS_S:
                break
        with self._changed:
            while self._turn:
                late = self._turn.pop()
                assert isinstance(late, _Call)
                self._calls.appendleft(late)

    def _commit(self, group: Sequence[_Save]) -> None:
        """Make the group durable, or leave each of its saves to be tried alone later, or failed."""
        prompt = self._store.prompt_version
        try:
            self._mend()
            outcomes = self._store.commit_saves([save.request for save in group])
        except StoreError as error:
            self._broken = True
            self._retry_or_fail(group, error)
        except VtpmError as error:
            for save in group:
                self._fail(save, error)
        else:
            effects = {outcome.effect for outcome in outcomes if isinstance(outcome, SaveAck)}
            must = self._must(prompt_since=0 if SaveEffect.REPLAYED in effects else prompt)
            for save, outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, SaveAck):
                    self._wait_for_anchor(_Done(save, outcome, self._store.value.version, must, save.deadline))
                else:
                    self._fail(save, outcome)

    def _call(self, call: _Call) -> None:
        began = self._store.transactions
        try:
            self._mend()
            result = call.operation(self._store)
        except StoreError as error:
            self._broken = True
            call.future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - not swallowed: it is the caller's operation and error
            call.future.set_exception(error)
        else:
            if self._store.transactions == began:
                call.future.set_result(result)
            else:
                must = self._must(prompt_since=0)
                deadline = time.monotonic() + call.patience_s
                self._wait_for_anchor(_Done(call, result, self._store.value.version, must, deadline))

    def _must(self, *, prompt_since: int) -> int:
        with self._changed:
            return self._anchoring.must(prompt_since=prompt_since)

    def _wait_for_anchor(self, done: _Done) -> None:
        with self._changed:
            self._done.append(done)

    def _acknowledge(self) -> None:
        """Answer what counts by now, and fail what has waited long enough."""
        now = time.monotonic()
        with self._changed:
            self._anchoring.changed(now)
        for done in self._take_done(lambda done: self._anchoring.counts(done.version, done.must, now)):
            done.item.future.set_result(done.result)
        for done in self._take_done(lambda done: self._anchoring.refusal is not None or done.deadline <= now):
            done.item.future.set_exception(self._not_anchored())

    def _take_done(self, which: Callable[[_Done], bool]) -> list[_Done]:
        """Take out what need not wait for the anchor any longer; it has left, and whoever takes it answers it."""
        with self._changed:
            taken = [done for done in self._done if which(done)]
            self._done = [done for done in self._done if done not in taken] if taken else self._done
            for done in taken:
                self._leave(done.item)
        return taken

    def _anchor_at(self) -> float | None:
        """Return when the next write to the platform TPM begins if nothing comes, or None for never."""
        due_at = self._anchoring.due_at()
        if self._writing or due_at is None:
            return None
        if self._failed_at is not None:
            hurried = self._done or not self._accepting
            return self._failed_at + (_RETRY_PAUSE_S if hurried else _LONE_RETRY_PAUSE_S)
        return due_at if self._accepting else 0.0

    def _anchor(self) -> None:
        """Have the root record anchored if that is due and none is under way."""
        with self._changed:
            anchor_at = self._anchor_at()
            if anchor_at is not None and anchor_at <= time.monotonic():
                self._writing = True
                self._to_anchor.put(self._anchoring.begin())

    def _write_anchors(self) -> None:
        """Write to the platform TPM, in a thread of its own; answer what counts by that, or hand the error over."""
        while (value := self._to_anchor.get()) is not None:
            try:
                self._keeper.write(value)
            except BaseException as error:  # noqa: BLE001 - handed to the committer's thread
                with self._changed:
                    self._failed = error
                    self._changed.notify()
            else:
                self._note_anchored(value)

    def _note_anchored(self, value: AnchorValue) -> None:
        """Answer what waited for this anchor. In the anchor's thread: a guest need not wait until another is woken."""
        with self._changed:
            self._writing = False
            self._failed_at = None
            self._anchoring.succeeded()
            self._changed.notify()
        for done in self._take_done(lambda done: done.version <= value.version):
            done.item.future.set_result(done.result)

    def _note_failed(self, error: BaseException) -> None:
        if not isinstance(error, VtpmError):
            raise error
        with self._changed:
            self._writing = False
            self._failed_at = time.monotonic()
            self._anchoring.failed(error)
        _log.warning("the anchor was not written: %s", error)

    def _not_anchored(self) -> VtpmError:
        if self._anchoring.refusal is not None:
            return self._anchoring.refusal
        cause = self._anchoring.failure or "the platform TPM has not answered"
        return StoreError(f"the store's content was not anchored in time: {cause}; nothing was acknowledged")

    def _retry_or_fail(self, group: Sequence[_Save], error: StoreError) -> None:
        now = time.monotonic()
        for save in group:
            if save.deadline <= now:
                self._fail(save, error)
            else:
                self._retries.append(save)
                self._retry_at = now + _RETRY_PAUSE_S

    def _mend(self) -> None:
        """Reopen the store if its last use failed. Raises StateError when the anchor was moved by somebody else."""
        if self._anchoring.refusal is not None:
            raise self._anchoring.refusal
        if self._broken:
            self._store.reopen()
            self._broken = False

    def _fail(self, item: _Save | _Call, error: BaseException) -> None:
        self._leave(item)
        item.future.set_exception(error)

    def _leave(self, item: _Save | _Call) -> None:
        if isinstance(item, _Save):
            with self._changed:
                self._outstanding.pop(item.request.instance_id, None)

    def _end(self, cause: BaseException | None) -> None:
        """Fail whatever still waits, after an unexpected error, and let go of the store."""
        with self._changed:
            self._accepting = False
            if cause is not None:
                self._ended_because = f"the vault's committer failed unexpectedly: {type(cause).__name__}: {cause}"
            unanswered: list[_Save | _Call] = [*self._outstanding.values()]
            unanswered += [item for item in (*self._turn, *self._calls) if isinstance(item, _Call)]
            unanswered += [done.item for done in self._done if isinstance(done.item, _Call)]
            # A write to the platform TPM that comes back later has nobody to answer.
            self._done = []
        for item in unanswered:
            self._fail(item, self._ended(cause))
        self._to_anchor.put(None)
        self._store.close()

    def _ended(self, cause: BaseException | None) -> StoreError:
        error = StoreError(f"{self._ended_because}; nothing was acknowledged")
        error.__cause__ = cause
        return error
