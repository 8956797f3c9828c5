"""A vTPM passes from one vtpmd to another as QEMU carries it: it runs at one of them at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.relayed import ForeignVtpmd, RelayedVtpmd
from tests.support.vtpmd import TIMEOUT_S, PlayedEmulator, Vtpmd
from vtpm.instance.worker import ACTIVATION_TIMEOUT_S, RETURN_TIMEOUT_S
from vtpm.tpm.power_commands import STARTUP
from vtpm.tpm.types import MAX_SEALED_BYTES, Startup, StateKind, TpmVersion
from vtpm.wire.emulator import (
    Command,
    GetStateBlob,
    Init,
    InitFlags,
    LockStorage,
    Plain,
    Reply,
    SetStateBlob,
    StateFlags,
)
from vtpm.wire.manager_link import (
    Arrive,
    ClientChanged,
    ClientKind,
    Depart,
    Note,
    Retry,
    Return,
    SaveBegin,
    Wanted,
)

OK = bytes(4)
TPM_RC_INITIALIZE, TPM_RC_FAILURE, TPM_RC_RETRY = (bytes.fromhex(one) for one in ("00000100", "00000101", "00000922"))
PCR = 16
EXTEND = bytes.fromhex(f"80020000004100000182000000{PCR:02x}0000000940000009000000000000000001000b") + bytes([7] * 32)
READ_PCR = bytes.fromhex("8001000000140000017e00000001000b03000001")
STARTUP_CLEAR = STARTUP[TpmVersion.V2_0, Startup.CLEAR]


def code(response: bytes) -> bytes:
    return response[6:10]


def get(emulator: PlayedEmulator, kind: StateKind = StateKind.PERMANENT, offset: int = 0) -> Reply:
    return emulator.control(GetStateBlob(StateFlags.DECRYPTED, kind, offset))


def put(emulator: PlayedEmulator, data: bytes, kind: StateKind = StateKind.PERMANENT, flags: int = 2) -> int:
    return emulator.control(SetStateBlob(flags, kind, data)).result


@pytest.fixture(params=[Vtpmd, RelayedVtpmd], ids=["process", "relayed"])
def make(request: pytest.FixtureRequest) -> type[Vtpmd]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def source(make: type[Vtpmd]) -> Iterator[Vtpmd]:
    with make() as vtpmd:
        vtpmd.manager.hello()
        yield vtpmd


@pytest.fixture
def guest(source: Vtpmd) -> Iterator[PlayedEmulator]:
    with PlayedEmulator(source) as emulator:
        assert emulator.control(Init(0)).result == 0
        assert code(emulator.tpm(STARTUP_CLEAR)) == OK
        assert code(emulator.tpm(EXTEND)) == OK
        yield emulator


@pytest.fixture
def destination(source: Vtpmd, make: type[Vtpmd]) -> Iterator[Vtpmd]:
    with make() as vtpmd:
        moves = vtpmd.manager.moves
        moves.sealed, moves.has_load = source.manager.moves.sealed, False
        moves.arrives = True
        vtpmd.manager.hello()
        yield vtpmd


def depart(source: Vtpmd, guest: PlayedEmulator) -> bytes:
    source.manager.moves.departs = True
    reply = get(guest)
    assert (reply.result, reply.fields["flags"]) == (0, StateFlags.ENCRYPTED)
    return reply.data


def arrive(emulator: PlayedEmulator, sealed: bytes) -> int:
    """As QEMU does on an incoming migration, whose INIT deletes volatile state."""
    assert emulator.control(Plain(Command.STOP)).result == 0
    assert put(emulator, sealed) == 0
    return emulator.control(Init(InitFlags.DELETE_VOLATILE)).result


# -- departure ---------------------------------------------------------------------------------------------------------
def test_state_goes_out_sealed_when_the_manager_grants_it(source: Vtpmd, guest: PlayedEmulator) -> None:
    sealed = depart(source, guest)
    assert sealed in source.manager.moves.sealed
    assert [get(guest, kind).data for kind in (StateKind.VOLATILE, StateKind.SAVESTATE)] == [b"", b""]
    assert len(source.manager.of(Depart)) == 1


def test_state_goes_out_from_an_offset_when_one_is_asked_for(source: Vtpmd, guest: PlayedEmulator) -> None:
    sealed = depart(source, guest)
    rest = get(guest, offset=15_000)
    assert (rest.fields["total"], rest.data) == (len(sealed) - 15_000, sealed[15_000:])
    assert get(guest, offset=len(sealed)).result != 0
    assert get(guest).data == sealed
    assert len(source.manager.of(Depart)) == 1


def test_largest_state_goes_out_and_comes_in_when_it_is_sealed(
    source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd
) -> None:
    source.manager.moves.extra_bytes = MAX_SEALED_BYTES
    sealed = depart(source, guest)
    assert len(sealed) == MAX_SEALED_BYTES
    with PlayedEmulator(destination) as other:
        assert arrive(other, sealed) == 0


@pytest.mark.parametrize("kind", StateKind)
def test_no_state_goes_out_when_the_manager_refuses(source: Vtpmd, guest: PlayedEmulator, kind: StateKind) -> None:
    reply = get(guest, kind)
    assert reply.result != 0
    assert not reply.result & 0x800, "QEMU takes it for a blob that is not there"
    assert code(guest.tpm(READ_PCR)) == OK
    assert not source.manager.of(Return)


def test_no_state_goes_out_when_the_tpm_is_off(source: Vtpmd, guest: PlayedEmulator) -> None:
    source.manager.moves.departs = True
    guest.control(Plain(Command.STOP))
    assert get(guest).result != 0
    assert not source.manager.of(Depart)


def test_guest_waits_for_the_return_when_the_manager_did_not_answer_a_departure(
    source: Vtpmd, guest: PlayedEmulator
) -> None:
    source.manager.moves.silent = True
    assert get(guest).result != 0
    source.manager.moves.silent = False
    assert code(guest.tpm(READ_PCR)) == TPM_RC_RETRY
    source.manager.moves.returns = None
    assert code(guest.tpm(READ_PCR)) == OK


def test_nothing_runs_or_is_saved_when_the_state_has_left(source: Vtpmd, guest: PlayedEmulator) -> None:
    depart(source, guest)
    saves = len(source.manager.of(SaveBegin))
    assert code(guest.tpm(EXTEND)) == TPM_RC_RETRY
    assert guest.control(Plain(Command.STORE_VOLATILE)).result != 0
    assert guest.control(Plain(Command.HASH_START)).result != 0
    assert guest.control(Plain(Command.SHUTDOWN)).result == 0
    assert len(source.manager.of(SaveBegin)) == saves


def test_vtpm_is_not_asked_back_when_its_qemu_ends(source: Vtpmd, guest: PlayedEmulator) -> None:
    depart(source, guest)
    guest.control(Plain(Command.SHUTDOWN))
    guest.control_socket.close()
    source.manager.wait_for(ClientChanged, lambda one: one.client is ClientKind.NONE)
    with PlayedEmulator(source) as other:
        # After all that the end of the one before led to.
        assert code(other.tpm(READ_PCR)) == TPM_RC_INITIALIZE
    assert not source.manager.of(Return)


def test_state_stays_when_the_tpm_is_of_another_make() -> None:
    with ForeignVtpmd() as vtpmd:
        vtpmd.manager.hello()
        vtpmd.manager.moves.departs = True
        with PlayedEmulator(vtpmd) as guest:
            assert guest.control(Init(0)).result == 0
            assert code(guest.tpm(STARTUP_CLEAR)) == OK
            assert get(guest).result != 0
            assert code(guest.tpm(READ_PCR)) == OK
        assert not vtpmd.manager.of(Depart)
        vtpmd.manager.wait_for(Note, lambda note: "swtpm's TPM does not move while it runs" in note.message)


# -- return ------------------------------------------------------------------------------------------------------------
def test_guest_goes_on_where_it_was_when_the_departure_is_taken_back(source: Vtpmd, guest: PlayedEmulator) -> None:
    before = guest.tpm(READ_PCR)
    depart(source, guest)
    source.manager.moves.returns = None
    assert guest.control(LockStorage(300)).result == 0
    assert guest.tpm(READ_PCR) == before
    assert len(source.manager.of(Return)) == 1
    assert get(guest, StateKind.VOLATILE).result != 0
    # QEMU asks again whenever the guest is paused and goes on.
    assert guest.control(LockStorage(300)).result == 0
    assert len(source.manager.of(Return)) == 1


def test_departure_is_taken_back_when_a_command_comes(source: Vtpmd, guest: PlayedEmulator) -> None:
    before = guest.tpm(READ_PCR)
    depart(source, guest)
    source.manager.moves.returns = None
    assert guest.tpm(READ_PCR) == before


def test_departure_is_taken_back_when_the_guest_is_reset(source: Vtpmd, guest: PlayedEmulator) -> None:
    depart(source, guest)
    guest.control(Plain(Command.STOP))
    assert guest.control(Init(0)).result != 0
    source.manager.moves.returns = None
    assert guest.control(Init(0)).result == 0
    assert code(guest.tpm(STARTUP_CLEAR)) == OK


def test_tpm_fails_for_good_when_it_has_moved(source: Vtpmd, guest: PlayedEmulator) -> None:
    depart(source, guest)
    source.manager.moves.returns = Retry.FINAL
    assert guest.control(LockStorage(300)).result != 0
    source.manager.moves.returns = None
    assert code(guest.tpm(READ_PCR)) == TPM_RC_FAILURE
    assert guest.control(Init(0)).result != 0
    assert guest.control(LockStorage(300)).result != 0
    assert get(guest).result != 0
    assert len(source.manager.of(Return)) == 1


def test_command_is_held_no_longer_than_a_driver_waits_when_no_manager_answers(
    source: Vtpmd, guest: PlayedEmulator
) -> None:
    depart(source, guest)
    source.manager.moves.silent = True
    began_s = time.monotonic()
    assert code(guest.tpm(READ_PCR)) == TPM_RC_RETRY
    assert RETURN_TIMEOUT_S <= time.monotonic() - began_s < 2


# -- arrival -----------------------------------------------------------------------------------------------------------
def test_guest_goes_on_at_the_destination_when_it_is_activated(
    source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd
) -> None:
    before = guest.tpm(READ_PCR)
    with PlayedEmulator(destination) as other:
        assert arrive(other, depart(source, guest)) == 0
        destination.manager.activate()
        assert other.tpm(READ_PCR) == before


def test_state_comes_in_when_it_comes_in_pieces(source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd) -> None:
    sealed = depart(source, guest)
    with PlayedEmulator(destination) as other:
        assert [put(other, sealed[:9000]), put(other, sealed[9000:])] == [0, 0]
        assert [put(other, b"", StateKind.VOLATILE), put(other, b"", StateKind.SAVESTATE)] == [0, 0]
        assert other.control(Init(0)).result == 0


def test_command_is_held_until_the_vtpm_is_activated(source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd) -> None:
    before = guest.tpm(READ_PCR)
    with PlayedEmulator(destination) as other:
        assert arrive(other, depart(source, guest)) == 0
        other.data.sendall(READ_PCR)
        wanted = destination.manager.wait_for(Wanted)
        assert wanted.seq == destination.manager.of(Arrive)[-1].seq
        destination.manager.activate()
        assert other.data.recv(8192) == before


@pytest.mark.parametrize("startup", [False, True])
def test_nothing_runs_when_the_vtpm_is_not_activated(
    source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd, startup: bool
) -> None:
    with PlayedEmulator(destination) as other:
        assert arrive(other, depart(source, guest)) == 0
        destination.manager.activate(destination.manager.of(Arrive)[-1].seq + 1)
        began_s = time.monotonic()
        assert code(other.tpm(STARTUP_CLEAR if startup else EXTEND)) == TPM_RC_RETRY
        assert ACTIVATION_TIMEOUT_S <= time.monotonic() - began_s < 2
        assert other.control(Plain(Command.STORE_VOLATILE)).result != 0
        assert not destination.manager.of(SaveBegin)
        assert len(destination.manager.of(Wanted)) == 1


def test_another_manager_hears_that_it_is_wanted_when_it_says_hello(
    source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd
) -> None:
    with PlayedEmulator(destination) as other:
        assert arrive(other, depart(source, guest)) == 0
        assert code(other.tpm(READ_PCR)) == TPM_RC_RETRY
        destination.manager.hello()
        destination.manager.wait_for(Wanted, lambda _: len(destination.manager.of(Wanted)) == 2)


def test_held_command_is_given_up_when_the_guest_cancels_it(
    source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd
) -> None:
    with PlayedEmulator(destination) as other:
        assert arrive(other, depart(source, guest)) == 0
        began_s = time.monotonic()
        other.data.sendall(READ_PCR)
        destination.manager.wait_for(Wanted)
        cancel = threading.Timer(0.2, lambda: other.control(Plain(Command.CANCEL_TPM_CMD)))
        cancel.start()
        assert code(other.data.recv(8192)) == TPM_RC_RETRY
        cancel.join()
        assert time.monotonic() - began_s < ACTIVATION_TIMEOUT_S


@pytest.mark.parametrize("activates", [True, False])
def test_guest_s_reset_asks_for_the_vtpm_when_it_comes_before_its_first_command(
    source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd, activates: bool
) -> None:
    with PlayedEmulator(destination) as other, ThreadPoolExecutor(1) as waiting:
        assert arrive(other, depart(source, guest)) == 0
        # As the store has it once the vTPM is held, and not before.
        destination.manager.state = source.manager.state
        init = waiting.submit(other.control, Init(0))
        destination.manager.wait_for(Wanted)
        if activates:
            destination.manager.moves.has_load = True
            destination.manager.activate()
        assert (init.result(TIMEOUT_S).result == 0) is activates
        assert (code(other.tpm(STARTUP_CLEAR)) == OK) is activates


def test_init_fails_when_the_state_is_refused(source: Vtpmd, guest: PlayedEmulator, destination: Vtpmd) -> None:
    sealed = depart(source, guest)
    with PlayedEmulator(destination) as other:
        assert arrive(other, sealed[:-1] + b"x") != 0
        # It is forgotten, and nothing but what comes next counts.
        assert other.control(Init(0)).result != 0
        assert arrive(other, sealed) == 0


def test_tpm_goes_on_when_a_state_is_refused_that_was_brought_to_it(source: Vtpmd, guest: PlayedEmulator) -> None:
    assert arrive(guest, b"an old machine's") != 0
    assert guest.control(Init(0)).result == 0
    assert code(guest.tpm(STARTUP_CLEAR)) == OK


def test_init_fails_when_the_vtpm_is_expected_and_no_state_has_come(destination: Vtpmd) -> None:
    with PlayedEmulator(destination) as other:
        assert other.control(Init(0)).result != 0
        assert other.control(Plain(Command.GET_TPMESTABLISHED)).result == 0


@pytest.mark.parametrize(
    ("flags", "kind"),
    [(0, StateKind.PERMANENT), (1, StateKind.PERMANENT), (2, StateKind.VOLATILE), (2, StateKind.SAVESTATE)],
    ids=["plain", "decrypted", "volatile", "savestate"],
)
def test_state_is_refused_when_it_is_not_sealed_or_of_another_kind(
    destination: Vtpmd, flags: int, kind: StateKind
) -> None:
    with PlayedEmulator(destination) as other:
        assert put(other, b"state", kind, flags) != 0


def test_state_is_refused_when_its_pieces_are_too_much(destination: Vtpmd) -> None:
    with PlayedEmulator(destination) as other:
        assert put(other, bytes(MAX_SEALED_BYTES)) == 0
        assert put(other, b"x") != 0
        assert other.control(Init(0)).result != 0
        assert not destination.manager.of(Arrive)


def test_state_is_refused_when_the_tpm_is_on(source: Vtpmd, guest: PlayedEmulator) -> None:
    assert put(guest, b"state") != 0
    assert code(guest.tpm(READ_PCR)) == OK


def test_state_is_forgotten_when_the_tpm_is_stopped(destination: Vtpmd) -> None:
    with PlayedEmulator(destination) as other:
        assert put(other, b"state") == 0
        assert other.control(Plain(Command.STOP)).result == 0
        assert other.control(Init(0)).result != 0
        assert not destination.manager.of(Arrive)


def test_state_is_refused_when_the_vtpm_is_on_its_way(source: Vtpmd, guest: PlayedEmulator) -> None:
    sealed = depart(source, guest)
    source.manager.moves.arrives = True
    assert arrive(guest, sealed) != 0
    assert not source.manager.of(Arrive)
