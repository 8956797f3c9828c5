"""The vault as the manager uses it: keys of running vTPMs, sealing, loading, saving.

All cryptography of saved state happens here, in the calling thread, so that a vTPM with large state costs its
own caller and not its siblings. No root key is ever here. Imported by the manager and migration.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from vtpm.errors import ConflictError, StoreError
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, StateKind, TpmVersion, VtpmId
from vtpm.vault.anchor import AnchorStats
from vtpm.vault.committer import SAVE_PATIENCE_S, Committer
from vtpm.vault.contents import open_saved
from vtpm.vault.envelope import StateMeta, save_digest, seal
from vtpm.vault.records import SaveAck, SavedState, SaveRequest, VtpmRecord
from vtpm.vault.rules import check_bound, check_engine_version
from vtpm.vault.store import Store

T = TypeVar("T")

ANSWER_TIMEOUT_S = 10.0
"""Bound on waiting for the store's thread in `open_vtpm` and `load`."""
LOAD_PATIENCE_S = 4.0
"""How long the anchor is given when state is taken: what is had once is gone then, so giving up early would lose it. An
instance waits a second longer."""


@dataclass(frozen=True)
class PermitGranted:
    """There is no state and never was: this permit allows making it, once."""

    permit_id: bytes = field(repr=False)


@dataclass
class _Session:
    """What is held of a vTPM between `open_vtpm` and `close_vtpm`.

    Args:
        version: the last state version given out; one that failed is not given out again.
    """

    key: Secret
    tpm_version: TpmVersion
    epoch: int
    version: int
    engine_version: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Vault:
    """Seals and opens the state of running vTPMs. Methods may be called from any thread.

    Args:
        committer: owns the store; closed by whoever made it, after this vault.
    """

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._sessions: dict[VtpmId, _Session] = {}
        self._lock = threading.Lock()

    def open_vtpm(self, vtpm_id: VtpmId, key: bytes) -> None:
        """Keep a vTPM's own key until `close_vtpm`, so that its state can be loaded and saved. Blocks.

        Also right for a vTPM that ran on while the manager restarted: it saves without loading again.

        Args:
            key: KEY_BYTES bytes, from the keeper.
        Raises:
            ConflictError: it is open already.
            NotFoundError, StoreError, StateError: as the store says.
        """
        secret = Secret(key)
        record = self._answer(lambda store: store.get_vtpm(vtpm_id))
        session = _Session(secret, record.tpm_version, record.epoch, record.state_version, record.engine_version)
        with self._lock:
            if vtpm_id in self._sessions:
                raise ConflictError(f"vTPM {record.name} is open in the vault already")
            self._sessions[vtpm_id] = session

    def renew(self, vtpm_id: VtpmId) -> None:
        """Go on with a vTPM that is open, whose epoch is another by now: what was sealed for the one before is refused.

        Blocks. Raises ConflictError: it is not open. NotFoundError, StoreError, StateError: as the store says.
        """
        session = self._session(vtpm_id)
        record = self._answer(lambda store: store.get_vtpm(vtpm_id))
        with session.lock:
            session.epoch = record.epoch
            session.version = max(session.version, record.state_version)

    def close_vtpm(self, vtpm_id: VtpmId) -> None:
        """Drop the vTPM's key. A save under way goes on; again does nothing."""
        with self._lock:
            session = self._sessions.pop(vtpm_id, None)
        if session is not None:
            with session.lock:
                session.key.wipe()

    def close(self) -> None:
        """Drop all keys."""
        for vtpm_id in list(self._sessions):
            self.close_vtpm(vtpm_id)

    def load(
        self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int
    ) -> Mapping[StateKind, bytes] | PermitGranted:
        """Return all saved state in the clear, or the permit to make the first. Blocks.

        Volatile state, which can be had once, is taken only after all is verified: a refusal changes nothing.

        Args:
            instance_id: must be the bound one.
            engine_version: of the instance's engine, MAJOR<<16 | MINOR<<8 | MICRO.
        Raises:
            StateError: state is damaged, foreign, missing or needs a newer engine. No other answer follows.
            ConflictError: the vTPM is not open, the instance not bound, or the state changed meanwhile.
            StoreError: the store cannot be reached; a later load may go through.
        """
        check_engine_version(engine_version)
        session = self._session(vtpm_id)
        record, saved = self._answer(lambda store: (store.get_vtpm(vtpm_id), store.read_state(vtpm_id)))
        check_bound(record, instance_id)
        if not any(state.kind is StateKind.PERMANENT for state in saved):
            permit_id = self._answer(
                lambda store: store.issue_permit(vtpm_id, instance_id, engine_version), LOAD_PATIENCE_S
            )
            with session.lock:
                session.engine_version = engine_version
            return PermitGranted(permit_id)
        with session.lock:
            contents = {state.kind: open_saved(session.key, record, state, engine_version) for state in saved}
        taken, record = self._answer(
            lambda store: (store.load_state(vtpm_id, instance_id, engine_version), store.get_vtpm(vtpm_id)),
            LOAD_PATIENCE_S,
        )
        _check_same(record, saved, taken)
        with session.lock:
            session.engine_version = engine_version
            session.version = max(session.version, record.state_version)
        return contents

    def save(
        self,
        vtpm_id: VtpmId,
        instance_id: InstanceId,
        seq: int,
        kind: StateKind,
        data: bytes,
        permit_id: bytes | None = None,
        *,
        patience_s: float = SAVE_PATIENCE_S,
    ) -> Future[SaveAck]:
        """Seal one blob of state and have it committed. Does not block on the store.

        Args:
            seq: the instance's count of saves, over all kinds. The last one sent again is acknowledged again.
            data: at most MAX_STATE_BYTES bytes in the clear; empty deletes this kind.
            permit_id: with the first permanent state, and only then.
            patience_s: see Committer.submit.
        Returns:
            Future of the acknowledgement; when it has a result, the save is durable. See Committer.submit and
            Store.commit_saves for its errors.
        Raises:
            ConflictError: the vTPM is not open, or its instance has not loaded.
            ProtocolError: the data is too large, or a save of this instance is outstanding.
            StoreError: too much is waiting, or the store is closed.
        """
        session = self._session(vtpm_id)
        with session.lock:
            if not session.engine_version:
                raise ConflictError(f"vTPM {vtpm_id} has not loaded its state and cannot save any")
            session.version += 1
            meta = StateMeta(vtpm_id, kind, session.tpm_version, session.epoch, session.version, session.engine_version)
            envelope = seal(session.key, meta, data) if data else b""
            digest = save_digest(session.key, vtpm_id, instance_id, seq, kind, data)
        request = SaveRequest(vtpm_id, instance_id, seq, digest, kind, meta.epoch, meta.version, envelope, permit_id)
        return self._committer.submit(request, patience_s=patience_s)

    def stats(self) -> AnchorStats:
        """Return what `vtpm status` says of the anchor and of the window that it leaves."""
        return self._committer.stats()

    def _session(self, vtpm_id: VtpmId) -> _Session:
        with self._lock:
            session = self._sessions.get(vtpm_id)
        if session is None:
            raise ConflictError(f"vTPM {vtpm_id} is not open in the vault")
        return session

    def _answer(self, operation: Callable[[Store], T], patience_s: float = SAVE_PATIENCE_S) -> T:
        try:
            return self._committer.run(operation, patience_s=patience_s).result(ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            raise StoreError(f"the store did not answer within {ANSWER_TIMEOUT_S:g} s") from error


def _check_same(record: VtpmRecord, verified: Sequence[SavedState], taken: Sequence[SavedState]) -> None:
    if list(verified) != list(taken):
        raise ConflictError(f"state of vTPM {record.name} changed while it was loaded", next_step="Load it again.")
