"""When the store's content is anchored in the platform TPM, and what may be acknowledged before.

The rules only, as a state machine without thread or clock; the committer drives it. Imported by the committer; the
Protocol and the policy also by the stores and the manager.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vtpm.errors import StateError, UsageError
from vtpm.vault.root_record import AnchorValue
from vtpm.vault.store import Store


class AnchorKeeper(Protocol):
    """Whoever keeps one AnchorValue where no writer of the disk can put an older one back."""

    def read(self) -> AnchorValue:
        """Return the anchored value, NOTHING_ANCHORED before the first.

        Raises:
            UnavailableError, PlatformTpmError, StoreError: it cannot be had now.
        """
        ...

    def write(self, value: AnchorValue) -> None:
        """Anchor a value; it outlives power loss when this returns. Must return or raise within a bounded time.

        Writing what is anchored already does nothing: after an error the same value comes again.

        Raises:
            UnavailableError, PlatformTpmError, StoreError: it may or may not be anchored.
            StateError: a later version is anchored, or the same one with another digest; nothing was changed.
        """
        ...


class AnchorMode(enum.StrEnum):
    """When changes are anchored."""

    EACH_COMMIT = "each-commit"
    INTERVAL = "interval"


@dataclass(frozen=True)
class AnchorPolicy:
    """When changes are anchored.

    Args:
        interval_s: how long an answered change may wait for its anchor; None anchors before answering.
    Raises:
        UsageError: the interval is not above 0.
    """

    interval_s: float | None = None

    def __post_init__(self) -> None:
        if self.interval_s is not None and not self.interval_s > 0:
            raise UsageError(f"an anchor interval of {self.interval_s} s is none; it is above 0")

    @property
    def mode(self) -> AnchorMode:
        """The policy's name."""
        return AnchorMode.EACH_COMMIT if self.interval_s is None else AnchorMode.INTERVAL


@dataclass(frozen=True)
class AnchorStats:
    """What `vtpm status` says of the anchor.

    Args:
        window_s: how much that was answered a rollback of all files could undo unnoticed, in seconds; 0: nothing.
        version, anchored_version: of the store and of the anchor.
        transactions, anchor_writes: since the manager started.
        oldest_unanchored_s: age of the oldest change that is not anchored, or None.
        failure: why the last attempt to anchor failed, empty when it did not.
    """

    mode: AnchorMode
    window_s: float
    version: int
    anchored_version: int
    transactions: int
    anchor_writes: int
    oldest_unanchored_s: float | None
    failure: str


class Anchoring:
    """What is anchored, what is being anchored, and what has to be.

    Times are seconds of one monotonic clock, given by the caller.

    Args:
        store: opened, and anchored as it is.
    """

    def __init__(self, store: Store, policy: AnchorPolicy) -> None:
        self.anchored = store.value
        self.failure = ""
        self.refusal: StateError | None = None
        self._store = store
        self._policy = policy
        self._attempted: AnchorValue | None = None
        self._first_version = store.value.version
        self._writes = 0
        # When the first change came that is later than what is anchored, and than what is being anchored.
        self._unanchored_since: float | None = None
        self._unattempted_since: float | None = None
        store.set_ancestors(self.anchored, self.anchored)

    @property
    def unanchored(self) -> bool:
        """Whether the store is ahead of the anchor."""
        return self._store.value.version > self.anchored.version

    def changed(self, now: float) -> None:
        """Note that the store may have changed just now."""
        if self.unanchored and self._unanchored_since is None:
            self._unanchored_since = now
        attempted = self._attempted
        if attempted is not None and self._unattempted_since is None and self._store.value.version > attempted.version:
            self._unattempted_since = now

    def due_at(self) -> float | None:
        """Return when the store has to be anchored: long ago for at once, None when it is."""
        if not self.unanchored or self.refusal is not None:
            return None
        at_once = self._policy.interval_s is None or self._store.prompt_version > self.anchored.version
        if at_once or self._attempted is not None or self._unanchored_since is None:
            return 0.0
        return self._unanchored_since + (self._policy.interval_s or 0.0)

    def begin(self) -> AnchorValue:
        """Return the value to anchor now. While the fate of an earlier one is unknown, it is that one."""
        if self._attempted is None:
            self._attempted = self._store.value
            self._unattempted_since = None
            # Records from here on may find either in the platform TPM.
            self._store.set_ancestors(self.anchored, self._attempted)
        return self._attempted

    def succeeded(self) -> None:
        """Note that the value of `begin` is anchored."""
        assert self._attempted is not None
        self.anchored, self._attempted = self._attempted, None
        self._unanchored_since, self._unattempted_since = self._unattempted_since, None
        self._store.set_ancestors(self.anchored, self.anchored)
        self._writes += 1
        self.failure = ""

    def failed(self, error: Exception) -> None:
        """Note that it is unknown whether the value of `begin` is anchored."""
        self.failure = str(error)
        if isinstance(error, StateError):
            self.refusal = error

    def counts(self, version: int, must: int, now: float) -> bool:
        """Tell whether what was done up to `version` may be acknowledged.

        Args:
            must: the version that has to be anchored whatever the interval is.
        """
        if self.refusal is not None or self.anchored.version < must:
            return False
        if self.anchored.version >= version:
            return True
        since, interval_s = self._unanchored_since, self._policy.interval_s
        return interval_s is not None and (since is None or now < since + interval_s)

    def must(self, *, prompt_since: int) -> int:
        """Return the version that must be anchored before what was just done counts; 0 leaves it to the policy.

        Args:
            prompt_since: prompt changes up to this version are not its own; 0: whatever is unanchored is.
        """
        prompt = self._store.prompt_version
        return prompt if prompt > prompt_since else 0

    def stats(self, now: float) -> AnchorStats:
        """Return the figures."""
        since = self._unanchored_since
        version = self._store.value.version
        return AnchorStats(
            mode=self._policy.mode,
            window_s=self._policy.interval_s or 0.0,
            version=version,
            anchored_version=self.anchored.version,
            transactions=version - self._first_version,
            anchor_writes=self._writes,
            oldest_unanchored_s=None if since is None else now - since,
            failure=self.failure,
        )
