"""A store in memory that keeps what the engine gives it, and short ways to an engine. Test code only."""

from __future__ import annotations

from vtpm.engine.engine import Engine, Origin
from vtpm.tpm.types import StateKind, TpmVersion


class MemoryStore:
    """Keeps the blobs stored last, and the order in which they came."""

    def __init__(self) -> None:
        self.state: dict[StateKind, bytes] = {}
        self.calls: list[tuple[StateKind, int]] = []
        self.failure: Exception | None = None

    def __call__(self, kind: StateKind, blob: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append((kind, len(blob)))
        if blob:
            self.state[kind] = blob
        else:
            del self.state[kind]


def powered(version: TpmVersion, state: dict[StateKind, bytes] | None = None) -> tuple[Engine, MemoryStore]:
    """An engine that runs on `state`, or is manufactured when there is none."""
    store = MemoryStore()
    engine = Engine(version, store)
    store.state.update(state or {})
    engine.power_on(state or {}, origin=Origin.SAVED if state else Origin.MANUFACTURE)
    return engine, store


def manufacture(version: TpmVersion) -> dict[StateKind, bytes]:
    """State of a new TPM."""
    engine, store = powered(version)
    engine.power_off()
    return store.state
