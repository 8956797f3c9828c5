"""The PV TPM back-end serves Linux' driver through its whole life, and lets go of all that it held of a domain."""

from __future__ import annotations

import time
from collections.abc import Iterator
from uuid import UUID

import pytest

from tests.support.fake_xen import FakeXen, fake_xen
from tests.support.xen_frontend import LinuxFrontend, settle
from vtpm.errors import EngineError
from vtpm.guest_link.xen import device
from vtpm.guest_link.xen.backend import PvTpmBackend
from vtpm.wire.xen_ring import PageState
from vtpm.wire.xenbus import DeviceId, XenbusState

ID = UUID("0f1c2f0e-6b3c-4f6e-9d1e-2a7f6f3b9c11")
OTHER = UUID("00000000-0000-0000-0000-00000000000b")
COMMAND = bytes.fromhex("8001 0000000c 00000144 0000")
RESPONSE = bytes.fromhex("8001 0000000a 00000000")
GUEST = 7


class Tpm:
    """Answers, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self.answer = RESPONSE
        self.fails = False

    def __call__(self, command: bytes, locality: int) -> bytes:
        self.asked.append((command, locality))
        if self.fails:
            raise EngineError("libtpms failed")
        return self.answer


class Bench:
    """A host with one guest whose device is attached, and the back-end of its vTPM."""

    def __init__(self, xen: FakeXen) -> None:
        self.xen = xen
        self.tpm = Tpm()
        self.lines: list[str] = []
        xen.create_domain(GUEST)
        xen.attach(GUEST, str(ID))
        self.guest = LinuxFrontend(xen, GUEST)
        self.backend = self.new_backend()

    def new_backend(self) -> PvTpmBackend:
        return PvTpmBackend(self.xen.hypervisor, ID, self.tpm, self.lines.append)

    def settle(self) -> None:
        settle(self.backend, self.guest)

    def connect(self) -> None:
        self.guest.probe()
        self.settle()
        assert (self.guest.state, self.guest.backend_state) == (XenbusState.CONNECTED, XenbusState.CONNECTED)
        assert self.xen.held == (1, 1)

    def command(self, command: bytes = COMMAND, locality: int = 0) -> bytes | None:
        self.guest.send(command, locality)
        self.settle()
        return self.guest.receive()

    @property
    def backend_keys(self) -> dict[str, bytes | None]:
        read = self.xen.xenstore.read
        return {name: read(f"backend/vtpm/{GUEST}/0/{name}") for name in ("feature-protocol-v2", "ready", "state")}


@pytest.fixture
def bench() -> Iterator[Bench]:
    with fake_xen() as xen:
        made = Bench(xen)
        yield made
        made.backend.close()


def test_toolstack_sees_init_wait_when_a_device_is_attached_and_no_guest_runs_yet(bench: Bench) -> None:
    bench.settle()
    assert bench.backend_keys == {"feature-protocol-v2": b"1", "ready": None, "state": b"2"}
    assert bench.backend.serves == DeviceId(GUEST, 0)


def test_device_is_found_when_it_is_attached_after_the_back_end_has_begun() -> None:
    with fake_xen() as xen, PvTpmBackend(xen.hypervisor, ID, Tpm(), [].append) as backend:
        settle(backend)
        assert backend.serves is None
        xen.create_domain(GUEST)
        xen.attach(GUEST, str(ID))
        settle(backend)
        assert backend.serves == DeviceId(GUEST, 0)


def test_commands_are_answered_and_the_guest_notified_when_it_is_connected(bench: Bench) -> None:
    bench.settle()
    bench.connect()
    assert bench.backend_keys["ready"] == b"1"
    for locality in (0, 3):
        assert bench.command(locality=locality) == RESPONSE
    assert bench.tpm.asked == [(COMMAND, 0), (COMMAND, 3)]
    assert bench.guest.notified == 2


def test_first_command_is_answered_when_it_was_sent_before_the_channel_was_bound(bench: Bench) -> None:
    bench.settle()
    bench.guest.probe()
    bench.guest.send(COMMAND)
    bench.settle()
    assert bench.guest.receive() == RESPONSE
    assert bench.guest.notified == 1


def test_events_are_heard_one_after_another_when_their_channel_is_masked_each_time(bench: Bench) -> None:
    bench.connect()
    assert [bench.command() for _ in range(5)] == [RESPONSE] * 5
    assert bench.xen.channels.notified == 5


def test_guest_hears_of_its_cancellation_when_nothing_is_under_way(bench: Bench) -> None:
    bench.connect()
    bench.guest.cancel()
    bench.settle()
    assert bench.guest.receive() is None
    assert bench.guest.notified == 1
    assert bench.lines[1:] == []
    assert bench.command() == RESPONSE


def test_guest_gets_the_response_when_it_cancels_what_the_tpm_is_at(bench: Bench) -> None:
    bench.connect()

    def execute(command: bytes, locality: int) -> bytes:
        bench.guest.cancel()
        return RESPONSE

    bench.backend.close()
    with PvTpmBackend(bench.xen.hypervisor, ID, execute, bench.lines.append) as backend:
        settle(backend, bench.guest)
        bench.guest.send(COMMAND)
        settle(backend, bench.guest)
        assert bench.guest.receive() == RESPONSE
    bench.backend = bench.new_backend()


def test_malformed_request_is_cancelled_named_and_does_no_harm_when_sent(bench: Bench) -> None:
    bench.connect()
    assert bench.command(COMMAND[:9]) is None
    assert bench.command() == RESPONSE
    assert len(bench.tpm.asked) == 1
    assert "device 0 of domain 7 was refused: TPM command has 9 bytes" in bench.lines[-1]


def test_guest_is_told_cancelled_when_a_response_does_not_fit_its_page(bench: Bench) -> None:
    bench.connect()
    bench.tpm.answer = bytes(4089)
    assert bench.command() is None
    assert "was dropped: TPM response has 4089 bytes" in bench.lines[-1]
    bench.tpm.answer = RESPONSE
    assert bench.command() == RESPONSE


def test_nothing_is_held_when_the_front_end_closes_and_it_can_come_back_with_another_page(bench: Bench) -> None:
    for _ in range(3):
        bench.connect()
        assert bench.command() == RESPONSE
        bench.guest.write(state=5)
        bench.settle()
        assert (bench.guest.state, bench.guest.backend_state) == (XenbusState.CLOSED, XenbusState.INIT_WAIT)
        assert bench.xen.held == (0, 0)
        bench.guest.write(state=1)


def test_commands_are_answered_when_the_front_end_is_closing(bench: Bench) -> None:
    """Linux' driver shuts the TPM down when it is taken away, and only then says Closed."""
    bench.connect()
    bench.guest.write(state=5)
    bench.backend.serve(0)
    assert bench.guest.backend_state is XenbusState.CLOSING
    bench.guest.send(COMMAND)
    bench.backend.serve(0)
    assert bench.guest.receive() == RESPONSE


@pytest.mark.parametrize("first", [1, 3])
def test_other_page_is_used_and_the_first_let_go_when_the_front_end_begins_anew_without_a_word(
    bench: Bench, first: int
) -> None:
    bench.connect()
    old = bench.guest.page
    if first == 1:
        bench.guest.write(state=1)
        bench.settle()
        assert bench.xen.held == (0, 0)
    bench.connect()
    seen = len(old.accesses)
    assert bench.command() == RESPONSE
    assert len(old.accesses) == seen


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"ring_ref": "99999"}, "cannot be connected: Invalid argument"),
        ({"event_channel": "99999"}, "cannot be connected: Invalid argument"),
        ({"ring_ref": "-1"}, "ring-ref is no number"),
        ({"event_channel": "0"}, "event-channel is 0"),
        ({"feature_protocol_v2": "0"}, "feature-protocol-v2 is not 1"),
    ],
)
def test_front_end_is_closed_and_can_try_again_when_its_keys_are_of_no_use(
    bench: Bench, keys: dict[str, str], named: str
) -> None:
    bench.settle()
    bench.guest.probe()
    bench.guest.write(**keys)
    bench.settle()
    assert (bench.guest.backend_state, bench.xen.held) == (XenbusState.INIT_WAIT, (0, 0))
    assert bench.guest.state is XenbusState.CLOSED
    assert named in bench.lines[-1]
    bench.guest.write(state=1)
    bench.connect()
    assert bench.command() == RESPONSE


def test_front_end_is_closed_when_its_channel_is_of_no_use_any_more(bench: Bench) -> None:
    bench.connect()
    bench.xen.channels.broken = True
    bench.guest.send(COMMAND)
    bench.backend.serve(0)
    assert bench.guest.backend_state is XenbusState.CLOSED
    assert bench.xen.held == (0, 0)
    assert "no use any more" in bench.lines[-1]


def test_device_is_let_go_when_its_front_end_hides_its_state(bench: Bench) -> None:
    bench.connect()
    bench.xen.xenstore.forbidden.add(f"{bench.guest.path}/state")
    bench.xen.xenstore.put({f"{bench.guest.path}/state": b"4"})
    bench.backend.serve(0)
    assert (bench.guest.backend_state, bench.xen.held) == (XenbusState.CLOSED, (0, 0))


# -- the toolstack --------------------------------------------------------------------------------------------------
def test_device_is_closed_first_and_removed_a_second_later_when_the_toolstack_detaches_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(device, "monotonic", lambda: now)
    bench.connect()
    bench.xen.detach(GUEST)
    bench.settle()
    assert (bench.guest.state, bench.guest.backend_state) == (XenbusState.CLOSED, XenbusState.CLOSED)
    assert bench.xen.held == (0, 0)
    now += device.RETIRE_AFTER_S - 0.1
    bench.backend.serve(0)
    assert bench.guest.backend_state is XenbusState.CLOSED
    now += 0.2
    bench.backend.serve()
    assert bench.guest.backend_state is None
    bench.settle()
    assert bench.backend.serves is None


def test_back_end_wakes_by_itself_when_a_detached_device_is_to_be_removed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "RETIRE_AFTER_S", 0.05)
    bench.settle()
    bench.xen.detach(GUEST)
    while bench.backend.serves is not None:
        bench.backend.serve()
    assert bench.guest.backend_state is None


def test_nothing_is_held_or_written_when_the_toolstack_removes_a_closed_device_by_itself(bench: Bench) -> None:
    bench.settle()
    bench.xen.detach(GUEST)
    bench.settle()
    bench.xen.xenstore.drop(f"backend/vtpm/{GUEST}")
    bench.settle()
    assert bench.backend.serves is None
    bench.backend.serve(0)
    assert bench.xen.xenstore.children("backend/vtpm") == []


def test_page_and_channel_are_let_go_when_the_guest_is_destroyed(bench: Bench) -> None:
    bench.connect()
    bench.xen.destroy(GUEST)
    settle(bench.backend)
    assert bench.xen.held == (0, 0)
    assert bench.guest.backend_state is XenbusState.CLOSED


def test_directory_is_not_made_anew_when_it_goes_while_the_back_end_would_write(bench: Bench) -> None:
    bench.settle()
    bench.guest.probe()
    bench.xen.xenstore.before_update = lambda: bench.xen.xenstore.drop(f"backend/vtpm/{GUEST}")
    settle(bench.backend)
    assert bench.xen.xenstore.children("backend/vtpm") == []
    assert bench.xen.held == (0, 0)
    assert bench.backend.serves is None


def test_page_is_let_go_when_the_device_becomes_another_vtpms(bench: Bench) -> None:
    bench.connect()
    bench.xen.xenstore.put({f"backend/vtpm/{GUEST}/0/uuid": str(OTHER).encode()})
    bench.settle()
    assert bench.xen.held == (0, 0)
    assert bench.backend.serves is None
    assert bench.guest.backend_state is XenbusState.CONNECTED


def test_guest_of_the_same_domain_id_is_served_anew_when_the_first_was_destroyed(bench: Bench) -> None:
    bench.connect()
    bench.xen.destroy(GUEST)
    settle(bench.backend)
    bench.xen.xenstore.drop(f"backend/vtpm/{GUEST}")
    settle(bench.backend)
    bench.xen.create_domain(GUEST)
    bench.xen.attach(GUEST, str(ID))
    bench.guest = LinuxFrontend(bench.xen, GUEST)
    bench.settle()
    bench.connect()
    assert bench.command() == RESPONSE


# -- which device ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "keys", [{"uuid": str(OTHER).encode()}, {"uuid": b"junk"}, {"frontend-id": b"8"}, {"frontend-id": b""}]
)
def test_device_is_left_alone_when_it_is_not_of_this_vtpm(bench: Bench, keys: dict[str, bytes]) -> None:
    bench.backend.close()
    bench.xen.xenstore.put({f"backend/vtpm/{GUEST}/0/{name}": value for name, value in keys.items()})
    bench.backend = bench.new_backend()
    bench.guest.probe()
    bench.settle()
    assert bench.backend.serves is None
    assert bench.xen.held == (0, 0)
    assert bench.backend_keys == {"feature-protocol-v2": None, "ready": None, "state": b"1"}


def test_nothing_is_served_when_directories_are_named_as_no_domain_or_device_is(bench: Bench) -> None:
    bench.backend.close()
    keys = {"uuid": str(ID).encode(), "frontend-id": b"7", "online": b"1", "state": b"1"}
    bench.xen.xenstore.drop("backend/vtpm")
    for path in ("07/0", "7/x", "32752/0", "7/-1"):
        bench.xen.xenstore.put({f"backend/vtpm/{path}/{name}": value for name, value in keys.items()})
    bench.backend = bench.new_backend()
    bench.settle()
    assert bench.backend.serves is None


def test_second_guest_waits_until_the_first_is_gone_when_both_have_the_vtpms_uuid(bench: Bench) -> None:
    bench.connect()
    bench.xen.create_domain(9)
    bench.xen.attach(9, str(ID))
    second = LinuxFrontend(bench.xen, 9)
    second.probe()
    settle(bench.backend, bench.guest, second)
    assert second.backend_state is XenbusState.INITIALISING
    assert "device 0 of domain 9 waits: the vTPM serves device 0 of domain 7" in bench.lines[-1]
    assert bench.command() == RESPONSE
    bench.xen.destroy(GUEST)
    settle(bench.backend, second)
    bench.xen.xenstore.drop(f"backend/vtpm/{GUEST}")
    settle(bench.backend, second)
    assert second.state is XenbusState.CONNECTED
    assert bench.backend.serves == DeviceId(9, 0)
    assert bench.xen.held == (1, 1)


def test_two_back_ends_serve_a_guest_each_when_they_share_a_domain(bench: Bench) -> None:
    """Vtpmds in the manager's own domain see one another's devices."""
    bench.xen.create_domain(9)
    bench.xen.attach(9, str(OTHER))
    bench.settle()
    assert bench.xen.xenstore.read("backend/vtpm/9/0/state") == b"1"
    assert bench.backend.serves == DeviceId(GUEST, 0)


# -- the back-end's own end -----------------------------------------------------------------------------------------
def test_successor_goes_on_with_the_same_page_when_a_back_end_died(bench: Bench) -> None:
    bench.connect()
    bench.backend.close()
    assert bench.xen.held == (0, 0)
    assert (bench.guest.state, bench.guest.backend_state) == (XenbusState.CONNECTED, XenbusState.CONNECTED)
    bench.guest.send(COMMAND)
    bench.backend = bench.new_backend()
    bench.settle()
    assert bench.guest.receive() == RESPONSE
    assert bench.xen.held == (1, 1)
    assert bench.guest.state is XenbusState.CONNECTED


def test_failure_of_the_engine_comes_out_and_nothing_is_held_after_it(bench: Bench) -> None:
    bench.connect()
    bench.tpm.fails = True
    bench.guest.send(COMMAND)
    with pytest.raises(EngineError):
        bench.backend.serve(0)
    bench.backend.close()
    assert bench.xen.held == (0, 0)
    assert bench.guest.page.memory[4] == PageState.SUBMIT
    bench.backend = bench.new_backend()


def test_event_is_left_alone_when_it_is_of_a_channel_that_is_none_of_the_back_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.connect()
    bench.guest.send(COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(bench.xen.channels, "pending", lambda: 9999)
        bench.backend.serve(0)
    assert bench.tpm.asked == []
    bench.settle()
    assert bench.guest.receive() == RESPONSE


# -- floods ---------------------------------------------------------------------------------------------------------
def test_changes_are_followed_once_and_few_lines_said_when_a_guest_floods_xenstore(bench: Bench) -> None:
    bench.connect()
    for _ in range(5000):
        bench.guest.write(state=4)
    reads = 0
    read = bench.xen.xenstore.read

    def counted(path: str) -> bytes | None:
        nonlocal reads
        reads += 1
        return read(path)

    bench.xen.xenstore.read = counted  # type: ignore[method-assign]
    rounds = 0
    while bench.xen.xenstore._events:
        bench.guest.send(COMMAND)
        bench.backend.serve(0)
        assert bench.guest.receive() == RESPONSE
        rounds += 1
    assert rounds == pytest.approx(5000 / 256, abs=1)
    assert reads == 7 * rounds


def test_few_lines_are_said_when_a_guest_sends_malformed_requests_without_end(bench: Bench) -> None:
    bench.connect()
    for _ in range(200):
        assert bench.command(COMMAND[:9]) is None
    assert len(bench.lines) <= 21


def test_waiting_ends_at_its_limit_when_nothing_happens(bench: Bench) -> None:
    bench.settle()
    began = time.monotonic()
    bench.backend.serve(0.05)
    assert 0.04 < time.monotonic() - began < 5
