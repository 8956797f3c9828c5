"""The two halves of state transfer on the manager link, as state machines without I/O.

`SaveReceiver` is the manager's half for one instance, `StateReceiver` the instance's half for one Load. May be imported
by everyone.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vtpm.errors import ProtocolError
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind
from vtpm.wire.manager_link import (
    MAX_CHUNK_BYTES,
    NO_PERMIT,
    SaveBegin,
    SaveChunk,
    StateChunk,
    StateEnd,
)


def save_digest(kind: StateKind, data: bytes) -> bytes:
    """Return the SHA-256 that names what a save holds, kind included."""
    return hashlib.sha256(bytes((kind,)) + data).digest()


def state_digest(state: Mapping[StateKind, bytes]) -> bytes:
    """Return the SHA-256 over all state that a Load is answered with: kinds in order, each with its length."""
    total = hashlib.sha256()
    for kind in sorted(state):
        total.update(bytes((kind,)) + len(state[kind]).to_bytes(4, "big") + state[kind])
    return total.digest()


def save_messages(seq: int, kind: StateKind, data: bytes, permit_id: bytes | None) -> Iterator[SaveBegin | SaveChunk]:
    """Cut one save into messages; empty data means delete this kind."""
    yield SaveBegin(seq, kind, len(data), permit_id or NO_PERMIT, save_digest(kind, data))
    for offset in range(0, len(data), MAX_CHUNK_BYTES):
        yield SaveChunk(seq, offset, data[offset : offset + MAX_CHUNK_BYTES])


def state_messages(seq: int, state: Mapping[StateKind, bytes]) -> Iterator[StateChunk | StateEnd]:
    """Cut the answer to a Load into messages. No blob may be empty."""
    for kind in sorted(state):
        data = state[kind]
        for offset in range(0, len(data), MAX_CHUNK_BYTES):
            yield StateChunk(seq, kind, len(data), offset, data[offset : offset + MAX_CHUNK_BYTES])
    yield StateEnd(seq, state_digest(state))


@dataclass(frozen=True)
class CompletedSave:
    """A save of which all has come, and whose digest fits."""

    seq: int
    kind: StateKind
    data: bytes = field(repr=False)
    permit_id: bytes | None = field(repr=False)
    digest: bytes


class SaveReceiver:
    """Puts an instance's saves together.

    What is out of order is refused; no save is under way after that, and the next must begin with SaveBegin. Whether a
    whole save is a replay, or too old, is for the vault to say, which knows the last one committed.
    """

    def __init__(self) -> None:
        self._begin: SaveBegin | None = None
        self._data = bytearray()

    def receive(self, message: SaveBegin | SaveChunk) -> CompletedSave | None:
        """Take a message; return the save if it is complete by it.

        Raises:
            ProtocolError: out of order, of another save, larger than announced, or the digest does not fit.
        """
        if isinstance(message, SaveBegin):
            # Also an instance that repeats a save after a new Hello begins again.
            self._begin = message
            self._data.clear()
        else:
            self._take(message)
        begin = self._begin
        if begin is None or len(self._data) < begin.total:
            return None
        data = bytes(self._data)
        self.reset()
        if not hmac.compare_digest(save_digest(begin.kind, data), begin.digest):
            raise ProtocolError(f"save {begin.seq} does not have the digest that it was announced with")
        permit_id = None if begin.permit_id == NO_PERMIT else begin.permit_id
        return CompletedSave(begin.seq, begin.kind, data, permit_id, begin.digest)

    def reset(self) -> None:
        """Forget a save that is under way."""
        self._begin = None
        self._data.clear()

    def _take(self, chunk: SaveChunk) -> None:
        begin = self._begin
        if begin is None or chunk.seq != begin.seq or chunk.offset != len(self._data):
            self.reset()
            raise ProtocolError(f"a part of save {chunk.seq} at {chunk.offset} is out of order")
        if chunk.offset + len(chunk.data) > begin.total:
            self.reset()
            raise ProtocolError(f"save {chunk.seq} is larger than the {begin.total} bytes announced")
        self._data += chunk.data


class StateReceiver:
    """Puts the answer to one Load together.

    Args:
        seq: of the Load.
    """

    def __init__(self, seq: int) -> None:
        self._seq = seq
        self._blobs: dict[StateKind, bytearray] = {}
        self._totals: dict[StateKind, int] = {}

    def receive(self, message: StateChunk | StateEnd) -> dict[StateKind, bytes] | None:
        """Take a message; return all state if it is complete by it. A chunk at 0 of a kind begins that kind again.

        Raises:
            ProtocolError: of another Load, out of order, or the digest does not fit. Nothing of it may be used.
        """
        if message.seq != self._seq:
            raise ProtocolError(f"state for load {message.seq} came in answer to load {self._seq}")
        if isinstance(message, StateEnd):
            return self._finish(message)
        if message.offset == 0:
            self._blobs[message.kind] = bytearray()
            self._totals[message.kind] = message.total
        blob = self._blobs.get(message.kind)
        if blob is None or message.offset != len(blob) or message.total != self._totals[message.kind]:
            raise ProtocolError(f"a part of {message.kind.name} state at {message.offset} is out of order")
        if message.offset + len(message.data) > min(message.total, MAX_STATE_BYTES):
            raise ProtocolError(f"{message.kind.name} state is larger than the {message.total} bytes announced")
        blob += message.data
        return None

    def _finish(self, end: StateEnd) -> dict[StateKind, bytes]:
        state = {kind: bytes(blob) for kind, blob in self._blobs.items()}
        if any(len(state[kind]) != total for kind, total in self._totals.items()):
            raise ProtocolError("state ended before all of it had come")
        if StateKind.PERMANENT not in state:
            # libtpms would make a blank TPM, which nothing but a permit may tell it to.
            raise ProtocolError("state came without permanent state")
        if not hmac.compare_digest(state_digest(state), end.digest):
            raise ProtocolError("state does not have the digest that it came with")
        return state
