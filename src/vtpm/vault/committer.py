"""Group commit: one thread owns the store, and saves that wait together become durable together.

While a transaction is under way, arriving saves gather; they are the next group. A save waits for a store
that may come back until its own deadline. Nothing is acknowledged that is not durable.
Imported by the manager.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from vtpm.errors import ProtocolError, StoreError, VtpmError
from vtpm.tpm.types import InstanceId
from vtpm.vault.records import SaveAck, SaveRequest
from vtpm.vault.store import Store

T = TypeVar("T")

SAVE_PATIENCE_S = 1.5
"""How long a save waits for the store by default: Linux gives most TPM commands 2 s."""
MAX_WAITING = 4096
MAX_GROUP_SAVES = 256
MAX_GROUP_BYTES = 16 * 1024 * 1024

_RETRY_PAUSE_S = 0.05

CommitHook = Callable[[Sequence[tuple[SaveRequest, SaveAck]]], None]
"""Called in the committer's thread with saves that are durable and not yet acknowledged, once per group.

The rollback anchor's place. A StoreError from it leaves them unacknowledged; they are tried again, whereupon
the store finds them to be replays, and the hook is called again.
"""


def _no_hook(acknowledged: Sequence[tuple[SaveRequest, SaveAck]]) -> None:
    pass


@dataclass(eq=False)
class _Save:
    request: SaveRequest
    deadline: float
    future: Future[SaveAck]


@dataclass(eq=False)
class _Call:
    run: Callable[[], None]
    fail: Callable[[BaseException | None], None]


def _started_future() -> Future[T]:
    """Return a future that cannot be cancelled: what waits for the store may be under way at any moment."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


class Committer:
    """Owns a store and its thread.

    Args:
        store: used by this committer's thread alone from here on; closed by `close`.
        before_acknowledge: see CommitHook.
    """

    def __init__(self, store: Store, *, before_acknowledge: CommitHook = _no_hook) -> None:
        self._store = store
        self._before_acknowledge = before_acknowledge
        self._waiting: deque[_Save | _Call] = deque()
        self._retries: list[_Save] = []
        self._retry_at = 0.0
        # At most one save of each instance, so that none can fill the queue or a group.
        self._outstanding: dict[InstanceId, _Save] = {}
        self._changed = threading.Condition()
        self._accepting = True
        self._ended_because = "the vault is closed"
        self._broken = False
        self._thread = threading.Thread(target=self._serve, name="vault-committer", daemon=True)
        self._thread.start()

    def submit(self, request: SaveRequest, *, patience_s: float = SAVE_PATIENCE_S) -> Future[SaveAck]:
        """Have one save committed with others.

        Args:
            patience_s: how long a store that fails is given to come back, from now on. One transaction that
                hangs in the kernel may take longer: bound the wait on the future too.
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

    def run(self, operation: Callable[[Store], T]) -> Future[T]:
        """Run any other operation in the store's thread, after what waits already.

        It is tried once: only its caller knows whether it may be repeated. What it raises is the future's.

        Raises:
            StoreError: too much is waiting already, or the committer has ended.
        """
        future: Future[T] = _started_future()

        def run() -> None:
            try:
                result = operation(self._store)
            except StoreError as error:
                self._broken = True
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001 - not swallowed: it is the caller's operation and error
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            self._enqueue(_Call(run, future.set_exception))
        return future

    def close(self) -> None:
        """Finish what waits, each save within its patience, and close the store. Again does nothing."""
        with self._changed:
            self._accepting = False
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, item: _Save | _Call) -> None:
        if not self._accepting:
            raise StoreError(f"{self._ended_because}; nothing was acknowledged")
        if len(self._waiting) >= MAX_WAITING:
            raise StoreError(f"{MAX_WAITING} operations wait for the store; nothing was acknowledged")
        self._waiting.append(item)
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
            while not self._waiting:
                pause_s = self._retry_at - time.monotonic() if self._retries else None
                if pause_s is None and not self._accepting:
                    return False
                if pause_s is not None and pause_s <= 0:
                    break
                self._changed.wait(pause_s)
            group, call = self._take()
        if self._retries and time.monotonic() >= self._retry_at:
            retries, self._retries = self._retries, []
            # Each alone from now on, so that one that cannot fit holds no other back.
            for save in retries:
                self._commit([save])
        if group:
            self._commit(group)
        if call is not None:
            self._call(call)
        return True

    def _take(self) -> tuple[list[_Save], _Call | None]:
        """Take from the queue either a group of saves or one call, in order of arrival."""
        group: list[_Save] = []
        size_bytes = 0
        while self._waiting and len(group) < MAX_GROUP_SAVES and size_bytes < MAX_GROUP_BYTES:
            first = self._waiting[0]
            if isinstance(first, _Call):
                if group:
                    break
                self._waiting.popleft()
                return [], first
            self._waiting.popleft()
            group.append(first)
            size_bytes += len(first.request.envelope)
        return group, None

    def _commit(self, group: list[_Save]) -> None:
        """Commit the group, or leave each of its saves to be tried alone later, or failed."""
        try:
            self._mend()
            outcomes = self._store.commit_saves([save.request for save in group])
            durable = [
                (save.request, outcome)
                for save, outcome in zip(group, outcomes, strict=True)
                if isinstance(outcome, SaveAck)
            ]
            if durable:
                self._before_acknowledge(durable)
        except StoreError as error:
            self._broken = True
            self._retry_or_fail(group, error)
        except VtpmError as error:
            for save in group:
                self._finish(save, error)
        else:
            for save, outcome in zip(group, outcomes, strict=True):
                self._finish(save, outcome)

    def _call(self, call: _Call) -> None:
        try:
            self._mend()
        except VtpmError as error:
            call.fail(error)
        else:
            call.run()

    def _retry_or_fail(self, group: list[_Save], error: StoreError) -> None:
        now = time.monotonic()
        for save in group:
            if save.deadline <= now:
                self._finish(save, error)
            else:
                self._retries.append(save)
                self._retry_at = now + _RETRY_PAUSE_S

    def _mend(self) -> None:
        """Reopen the store if its last use failed."""
        if self._broken:
            self._store.reopen()
            self._broken = False

    def _finish(self, save: _Save, outcome: SaveAck | VtpmError) -> None:
        with self._changed:
            self._outstanding.pop(save.request.instance_id, None)
        if isinstance(outcome, SaveAck):
            save.future.set_result(outcome)
        else:
            save.future.set_exception(outcome)

    def _end(self, cause: BaseException | None) -> None:
        """Fail whatever still waits, after an unexpected error, and let go of the store."""
        with self._changed:
            self._accepting = False
            if cause is not None:
                self._ended_because = f"the vault's committer failed unexpectedly: {type(cause).__name__}: {cause}"
            unanswered = list(self._outstanding.values())
            calls = [item for item in self._waiting if isinstance(item, _Call)]
        for save in unanswered:
            self._finish(save, self._ended(cause))
        for call in calls:
            call.fail(self._ended(cause))
        self._store.close()

    def _ended(self, cause: BaseException | None) -> StoreError:
        error = StoreError(f"{self._ended_because}; nothing was acknowledged")
        error.__cause__ = cause
        return error
