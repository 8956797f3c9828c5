"""Commands, cancel, localities, dynamic launch, buffer sizes and ownership, on real libtpms."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable

import pytest

from tests.unit.engine import commands as c
from tests.unit.engine.conftest import State
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import MemoryStore, powered
from vtpm.engine.engine import BufferSize, Engine, Origin
from vtpm.errors import EngineError, ProtocolError, UsageError
from vtpm.tpm.headers import MAX_COMMAND_BYTES
from vtpm.tpm.return_codes import Rc12, Rc20
from vtpm.tpm.types import Locality, StateKind, TpmVersion

ALL_LOCALITIES = [Locality(number) for number in range(5)]
DIGEST = hashlib.sha256(b"event").digest()


def _started(state: State) -> Engine:
    engine, _ = powered(TpmVersion.V2_0, state)
    assert c.code_of(engine.process(c.startup())) == 0
    return engine


def _commands_of_all_kinds(state: State) -> None:
    engine, _ = powered(TpmVersion.V2_0, state)
    assert c.code_of(engine.process(c.get_random(8))) == Rc20.TPM_RC_INITIALIZE
    assert c.code_of(engine.process(memoryview(b"??" + c.startup())[2:])) == 0
    first, second = (engine.process(c.get_random(16)) for _ in range(2))
    assert c.code_of(first) == c.code_of(second) == 0
    assert len(first) == 28
    assert first != second
    assert c.code_of(engine.process(bytes(10))) != 0
    # The whole buffer, and a size field that lies.
    assert c.code_of(engine.process(c.get_random(8).ljust(MAX_COMMAND_BYTES, b"\0"))) == Rc20.TPM_RC_COMMAND_SIZE


def test_every_answer_is_a_response_when_commands_are_good_early_or_malformed(new_20: State) -> None:
    in_process(_commands_of_all_kinds, new_20)


def _refused_arguments(state: State) -> None:
    engine = _started(state)
    for size in (0, 9, MAX_COMMAND_BYTES + 1):
        with pytest.raises(ProtocolError, match=f"{size} bytes"):
            engine.process(bytes(size))
    for locality in (-1, 5, 256):
        with pytest.raises(UsageError, match="locality"):
            engine.process(c.get_random(8), Locality(locality))
    assert c.code_of(engine.process(c.get_random(8))) == 0


def test_engine_refuses_and_goes_on_when_size_or_locality_is_out_of_bounds(new_20: State) -> None:
    in_process(_refused_arguments, new_20)


def _command_memory(state: State) -> None:
    engine = _started(state)
    session = c.created_handle(engine.process(c.start_session()))
    command = c.hash_encrypted(session, bytes(32))
    before = bytearray(command)
    assert c.code_of(engine.process(command)) == 0
    assert command == before


def test_command_bytes_are_untouched_when_libtpms_decrypts_a_parameter(new_20: State) -> None:
    in_process(_command_memory, new_20)


def _time_s(function: Callable[[], bytes]) -> tuple[bytes, float]:
    begin = time.monotonic()
    response = function()
    return response, time.monotonic() - begin


def _cancel_key_creation(state: State) -> tuple[int, float, float]:
    engine = _started(state)
    durations_s = {}
    for number in range(8):
        command = c.create_primary(3072, bytes([number]) * 8)
        response, durations_s[command] = _time_s(lambda command=command: engine.process(command))
        engine.process(c.flush(c.created_handle(response)))
    longest = max(durations_s, key=lambda command: durations_s[command])
    ended = threading.Event()

    def keep_cancelling() -> None:
        while not ended.wait(0.001):
            engine.cancel()

    canceller = threading.Thread(target=keep_cancelling)
    canceller.start()
    try:
        response, cancelled_s = _time_s(lambda: engine.process(longest))
    finally:
        ended.set()
        canceller.join()
    assert c.code_of(engine.process(c.get_random(8))) == 0
    return c.code_of(response), cancelled_s, durations_s[longest]


def test_key_creation_ends_early_when_cancelled_from_another_thread(new_20: State) -> None:
    code, cancelled_s, whole_s = in_process(_cancel_key_creation, new_20)
    assert code == Rc20.TPM_RC_CANCELED
    assert cancelled_s < whole_s


def _power_off_under_a_command(state: State) -> tuple[list[int], bool]:
    engine = _started(state)
    codes: list[int] = []
    begun = threading.Event()

    def make_keys() -> None:
        begun.set()
        try:
            while True:
                response = engine.process(c.create_primary(3072, os.urandom(8)))
                codes.append(c.code_of(response))
                if not codes[-1]:
                    engine.process(c.flush(c.created_handle(response)))
        except EngineError:
            pass

    worker = threading.Thread(target=make_keys)
    worker.start()
    begun.wait(5)
    engine.power_off()
    worker.join(20)
    return codes, worker.is_alive()


def test_power_off_waits_for_the_command_when_one_runs_in_another_thread(new_20: State) -> None:
    codes, alive = in_process(_power_off_under_a_command, new_20)
    assert not alive
    assert set(codes) <= {0, Rc20.TPM_RC_CANCELED}


def _other_threads_run(state: State) -> int:
    engine = _started(state)
    command = c.create_primary(3072, b"12345678")
    ticks, ended = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not ended.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    for _ in range(3):
        response = engine.process(command)
        engine.process(c.flush(c.created_handle(response)))
    ended.set()
    ticker.join()
    return ticks


def test_other_threads_run_when_a_long_command_does(new_20: State) -> None:
    assert in_process(_other_threads_run, new_20) > 5


def _by_locality(state: State, command: bytes) -> list[int]:
    engine = _started(state)
    return [c.code_of(engine.process(command, locality)) for locality in ALL_LOCALITIES]


@pytest.mark.parametrize(
    ("command", "allowed"),
    [(c.pcr_extend(17, DIGEST), {2, 3, 4}), (c.pcr_reset(20), {2}), (c.pcr_reset(16), {0, 1, 2, 3})],
    ids=["extend 17", "reset 20", "reset 16"],
)
def test_only_some_localities_may_touch_a_pcr_when_the_profile_says_so(
    new_20: State, command: bytes, allowed: set[int]
) -> None:
    codes = in_process(_by_locality, new_20, command)
    expected = [0 if locality in allowed else Rc20.TPM_RC_LOCALITY for locality in ALL_LOCALITIES]
    assert codes == expected


def _dynamic_launch(state: State) -> tuple[list[object], bytes]:
    engine = _started(state)
    steps: list[object] = [
        engine.established(),
        engine.hash_start(),
        engine.hash_data(b"measured "),
        engine.hash_data(memoryview(b"kernel")),
        engine.hash_end(),
        engine.established(),
    ]
    return steps, c.pcr_value(engine.process(c.pcr_read(17)))


def test_pcr_17_holds_the_measurement_and_the_bit_is_set_when_hashed(new_20: State) -> None:
    steps, pcr_17 = in_process(_dynamic_launch, new_20)
    assert steps == [False, 0, 0, 0, 0, True]
    assert pcr_17 == hashlib.sha256(bytes(32) + hashlib.sha256(b"measured kernel").digest()).digest()


def _hash_before_startup(state: State) -> bytes:
    engine, _ = powered(TpmVersion.V2_0, state)
    assert [engine.hash_start(), engine.hash_data(b"firmware"), engine.hash_end()] == [0, 0, 0]
    assert c.code_of(engine.process(c.startup())) == 0
    return c.pcr_value(engine.process(c.pcr_read(0)))


def test_pcr_0_holds_the_measurement_when_hashed_before_startup(new_20: State) -> None:
    start = bytes(31) + b"\4"
    expected = hashlib.sha256(start + hashlib.sha256(b"firmware").digest()).digest()
    assert in_process(_hash_before_startup, new_20) == expected


def _dynamic_launch_12(state: State) -> bytes:
    engine, _ = powered(TpmVersion.V1_2, state)
    # Unlike 2.0, 1.2 calls a launch before TPM_Startup an error, and fails.
    engine.process(c.startup_12())
    assert [engine.hash_start(), engine.hash_data(b"kernel"), engine.hash_end()] == [0, 0, 0]
    assert engine.established()
    return c.value_12(engine.process(c.pcr_read_12(17)), 20)


def test_pcr_17_of_tpm_12_holds_the_measurement_when_hashed(new_12: State) -> None:
    expected = hashlib.sha1(bytes(20) + hashlib.sha1(b"kernel").digest()).digest()
    assert in_process(_dynamic_launch_12, new_12) == expected


def _reset_established(version: TpmVersion, state: State) -> list[tuple[int, bool]]:
    engine, _ = powered(version, state)
    engine.process(c.startup() if version is TpmVersion.V2_0 else c.startup_12())
    outcome = []
    for locality in ALL_LOCALITIES:
        assert engine.hash_start() == 0
        assert engine.hash_end() == 0
        outcome.append((engine.reset_established(locality), engine.established()))
    return outcome


BY_LOCALITY = [(Rc12.TPM_BAD_LOCALITY, True)] * 3 + [(Rc12.TPM_SUCCESS, False)] * 2


def test_established_bit_is_cleared_when_reset_from_localities_3_and_4_alone(new_20: State) -> None:
    assert in_process(_reset_established, TpmVersion.V2_0, new_20) == BY_LOCALITY


def test_established_bit_of_tpm_12_is_cleared_when_reset_from_localities_3_and_4_alone(new_12: State) -> None:
    assert in_process(_reset_established, TpmVersion.V1_2, new_12) == BY_LOCALITY


def _buffer_sizes(version: TpmVersion) -> list[BufferSize]:
    engine = Engine(version, MemoryStore())
    with pytest.raises(UsageError, match="32-bit"):
        engine.set_buffer_size(-1)
    return [engine.set_buffer_size(wanted) for wanted in (0, 1, 0, 3500, 1 << 31, 0)]


@pytest.mark.parametrize(("version", "smallest"), [(TpmVersion.V2_0, 2808), (TpmVersion.V1_2, 3072)])
def test_buffer_size_is_the_nearest_allowed_when_set(version: TpmVersion, smallest: int) -> None:
    sizes = in_process(_buffer_sizes, version)
    assert [size.size for size in sizes] == [4096, smallest, smallest, 3500, 4096, 4096]
    assert {(size.min, size.max) for size in sizes} == {(smallest, 4096)}


def _info(version: TpmVersion) -> tuple[str, str]:
    engine = Engine(version, MemoryStore())
    return engine.info(), engine.info(1)


@pytest.mark.parametrize("version", list(TpmVersion))
def test_info_names_the_family_when_asked(version: TpmVersion) -> None:
    whole, part = (json.loads(text) for text in in_process(_info, version))
    assert whole["TPMSpecification"]["family"] == version
    assert whole["TPMAttributes"]["manufacturer"] == "id:00001014"
    assert set(part) == {"TPMSpecification"}


def _off(state: State) -> None:
    engine = Engine(TpmVersion.V1_2, MemoryStore())
    uses: list[Callable[[], object]] = [
        lambda: engine.process(c.startup_12()),
        lambda: engine.get_state(StateKind.PERMANENT),
        engine.established,
        lambda: engine.reset_established(Locality(3)),
        engine.hash_start,
        lambda: engine.hash_data(b"x"),
        engine.hash_end,
    ]
    for use in uses:
        with pytest.raises(EngineError, match="powered off"):
            use()
    engine.cancel()
    engine.power_on(state, origin=Origin.SAVED)
    with pytest.raises(EngineError, match="powered on"):
        engine.power_on(state, origin=Origin.SAVED)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.power_on(state, origin=Origin.SAVED)


def test_engine_refuses_clearly_when_power_is_not_as_needed(new_12: State) -> None:
    in_process(_off, new_12)


def _two_engines(state: State) -> None:
    with Engine(TpmVersion.V2_0, MemoryStore()) as engine:
        with pytest.raises(EngineError, match="has a TPM already"):
            Engine(TpmVersion.V1_2, MemoryStore())
        engine.power_on(state, origin=Origin.SAVED)
        assert c.code_of(engine.process(c.startup())) == 0
    second, _ = powered(TpmVersion.V2_0, state)
    assert c.code_of(second.process(c.startup())) == 0


def test_second_engine_is_refused_when_the_first_is_not_closed(new_20: State) -> None:
    in_process(_two_engines, new_20)


def _fork_while_running(state: State) -> tuple[str, str, int]:
    engine = _started(state)

    def in_child() -> tuple[str, str]:
        with pytest.raises(EngineError) as caught:
            engine.process(c.get_random(8))
        engine.close()
        with pytest.raises(EngineError) as second:
            Engine(TpmVersion.V2_0, MemoryStore())
        return str(caught.value), str(second.value)

    first, second = in_process(in_child)
    return first, second, c.code_of(engine.process(c.get_random(8)))


def test_running_tpm_refuses_in_the_child_and_goes_on_in_the_parent_when_forked(new_20: State) -> None:
    first, second, code = in_process(_fork_while_running, new_20)
    assert "must not run twice" in first
    assert "has a TPM already" in second
    assert code == 0


def _children_of_a_warm_parent() -> list[tuple[bytes, bytes]]:
    engine, _ = powered(TpmVersion.V2_0)
    engine.process(c.startup())
    engine.process(c.get_random(32))
    engine.close()

    def in_child() -> tuple[bytes, bytes]:
        child, store = powered(TpmVersion.V2_0)
        child.process(c.startup())
        return child.process(c.get_random(32))[12:], store.state[StateKind.PERMANENT]

    return [in_process(in_child) for _ in range(4)]


def test_siblings_share_no_random_byte_and_no_seed_when_forked_from_a_warm_parent() -> None:
    randoms, states = zip(*in_process(_children_of_a_warm_parent), strict=True)
    assert len(set(randoms)) == 4
    for one in range(4):
        for other in range(one):
            pairs = zip(states[one], states[other], strict=True)
            assert sum(a != b for a, b in pairs) > 3 * 64 - 16
