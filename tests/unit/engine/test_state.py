"""State that goes out through the store comes back in, and nothing ever makes a blank TPM without the permit."""

from __future__ import annotations

import hashlib

import pytest

from tests.unit.engine import commands as c
from tests.unit.engine.conftest import State
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import MemoryStore, manufacture, powered
from vtpm.engine.engine import Engine, Origin
from vtpm.errors import EngineError, StateError
from vtpm.tpm.return_codes import Rc12, Rc20
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind, TpmVersion

INDEX_20 = 0x01500001
INDEX_12 = 0x00001001
DATA = b"kept over power!"
DIGEST = hashlib.sha256(b"event").digest()
PERMANENT, VOLATILE, SAVESTATE = StateKind.PERMANENT, StateKind.VOLATILE, StateKind.SAVESTATE


def _use_20(state: State) -> tuple[State, bytes]:
    engine, store = powered(TpmVersion.V2_0, state)
    for command in (
        c.startup(),
        c.pcr_extend(0, DIGEST),
        c.nv_define(INDEX_20, len(DATA)),
        c.nv_write(INDEX_20, DATA),
    ):
        assert c.code_of(engine.process(command)) == 0
    pcr = c.pcr_value(engine.process(c.pcr_read(0)))
    engine.power_off()
    return store.state, pcr


def _look_20(state: State) -> tuple[bytes, bytes]:
    engine, _ = powered(TpmVersion.V2_0, state)
    assert c.code_of(engine.process(c.startup())) == 0
    data = c.nv_value(engine.process(c.nv_read(INDEX_20, len(DATA))), len(DATA))
    return data, c.pcr_value(engine.process(c.pcr_read(0)))


def test_nv_data_comes_back_and_pcrs_begin_anew_when_power_returns_in_another_process(new_20: State) -> None:
    used, pcr = in_process(_use_20, new_20)
    assert pcr == hashlib.sha256(bytes(32) + DIGEST).digest()
    assert in_process(_look_20, used) == (DATA, bytes(32))


def test_manufacture_stores_permanent_state_before_it_returns_when_tpm_is_new(new_20: State) -> None:
    assert set(new_20) == {PERMANENT}
    assert in_process(manufacture, TpmVersion.V2_0) != new_20


def _power_cycle_in_one_process(state: State) -> tuple[bytes, bytes]:
    engine, store = powered(TpmVersion.V2_0, state)
    engine.process(c.startup())
    engine.process(c.nv_define(INDEX_20, len(DATA)))
    engine.process(c.nv_write(INDEX_20, DATA))
    engine.process(c.pcr_extend(0, DIGEST))
    engine.power_off()
    engine.power_off()
    assert not engine.powered
    engine.power_on(store.state, origin=Origin.SAVED)
    assert engine.powered
    engine.process(c.startup())
    data = c.nv_value(engine.process(c.nv_read(INDEX_20, len(DATA))), len(DATA))
    return data, c.pcr_value(engine.process(c.pcr_read(0)))


def test_engine_runs_again_when_powered_off_and_on(new_20: State) -> None:
    assert in_process(_power_cycle_in_one_process, new_20) == (DATA, bytes(32))


def _volatile(version: TpmVersion, state: State) -> State:
    engine, _ = powered(version, state)
    if version is TpmVersion.V2_0:
        engine.process(c.startup())
        engine.process(c.pcr_extend(5, DIGEST))
    else:
        engine.process(c.startup_12())
        engine.process(c.pcr_extend_12(5, DIGEST[:20]))
    return {PERMANENT: engine.get_state(PERMANENT), VOLATILE: engine.get_state(VOLATILE)}


def _pcr_5(version: TpmVersion, state: State) -> bytes:
    engine, _ = powered(version, state)
    if version is TpmVersion.V2_0:
        return c.pcr_value(engine.process(c.pcr_read(5)))
    return c.value_12(engine.process(c.pcr_read_12(5)), 20)


def test_pcrs_go_on_without_startup_when_volatile_state_is_given(new_20: State) -> None:
    state = in_process(_volatile, TpmVersion.V2_0, new_20)
    assert in_process(_pcr_5, TpmVersion.V2_0, state) == hashlib.sha256(bytes(32) + DIGEST).digest()


def test_pcrs_of_tpm_12_go_on_without_startup_when_volatile_state_is_given(new_12: State) -> None:
    state = in_process(_volatile, TpmVersion.V1_2, new_12)
    assert in_process(_pcr_5, TpmVersion.V1_2, state) == hashlib.sha1(bytes(20) + DIGEST[:20]).digest()


def _save_12(state: State) -> tuple[State, bytes]:
    engine, store = powered(TpmVersion.V1_2, state)
    engine.process(c.startup_12())
    engine.process(c.pcr_extend_12(10, DIGEST[:20]))
    with pytest.raises(StateError, match="no savestate"):
        engine.get_state(SAVESTATE)
    assert c.code_of(engine.process(c.save_state_12())) == 0
    assert engine.get_state(SAVESTATE) == store.state[SAVESTATE]
    engine.power_off()
    return store.state, b""


def _resume_12(state: State) -> tuple[bytes, State, bool]:
    engine, store = powered(TpmVersion.V1_2, state)
    assert c.code_of(engine.process(c.startup_12(c.STARTUP_STATE_12))) == 0
    return c.value_12(engine.process(c.pcr_read_12(10)), 20), store.state, (SAVESTATE, 0) in store.calls


def test_pcrs_of_tpm_12_resume_and_savestate_is_deleted_when_started_from_it(new_12: State) -> None:
    saved, _ = in_process(_save_12, new_12)
    pcr, state, deleted = in_process(_resume_12, saved)
    assert pcr == hashlib.sha1(bytes(20) + DIGEST[:20]).digest()
    assert deleted
    assert SAVESTATE not in state


def _load_again(version: TpmVersion, state: State) -> tuple[int, bytes, bytes]:
    """What libtpms is given if it loads permanent state while it runs; TPM 1.2 does so to roll back."""
    engine, store = powered(version, state)
    new = version is TpmVersion.V2_0
    engine.process(c.startup() if new else c.startup_12())
    define = c.nv_define(INDEX_20, 16) if new else c.nv_define_12(INDEX_12, 16)
    assert c.code_of(engine.process(define)) == 0
    assert store.state[PERMANENT] != state[PERMANENT]
    ffi = engine._ffi
    data, length = ffi.new("unsigned char **"), ffi.new("uint32_t *")
    result = engine._nvram._load(data, length, ffi.new("char[]", b"permall"))
    return result, bytes(ffi.buffer(data[0], length[0])) if data[0] else b"", store.state[PERMANENT]


def test_tpm_12_is_given_what_it_stored_last_when_it_loads_to_roll_back(new_12: State) -> None:
    result, loaded, stored = in_process(_load_again, TpmVersion.V1_2, new_12)
    assert result == Rc12.TPM_SUCCESS
    assert loaded == stored


def test_tpm_20_is_given_an_error_and_never_none_when_it_loads_while_running(new_20: State) -> None:
    assert in_process(_load_again, TpmVersion.V2_0, new_20)[:2] == (Rc12.TPM_FAIL, b"")


def _nv_data_12(state: State) -> tuple[State, bytes]:
    engine, store = powered(TpmVersion.V1_2, state)
    assert c.code_of(engine.process(c.startup_12())) == 0
    if not engine.process(c.nv_read_12(INDEX_12, len(DATA))).endswith(DATA):
        assert c.code_of(engine.process(c.nv_define_12(INDEX_12, len(DATA)))) == 0
        assert c.code_of(engine.process(c.nv_write_12(INDEX_12, DATA))) == 0
        return store.state, b""
    return store.state, c.value_12(engine.process(c.nv_read_12(INDEX_12, len(DATA))), len(DATA))


def test_nv_data_of_tpm_12_comes_back_when_power_returns_in_another_process(new_12: State) -> None:
    written, none = in_process(_nv_data_12, new_12)
    assert none == b""
    assert in_process(_nv_data_12, written) == (written, DATA)


def _try_power_on(version: TpmVersion, state: State, origin: Origin) -> tuple[str, list[tuple[StateKind, int]]]:
    store = MemoryStore()
    engine = Engine(version, store)
    with pytest.raises(StateError) as caught:
        engine.power_on(state, origin=origin)
    assert not engine.powered
    with pytest.raises(EngineError, match="powered off"):
        engine.process(c.startup())
    return str(caught.value), store.calls


def _second_line(version: TpmVersion) -> tuple[int, list[tuple[StateKind, int]]]:
    store = MemoryStore()
    engine = Engine(version, store)
    # Past the engine's own check, as a mistake in it would be.
    engine._nvram.offer({}, Origin.SAVED)
    return engine._lib.TPMLIB_MainInit(), store.calls


@pytest.mark.parametrize("version", list(TpmVersion))
def test_libtpms_is_not_told_none_when_it_asks_for_state_without_a_permit(version: TpmVersion) -> None:
    result, stored = in_process(_second_line, version)
    assert result != 0
    assert stored == []


@pytest.mark.parametrize("version", list(TpmVersion))
def test_nothing_is_manufactured_when_saved_state_is_missing(version: TpmVersion) -> None:
    message, stored = in_process(_try_power_on, version, {}, Origin.SAVED)
    assert "no permanent state" in message
    assert stored == []


def test_nothing_is_manufactured_when_there_is_permanent_state_already(new_20: State) -> None:
    message, stored = in_process(_try_power_on, TpmVersion.V2_0, new_20, Origin.MANUFACTURE)
    assert "must not be manufactured again" in message
    assert stored == []


def _damaged(blob: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "one byte": blob[:1],
        "half": blob[: len(blob) // 2],
        "last byte cut": blob[:-1],
        "zeros": bytes(len(blob)),
        "magic flipped": blob[:3] + bytes([blob[3] ^ 0xFF]) + blob[4:],
        "oversized": blob + bytes(MAX_STATE_BYTES),
    }


def _refuse_all(version: TpmVersion, state: State) -> list[str]:
    """Names of the damages that were not refused, or after which good state does not load."""
    store = MemoryStore()
    engine = Engine(version, store)
    accepted = []
    for name, blob in _damaged(state[PERMANENT]).items():
        try:
            engine.power_on({PERMANENT: blob}, origin=Origin.SAVED)
        except StateError:
            pass
        else:
            accepted.append(f"{name} at power-on")
            engine.power_off()
        try:
            engine.validate_state({PERMANENT: blob})
        except StateError:
            pass
        else:
            accepted.append(f"{name} at validation")
    assert store.calls == []
    engine.validate_state(state)
    engine.power_on(state, origin=Origin.SAVED)
    return accepted


def test_permanent_state_is_refused_when_damaged(new_20: State) -> None:
    assert in_process(_refuse_all, TpmVersion.V2_0, new_20) == []


def test_permanent_state_of_tpm_12_is_refused_when_damaged(new_12: State) -> None:
    assert in_process(_refuse_all, TpmVersion.V1_2, new_12, timeout_s=60) == []


def _flip(version: TpmVersion, state: State) -> tuple[int, list[tuple[int, int]]]:
    """Flip every byte in turn; returns how many were refused, and (place, bytes that differ) of odd outcomes.

    libtpms checks structure, not every byte, so some flips load; but a TPM made anew has other seeds, that is, at
    least 64 bytes of permanent state that differ.
    """
    blob = state[PERMANENT]
    store = MemoryStore()
    engine = Engine(version, store)
    refused, odd = 0, []
    for place in range(len(blob)):
        flipped = blob[:place] + bytes([blob[place] ^ 0xFF]) + blob[place + 1 :]
        try:
            engine.power_on({PERMANENT: flipped}, origin=Origin.SAVED)
        except StateError:
            refused += 1
            continue
        now = engine.get_state(PERMANENT)
        engine.power_off()
        differing = sum(a != b for a, b in zip(now, blob, strict=False)) + abs(len(now) - len(blob))
        if differing >= 48:
            odd.append((place, differing))
    assert store.calls == [] or set(store.calls) == {(PERMANENT, len(blob))}
    return refused, odd


def test_no_blank_tpm_comes_up_when_any_byte_of_permanent_state_is_flipped(new_20: State) -> None:
    refused, odd = in_process(_flip, TpmVersion.V2_0, new_20, timeout_s=60)
    assert refused > 100
    assert odd == []


def _damaged_volatile(version: TpmVersion, state: State) -> list[str]:
    engine = Engine(version, MemoryStore())
    accepted = []
    middle = len(state[VOLATILE]) // 2
    blob = state[VOLATILE]
    for name, damaged in {
        "flipped": blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :],
        "cut": blob[:-1],
        "half": blob[:middle],
    }.items():
        given = {**state, VOLATILE: damaged}
        try:
            engine.power_on(given, origin=Origin.SAVED)
        except StateError:
            pass
        else:
            accepted.append(name)
            engine.power_off()
        with pytest.raises(StateError, match="volatile"):
            engine.validate_state(given)
    engine.validate_state(state)
    engine.power_on(state, origin=Origin.SAVED)
    return accepted


def test_volatile_state_is_refused_when_damaged(new_20: State) -> None:
    state = in_process(_volatile, TpmVersion.V2_0, new_20)
    assert in_process(_damaged_volatile, TpmVersion.V2_0, state) == []


def test_volatile_state_of_tpm_12_is_refused_when_damaged(new_12: State) -> None:
    state = in_process(_volatile, TpmVersion.V1_2, new_12)
    assert in_process(_damaged_volatile, TpmVersion.V1_2, state) == []


def _fail_store(version: TpmVersion, state: State) -> tuple[list[int], str, list[tuple[StateKind, int]]]:
    engine, store = powered(version, state)
    new = version is TpmVersion.V2_0
    engine.process(c.startup() if new else c.startup_12())
    assert engine.store_error is None
    store.calls.clear()
    store.failure = OSError(28, "No space left on device")
    commands = (
        [c.nv_define(INDEX_20, 8), c.get_random(8), c.pcr_read(0)]
        if new
        else [c.nv_define_12(INDEX_12, 8), c.pcr_read_12(0), c.pcr_extend_12(0, DIGEST[:20])]
    )
    codes = [c.code_of(engine.process(command)) for command in commands]
    store.failure = None
    codes.append(c.code_of(engine.process(commands[1])))
    error = str(engine.store_error)
    engine.power_off()
    engine.power_on(state, origin=Origin.SAVED)
    assert engine.store_error is None
    assert c.code_of(engine.process(c.startup() if new else c.startup_12())) == 0
    return codes, error, store.calls


def test_every_command_fails_until_power_returns_when_the_store_fails(
    new_20: State, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, error, _ = in_process(_fail_store, TpmVersion.V2_0, new_20)
    assert codes == [Rc20.TPM_RC_FAILURE] * 4
    assert "No space left" in error
    # libtpms would print the command that failed, and with it authorisation values.
    assert capfd.readouterr().err == ""


def test_every_command_of_tpm_12_fails_until_power_returns_when_the_store_fails(
    new_12: State, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, error, _ = in_process(_fail_store, TpmVersion.V1_2, new_12)
    assert 0 not in codes
    assert "No space left" in error
    assert capfd.readouterr().err == ""


def _manufacture_with_failing_store(version: TpmVersion) -> str:
    store = MemoryStore()
    store.failure = StateError("the vault is closed")
    engine = Engine(version, store)
    with pytest.raises(EngineError) as caught:
        engine.power_on({}, origin=Origin.MANUFACTURE)
    assert caught.value.__cause__ is store.failure
    assert not engine.powered
    return str(caught.value)


@pytest.mark.parametrize("version", list(TpmVersion))
def test_no_tpm_comes_up_when_what_was_manufactured_cannot_be_stored(version: TpmVersion) -> None:
    assert "the vault is closed" in in_process(_manufacture_with_failing_store, version, timeout_s=60)


def _savestate_20(state: State) -> None:
    engine = Engine(TpmVersion.V2_0, MemoryStore())
    with pytest.raises(StateError, match="no savestate"):
        engine.power_on({**state, SAVESTATE: b"x"}, origin=Origin.SAVED)
    engine.power_on(state, origin=Origin.SAVED)
    with pytest.raises(StateError, match="no savestate"):
        engine.get_state(SAVESTATE)
    with pytest.raises(EngineError, match="powered on"):
        engine.validate_state(state)


def test_tpm_20_knows_no_savestate_when_asked_or_given_one(new_20: State) -> None:
    in_process(_savestate_20, new_20)
