"""What a store must refuse: bounds of what enters it, and when a save or a permit is allowed.

Pure, so that every store applies the same rules. Imported by the stores.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence

from vtpm.errors import ConflictError, ProtocolError, StateError, UsageError
from vtpm.tpm.types import InstanceId, StateKind
from vtpm.vault.envelope import MAX_ENVELOPE_BYTES
from vtpm.vault.records import (
    DIGEST_BYTES,
    MAX_COUNTER,
    MAX_DETAIL_CHARS,
    MAX_ENGINE_VERSION,
    MAX_ID,
    MAX_WORD_CHARS,
    MAX_WRAPPED_KEY_BYTES,
    PERMIT_BYTES,
    Event,
    Permit,
    PermitState,
    SavedState,
    SaveMark,
    SaveRequest,
    VtpmRecord,
    valid_name,
)

FROZEN = "frozen"
INERT = "inert"
RUNNING = "running"
STOPPED = "stopped"
_MOVING = frozenset({FROZEN, INERT})
"""Words for a vTPM that another host may run. Only a change of its holding gives or takes them."""


def check_new_record(record: VtpmRecord, states: Sequence[SavedState] = (), *, moving: bool = False) -> None:
    """Raise UsageError unless this is a record that a new vTPM may begin with, and these its first states.

    Args:
        moving: whether it comes from another host, and may have volatile state of this very moment with it, and an
            instance that waits for it.
    """
    valid_name(record.name)
    check_word(record.lifecycle)
    if record.wrapped_key is not None:
        check_wrapped_key(record.wrapped_key)
    if not (0 <= record.owner_uid <= MAX_ID and 0 <= record.owner_gid <= MAX_ID):
        raise UsageError(f"vTPM {record.name}: {record.owner_uid}:{record.owner_gid} is no owner")
    if not 1 <= record.epoch <= MAX_COUNTER:
        raise UsageError(f"vTPM {record.name}: epoch {record.epoch} is out of bounds")
    if record.created_at.tzinfo is None:
        raise UsageError(f"vTPM {record.name}: its time of creation has no time zone")
    if moving and record.instance_id is not None:
        check_engine_version(record.engine_version)
    elif record.instance_id is not None or record.engine_version:
        raise UsageError(f"vTPM {record.name}: a new one has no instance")
    if states:
        _check_first_states(record, states, volatile=moving)
    elif (record.permit, record.state_version) != (Permit(), 0):
        raise UsageError(f"vTPM {record.name}: a new one without saved state has an open permit and version 0")


def _check_first_states(record: VtpmRecord, states: Sequence[SavedState], *, volatile: bool) -> None:
    permit_id = record.permit.permit_id
    if record.permit.state is not PermitState.CONSUMED or permit_id is None or len(permit_id) != PERMIT_BYTES:
        raise UsageError(f"vTPM {record.name}: one that begins with saved state has a permit that was used")
    if not 1 <= record.state_version <= MAX_COUNTER:
        raise UsageError(f"vTPM {record.name}: state version {record.state_version} is out of bounds")
    kinds = [state.kind for state in states]
    passing = StateKind.VOLATILE in kinds and not volatile
    if len(set(kinds)) != len(kinds) or StateKind.PERMANENT not in kinds or passing:
        raise UsageError(f"vTPM {record.name}: it begins with permanent state, each kind once, and none that passes")
    for state in states:
        belongs = (state.vtpm_id, state.epoch) == (record.id, record.epoch)
        if not belongs or not 1 <= state.version <= record.state_version:
            raise UsageError(
                f"vTPM {record.name}: its first {state.kind.name.lower()} state is of another vTPM or time"
            )
        if not 1 <= len(state.envelope) <= MAX_ENVELOPE_BYTES:
            raise UsageError(f"vTPM {record.name}: an envelope of {len(state.envelope)} bytes is none")


def check_word(word: str) -> None:
    """Raise UsageError unless this is a short printable word, as life cycle states and kinds of event are."""
    if not (1 <= len(word) <= MAX_WORD_CHARS and word.isascii() and word.isprintable()):
        raise UsageError(f"{word[:80]!r} is not a word of 1 to {MAX_WORD_CHARS} ASCII characters")


def check_may_run(record: VtpmRecord) -> None:
    """Raise ConflictError when another host has the right to run the vTPM, or may have it."""
    if record.lifecycle in _MOVING:
        raise ConflictError(
            f"vTPM {record.name} is {record.lifecycle}: it is on its way from or to another host",
            next_step="See vtpm migrate --status",
        )


def check_no_move(word: str) -> None:
    """Raise ConflictError when this word of a vTPM's life is one that only a change of its holding gives."""
    if word in _MOVING:
        raise ConflictError(f"a vTPM becomes {word} by a migration alone")


def check_wrapped_key(wrapped_key: bytes) -> None:
    """Raise UsageError unless the wrapped key is of a size that the store keeps."""
    if not 1 <= len(wrapped_key) <= MAX_WRAPPED_KEY_BYTES:
        raise UsageError(f"a wrapped key has {len(wrapped_key)} bytes; 1 to {MAX_WRAPPED_KEY_BYTES} can be kept")


def check_event(event: Event) -> None:
    """Raise UsageError unless the event can be kept and read again."""
    check_word(event.kind)
    if event.time.tzinfo is None:
        raise UsageError(f"event {event.kind}: its time has no time zone")
    if event.actor_uid is not None and not 0 <= event.actor_uid <= MAX_ID:
        raise UsageError(f"event {event.kind}: {event.actor_uid} is no uid")
    if event.vtpm_name is not None:
        valid_name(event.vtpm_name)
    if len(event.detail) > MAX_DETAIL_CHARS:
        raise UsageError(f"event {event.kind}: its detail has more than {MAX_DETAIL_CHARS} characters")
    try:
        detail = json.loads(event.detail)
    except ValueError as error:
        raise UsageError(f"event {event.kind}: its detail is not JSON") from error
    if not isinstance(detail, dict):
        raise UsageError(f"event {event.kind}: its detail is not a JSON object")


def check_engine_version(engine_version: int) -> None:
    """Raise UsageError unless this is MAJOR<<16 | MINOR<<8 | MICRO in 32 bits, and not 0."""
    if not 1 <= engine_version <= MAX_ENGINE_VERSION:
        raise UsageError(f"{engine_version} is no engine version")


def check_bound(record: VtpmRecord, instance_id: InstanceId) -> None:
    """Raise ConflictError unless this instance is the one bound to the vTPM."""
    if record.instance_id != instance_id:
        raise ConflictError(
            f"vTPM {record.name}: instance {instance_id} is not bound, {record.instance_id or 'none'} is"
        )


def check_never_saved(record: VtpmRecord, states: Sequence[SavedState]) -> None:
    """Raise StateError unless this vTPM truly never had state: any sign of one forbids making it blank."""
    if record.permit.state is PermitState.CONSUMED:
        raise StateError(
            f"vTPM {record.name} was manufactured before and is never made blank again;"
            " if its permanent state is missing, it was lost",
            next_step="Restore the store from a backup.",
        )
    if record.state_version or states:
        raise StateError(f"vTPM {record.name} has saved state although its permit was never used")


def check_save_bounds(save: SaveRequest) -> None:
    """Raise ProtocolError unless all fields of the save are within bounds."""
    within = (
        0 <= save.seq <= MAX_COUNTER
        and 1 <= save.epoch <= MAX_COUNTER
        and 1 <= save.version <= MAX_COUNTER
        and len(save.digest) == DIGEST_BYTES
        and len(save.envelope) <= MAX_ENVELOPE_BYTES
    )
    if not within:
        raise ProtocolError(f"vTPM {save.vtpm_id}: save {save.seq} has a field out of bounds")


def is_replay(record: VtpmRecord, mark: SaveMark | None, save: SaveRequest) -> bool:
    """Tell whether the save is the bound instance's last committed one, sent again.

    Raises:
        ProtocolError: it is neither that nor later.
    """
    if mark is None or mark.instance_id != save.instance_id or save.seq > mark.seq:
        return False
    if save.seq == mark.seq and hmac.compare_digest(save.digest, mark.digest):
        return True
    raise ProtocolError(
        f"vTPM {record.name}: save {save.seq} is older than the committed save {mark.seq}, or differs from it"
    )


def check_save(record: VtpmRecord, save: SaveRequest) -> None:
    """Raise unless the save, which is no replay, may be committed to the record as it now stands.

    Raises:
        StateError: another epoch, a version that is not newer, or the permit forbids it.
        ProtocolError: permanent state is to be deleted, or the instance has loaded nothing yet.
    """
    if not record.engine_version:
        raise ProtocolError(f"vTPM {record.name}: its instance saves before it has loaded")
    if save.epoch != record.epoch:
        raise StateError(f"vTPM {record.name} is in epoch {record.epoch}; a save of epoch {save.epoch} is refused")
    if save.version <= record.state_version:
        raise StateError(f"vTPM {record.name} has state version {record.state_version}; {save.version} is not newer")
    if save.kind is StateKind.PERMANENT and not save.envelope:
        raise ProtocolError(f"vTPM {record.name}: permanent state goes only when the vTPM is deleted")
    _check_permit(record, save)


def _check_permit(record: VtpmRecord, save: SaveRequest) -> None:
    permit = record.permit
    if permit.state is PermitState.CONSUMED:
        if save.permit_id is not None:
            raise StateError(f"vTPM {record.name} was manufactured before; its permit is used up")
        return
    if save.kind is not StateKind.PERMANENT:
        raise StateError(f"vTPM {record.name} has no permanent state yet; nothing else can be saved before")
    if permit.permit_id is None or save.permit_id is None:
        raise StateError(f"vTPM {record.name}: its first permanent state comes without an issued permit")
    if not hmac.compare_digest(permit.permit_id, save.permit_id):
        raise StateError(f"vTPM {record.name}: its first permanent state comes with another permit")
