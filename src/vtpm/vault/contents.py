"""All that is saved of one vTPM at once: opened for a backup, or sealed anew for a vTPM that begins with state.

Pure. Imported by the vault and the manager.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from vtpm.errors import StateError
from vtpm.secret import Secret
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.vault.envelope import Expected, StateMeta, least_engine_version, open_, seal
from vtpm.vault.records import MAX_ENGINE_VERSION, PERMIT_BYTES, Permit, PermitState, SavedState, VtpmRecord

ANY_ENGINE = 0
"""Least engine version of state whose writer is unknown: libtpms itself judges it when it is loaded."""

_CARRIED: Mapping[TpmVersion, frozenset[StateKind]] = {
    TpmVersion.V2_0: frozenset({StateKind.PERMANENT}),
    TpmVersion.V1_2: frozenset({StateKind.PERMANENT, StateKind.SAVESTATE}),
}


@dataclass(frozen=True)
class Contents:
    """Plain state of one vTPM, as libtpms wrote it.

    Args:
        states: by kind; PERMANENT is there.
        engine_version: the least that reads all of it, MAJOR<<16 | MINOR<<8 | MICRO, or ANY_ENGINE.
    """

    states: Mapping[StateKind, bytes] = field(repr=False)
    engine_version: int = ANY_ENGINE


def carried(tpm_version: TpmVersion, states: Mapping[StateKind, bytes]) -> dict[StateKind, bytes]:
    """Return what of these states goes from one life of a vTPM to the next.

    Not volatile state: it is PCRs and sessions of one moment, can be had once, and a copy would give them back twice.
    """
    return {kind: data for kind, data in states.items() if kind in _CARRIED[tpm_version]}


def open_saved(key: Secret, record: VtpmRecord, state: SavedState, engine_version: int) -> bytes:
    """Open one blob against its row, and its row against the record.

    Args:
        key: the vTPM's own.
        engine_version: of the engine that will read it.
    Raises:
        StateError: row, record and envelope do not fit one another, or the engine is too old.
    """
    if record.permit.state is not PermitState.CONSUMED:
        raise StateError(f"vTPM {record.name} has saved state although its permit was never used")
    if state.version > record.state_version or state.epoch > record.epoch:
        raise StateError(
            f"{state.kind.name.lower()} state of vTPM {record.name} is of epoch {state.epoch}, version"
            f" {state.version}, later than the vTPM's own {record.epoch}, {record.state_version}"
        )
    expected = Expected(record.id, state.kind, record.tpm_version, state.epoch, state.version, engine_version)
    return open_(key, expected, state.envelope)


def open_all(
    key: Secret, record: VtpmRecord, saved: Sequence[SavedState], kinds: Collection[StateKind] | None = None
) -> Contents:
    """Open what goes from one life of a vTPM that was manufactured to the next.

    Args:
        kinds: that go; None: those of a backup, see `carried`.
    Raises:
        StateError: as open_saved, or permanent state is missing.
    """
    kinds = _CARRIED[record.tpm_version] if kinds is None else kinds
    wanted = [state for state in saved if state.kind in kinds]
    if not any(state.kind is StateKind.PERMANENT for state in wanted):
        raise StateError(f"vTPM {record.name} was manufactured, and its permanent state is missing")
    states = {state.kind: open_saved(key, record, state, MAX_ENGINE_VERSION) for state in wanted}
    return Contents(states, max(least_engine_version(state.envelope) for state in wanted))


def begin(record: VtpmRecord, key: Secret, contents: Contents) -> tuple[VtpmRecord, list[SavedState]]:
    """Seal the state that a new vTPM begins with.

    Args:
        record: its epoch is bound into every envelope; its state version is the last that was ever given to this vTPM.
        key: the new vTPM's own.
    Returns:
        The record to create it with, its permit used up, and the sealed states.
    Raises:
        StateError: epoch or version are at their end.
        ProtocolError: a state is empty or too large.
    """
    states = []
    version = record.state_version
    for kind, data in sorted(contents.states.items()):
        version += 1
        meta = StateMeta(record.id, kind, record.tpm_version, record.epoch, version, contents.engine_version)
        states.append(SavedState(record.id, kind, version, record.epoch, seal(key, meta, data)))
    # Nobody is ever given this permit, so that nothing can make the vTPM blank.
    used = Permit(PermitState.CONSUMED, secrets.token_bytes(PERMIT_BYTES))
    return dataclasses.replace(record, permit=used, state_version=version), states
