"""One example and a Hypothesis strategy for every message of the manager link, for unit tests and fuzzing."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vtpm.tpm.types import MAX_SEALED_BYTES, MAX_STATE_BYTES, Startup, StateKind, TpmVersion
from vtpm.wire import manager_link as ml

DIGEST = bytes(range(32))
PERMIT = bytes(range(1, 17))

LINK_EXAMPLES: dict[str, Any] = {
    "hello": ml.Hello(bytes(range(16))),
    "power_on": ml.PowerOn(1, Startup.CLEAR),
    "shutdown": ml.Shutdown(2, ml.ShutdownMode.IMMEDIATE),
    "state_chunk": ml.StateChunk(3, StateKind.VOLATILE, 1000, 500, b"\xc0\xdb\xdc\xdd"),
    "state_end": ml.StateEnd(3, DIGEST),
    "permit": ml.Permit(4, PERMIT),
    "load_error": ml.LoadError(5, ml.Retry.LATER, "store", "the store is away"),
    "saved": ml.Saved(ml.MAX_SEQ),
    "save_error": ml.SaveError(7, ml.Retry.FINAL, "conflict", "größer"),
    "ready": ml.Ready(bytes(16), TpmVersion.V1_2, ml.LinkPower.FAILED, ml.ClientKind.DATA, 0x000902, 0),
    "load": ml.Load(8),
    "save_begin": ml.SaveBegin(9, StateKind.PERMANENT, MAX_STATE_BYTES, PERMIT, DIGEST),
    "save_chunk": ml.SaveChunk(9, MAX_STATE_BYTES, b"\0"),
    "power_changed": ml.PowerChanged(ml.LinkPower.ON, "init"),
    "client_changed": ml.ClientChanged(ml.ClientKind.EMULATOR, 4242, 2**32 - 1),
    "done": ml.Done(10, "", ""),
    "note": ml.Note("a second client was refused"),
    "ask_lockout": ml.AskLockout(),
    "lockout_changed": ml.LockoutChanged(True, 32, 32, 7200, 1_790_000_000),
    "departed": ml.Departed(11, MAX_SEALED_BYTES, DIGEST),
    "sealed_part": ml.SealedPart(11, MAX_SEALED_BYTES, b"\xc0"),
    "returned": ml.Returned(12),
    "move_error": ml.MoveError(13, ml.Retry.FINAL, "conflict", "it has moved"),
    "activated": ml.Activated(14),
    "depart": ml.Depart(11, 1, DIGEST),
    "return": ml.Return(12),
    "arrive": ml.Arrive(14, MAX_SEALED_BYTES, DIGEST),
    "move_part": ml.MovePart(14, 0, b"\0"),
    "wanted": ml.Wanted(14),
    "lockout_ended": ml.LockoutChanged(False, 0, 2**32 - 1, 0, 0),
}

_u32 = st.integers(0, 2**32 - 1)
_seq = st.integers(1, ml.MAX_SEQ)
_kind = st.sampled_from(StateKind)
_size = st.integers(0, MAX_STATE_BYTES)
_sealed_size = st.integers(0, MAX_SEALED_BYTES)
# Bytes that mean something to the framing come often.
payload = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.lists(st.sampled_from(b"\xc0\xdb\xdc\xdd\0"), min_size=1, max_size=60).map(bytes),
)
_printable = st.characters(exclude_categories=("C", "Z"))


def _text(most: int) -> st.SearchStrategy[str]:
    return st.text(_printable, max_size=most // 4)


_code, _message = _text(ml.MAX_CODE_BYTES), _text(ml.MAX_TEXT_BYTES)
_retry = st.sampled_from(ml.Retry)
_id, _digest = st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)
_power, _client = st.sampled_from(ml.LinkPower), st.sampled_from(ml.ClientKind)

to_instance = st.one_of(
    st.builds(ml.Hello, _id),
    st.builds(ml.PowerOn, _seq, st.sampled_from(Startup)),
    st.builds(ml.Shutdown, _seq, st.sampled_from(ml.ShutdownMode)),
    st.builds(ml.StateChunk, _seq, _kind, _size, _size, payload),
    st.builds(ml.StateEnd, _seq, _digest),
    st.builds(ml.Permit, _seq, _id),
    st.builds(ml.LoadError, _seq, _retry, _code, _message),
    st.builds(ml.Saved, _seq),
    st.builds(ml.SaveError, _seq, _retry, _code, _message),
    st.just(ml.AskLockout()),
    st.builds(ml.Departed, _seq, _sealed_size, _digest),
    st.builds(ml.SealedPart, _seq, _sealed_size, payload),
    st.builds(ml.Returned, _seq),
    st.builds(ml.MoveError, _seq, _retry, _code, _message),
    st.builds(ml.Activated, _seq),
)
to_manager = st.one_of(
    st.builds(ml.Ready, _id, st.sampled_from(TpmVersion), _power, _client, _u32, _u32),
    st.builds(ml.Load, _seq),
    st.builds(ml.SaveBegin, _seq, _kind, _size, _id, _digest),
    st.builds(ml.SaveChunk, _seq, _size, payload),
    st.builds(ml.PowerChanged, _power, _message),
    st.builds(ml.ClientChanged, _client, _u32, _u32),
    st.builds(ml.Done, _seq, _code, _message),
    st.builds(ml.Note, _message),
    st.builds(ml.LockoutChanged, st.booleans(), _u32, _u32, _u32, st.integers(0, ml.MAX_UNIX_TIME_S)),
    st.builds(ml.Depart, _seq, _sealed_size, _digest),
    st.builds(ml.Return, _seq),
    st.builds(ml.Arrive, _seq, _sealed_size, _digest),
    st.builds(ml.MovePart, _seq, _sealed_size, payload),
    st.builds(ml.Wanted, _seq),
)
