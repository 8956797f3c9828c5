"""The adapter over Debian's swtpm itself: nothing is answered before it is kept, and no foreign state is taken."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.engine import commands
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import manufacture
from vtpm.engine.engine import Origin
from vtpm.errors import EngineError, ProtocolError, StateError, StoreError, UsageError
from vtpm.foreign.swtpm_engine import SwtpmEngine
from vtpm.tpm.return_codes import Rc20
from vtpm.tpm.types import Locality, StateKind, TpmVersion

INDEX = 0x01500001
FAILURE = int(Rc20.TPM_RC_FAILURE)
State = dict[StateKind, bytes]


class Kept:
    """A store in memory; `refuses` makes it fail."""

    def __init__(self) -> None:
        self.state: State = {}
        self.saves: list[StateKind] = []
        self.refuses = False

    def __call__(self, kind: StateKind, blob: bytes) -> None:
        if self.refuses:
            raise StoreError("the disk is full")
        self.saves.append(kind)
        self.state[kind] = blob


Make = Callable[[Kept], SwtpmEngine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        made: list[SwtpmEngine] = []

        def make(kept: Kept) -> SwtpmEngine:
            folder = tmp_path / str(len(made))
            folder.mkdir()
            engine = SwtpmEngine(TpmVersion.V2_0, kept, folder=str(folder))
            made.append(engine)
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def engine(make: Make, kept: Kept) -> SwtpmEngine:
    engine = make(kept)
    engine.power_on({}, origin=Origin.MANUFACTURE)
    succeed(engine, commands.startup())
    return engine


def manufactured_by_libtpms() -> bytes:
    state: State = in_process(manufacture, TpmVersion.V2_0)
    return state[StateKind.PERMANENT]


def succeed(engine: SwtpmEngine, *wanted: bytes) -> None:
    for command in wanted:
        assert commands.code_of(engine.process(command)) == 0


def test_new_tpm_is_kept_before_it_is_on_when_it_is_manufactured(make: Make, kept: Kept) -> None:
    engine = make(kept)
    engine.power_on({}, origin=Origin.MANUFACTURE)
    assert kept.saves == [StateKind.PERMANENT]
    assert engine.powered


def test_change_is_kept_before_the_response_comes_when_a_command_makes_one(
    make: Make, engine: SwtpmEngine, kept: Kept
) -> None:
    succeed(engine, commands.nv_define(INDEX, 4), commands.nv_write(INDEX, b"kept"))
    state = dict(kept.state)
    engine.close()
    again = make(Kept())
    again.power_on(state, origin=Origin.SAVED)
    succeed(again, commands.startup())
    assert commands.nv_value(again.process(commands.nv_read(INDEX, 4)), 4) == b"kept"


def test_each_write_is_kept_when_many_of_one_size_follow_each_other(engine: SwtpmEngine, kept: Kept) -> None:
    succeed(engine, commands.nv_define(INDEX, 4))
    blobs = set()
    for number in range(50):
        succeed(engine, commands.nv_write(INDEX, number.to_bytes(4, "big")))
        blobs.add(kept.state[StateKind.PERMANENT])
    assert len(blobs) == 50


def test_nothing_is_kept_when_a_command_changes_nothing(engine: SwtpmEngine, kept: Kept) -> None:
    before = len(kept.saves)
    succeed(engine, commands.get_random(8), commands.pcr_read(0), commands.pcr_extend(16, b"1" * 32))
    assert len(kept.saves) == before


def test_tpm_fails_for_good_when_a_change_cannot_be_kept(engine: SwtpmEngine, kept: Kept) -> None:
    kept.refuses = True
    assert commands.code_of(engine.process(commands.nv_define(INDEX, 4))) == FAILURE
    assert isinstance(engine.store_error, StoreError)
    kept.refuses = False
    with pytest.raises(EngineError):
        engine.process(commands.get_random(8))
    with pytest.raises(EngineError):
        engine.power_on(kept.state, origin=Origin.SAVED)


def test_tpm_is_not_powered_on_when_its_first_state_cannot_be_kept(make: Make, kept: Kept) -> None:
    kept.refuses = True
    engine = make(kept)
    with pytest.raises(EngineError, match="the disk is full"):
        engine.power_on({}, origin=Origin.MANUFACTURE)
    assert not engine.powered


@pytest.mark.parametrize(
    "other",
    [lambda _: manufactured_by_libtpms(), lambda own: own[:-10], lambda own: own[:20] + bytes(len(own) - 20)],
    ids=["libtpms", "cut", "zeros"],
)
def test_state_is_refused_and_nothing_kept_when_it_is_not_swtpms(
    make: Make, engine: SwtpmEngine, kept: Kept, other: Callable[[bytes], bytes]
) -> None:
    own = kept.state[StateKind.PERMANENT]
    blob = other(own)
    later = Kept()
    second = make(later)
    with pytest.raises(StateError, match=r"not swtpm's|refuses its state"):
        second.power_on({StateKind.PERMANENT: blob}, origin=Origin.SAVED)
    assert not second.powered
    assert later.saves == []
    second.power_on({StateKind.PERMANENT: own}, origin=Origin.SAVED)
    assert second.powered


def test_nothing_is_manufactured_when_saved_state_is_missing(make: Make, kept: Kept) -> None:
    engine = make(kept)
    with pytest.raises(StateError):
        engine.power_on({}, origin=Origin.SAVED)
    with pytest.raises(StateError):
        engine.power_on({StateKind.PERMANENT: b"x"}, origin=Origin.MANUFACTURE)
    with pytest.raises(StateError):
        engine.power_on({StateKind.PERMANENT: b""}, origin=Origin.SAVED)
    with pytest.raises(StateError):
        engine.power_on({StateKind.PERMANENT: b"x", StateKind.SAVESTATE: b"x"}, origin=Origin.SAVED)
    assert kept.saves == []


def test_pcrs_go_on_once_when_volatile_state_is_given(make: Make, engine: SwtpmEngine, kept: Kept) -> None:
    succeed(engine, commands.pcr_extend(10, b"1" * 32))
    value = commands.pcr_value(engine.process(commands.pcr_read(10)))
    state = {**kept.state, StateKind.VOLATILE: engine.get_state(StateKind.VOLATILE)}
    assert engine.get_state(StateKind.PERMANENT) == state[StateKind.PERMANENT]
    engine.close()
    again = make(kept)
    again.power_on(state, origin=Origin.SAVED)
    assert commands.pcr_value(again.process(commands.pcr_read(10))) == value
    again.power_off()
    again.power_on(kept.state, origin=Origin.SAVED)
    succeed(again, commands.startup())
    assert commands.pcr_value(again.process(commands.pcr_read(10))) == bytes(32)


def test_savestate_and_powered_off_state_are_not_there(engine: SwtpmEngine) -> None:
    with pytest.raises(StateError):
        engine.get_state(StateKind.SAVESTATE)
    engine.power_off()
    assert not engine.powered
    with pytest.raises(EngineError):
        engine.get_state(StateKind.PERMANENT)
    engine.power_off()


def test_locality_of_each_command_is_its_own(engine: SwtpmEngine) -> None:
    # PCR 20 may be extended from locality 1 on, and reset from 2: PC Client Platform TPM Profile, table 7.
    assert commands.code_of(engine.process(commands.pcr_extend(20, b"1" * 32))) == int(Rc20.TPM_RC_LOCALITY)
    assert commands.code_of(engine.process(commands.pcr_extend(20, b"1" * 32), Locality(3))) == 0
    assert commands.code_of(engine.process(commands.pcr_extend(20, b"1" * 32))) == int(Rc20.TPM_RC_LOCALITY)
    engine.set_default_locality(Locality(4))
    with pytest.raises(UsageError):
        engine.set_default_locality(Locality(5))
    with pytest.raises(UsageError):
        engine.process(commands.get_random(8), Locality(5))


def test_dynamic_launch_sets_the_established_bit_until_it_is_reset(engine: SwtpmEngine) -> None:
    assert not engine.established()
    assert engine.hash_start() == 0
    assert engine.hash_data(b"measured") == 0
    assert engine.hash_end() == 0
    assert engine.established()
    assert engine.reset_established(Locality(0)) != 0
    assert engine.reset_established(Locality(3)) == 0
    assert not engine.established()


def test_buffer_and_description_are_swtpms_own(make: Make, kept: Kept) -> None:
    engine = make(kept)
    assert '"family":"2.0"' in engine.info()
    size = engine.set_buffer_size(3000)
    assert size.size == 3000 and size.min <= 3000 <= size.max
    assert engine.set_buffer_size(0) == size
    with pytest.raises(UsageError):
        engine.set_buffer_size(1 << 32)
    engine.power_on({}, origin=Origin.MANUFACTURE)
    with pytest.raises(EngineError):
        engine.set_buffer_size(2900)


def test_nothing_waits_for_a_command_when_it_is_cancelled(engine: SwtpmEngine) -> None:
    os.kill(engine.pid, signal.SIGSTOP)
    answered = threading.Event()

    def answer() -> None:
        succeed(engine, commands.get_random(8))
        answered.set()

    thread = threading.Thread(target=answer)
    thread.start()
    engine.cancel()
    assert not answered.is_set()
    os.kill(engine.pid, signal.SIGCONT)
    thread.join()
    assert answered.is_set()


@pytest.mark.parametrize("act", ["command", "control"])
def test_engine_is_of_no_use_any_more_when_swtpm_died(engine: SwtpmEngine, kept: Kept, act: str) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="swtpm"):
        engine.process(commands.get_random(8)) if act == "command" else engine.hash_start()
    assert not engine.powered
    with pytest.raises(EngineError):
        engine.power_on(kept.state, origin=Origin.SAVED)


def test_power_is_cut_when_swtpm_died_before(engine: SwtpmEngine, kept: Kept) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    engine.power_off()
    assert not engine.powered
    with pytest.raises(EngineError):
        engine.power_on(kept.state, origin=Origin.SAVED)


def test_command_is_refused_when_its_size_is_none_that_a_command_has(engine: SwtpmEngine) -> None:
    for size in (9, 4097):
        with pytest.raises(ProtocolError):
            engine.process(bytes(size))


def test_tpm_1_2_is_not_offered(tmp_path: Path, kept: Kept) -> None:
    with pytest.raises(EngineError, match=r"TPM 2\.0"):
        SwtpmEngine(TpmVersion.V1_2, kept, folder=str(tmp_path))
