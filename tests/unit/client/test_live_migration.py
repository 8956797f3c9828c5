"""The order in which a guest is moved between two played QEMUs, every refusal, and every way to lose one of them."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from qemu.qmp import EventListener

from tests.support.played_qemu import PlayedQemu, tpm
from vtpm.client import live_migration, qemu_monitor
from vtpm.client.live_migration import InterruptedMigrationError, LiveMigrationError, Whereabouts, drive
from vtpm.client.qemu_monitor import Progress, QmpAddress
from vtpm.errors import AttestationError, ConflictError, UnavailableError, UsageError, VtpmError

URI = "tcp:host-b.example:4444"
MACHINE = UUID(int=5)
PREPARED = ["source migrate-set-capabilities", "destination migrate-set-capabilities", "destination stop"]
BEGUN = [*PREPARED, "departing", "destination migrate-incoming", "source migrate"]
MOVED = [*BEGUN, "arrived", "destination cont"]
RAM = {"transferred": 3, "remaining": 5, "total": 9, "duplicate": 1}


class Two:
    """Two played QEMUs, and what was done to them and called, in order."""

    def __init__(self, folder: Path) -> None:
        self.calls: list[str] = []
        self.seen: list[Progress] = []
        self.source = PlayedQemu(folder / "s", "source", "running", self.calls)
        self.destination = PlayedQemu(folder / "d", "destination", "inmigrate", self.calls)
        self.source.then["migrate"] = self.complete

    def activate(self) -> None:
        """Have the source's migration under way."""
        self.source.becomes("active", ram=RAM)

    def complete(self) -> None:
        """Have the migration come to its end, as QEMU does: the destination first."""
        self.activate()
        self.destination.becomes("completed", "paused")
        self.source.becomes("completed", "postmigrate", ram=RAM)

    def drive(self, limit_s: float = 20.0, **more: Any) -> None:
        """Move the guest."""
        arguments: dict[str, Any] = {
            "arrived": partial(self.calls.append, "arrived"),
            "departing": partial(self.calls.append, "departing"),
            "progress": self.seen.append,
            "limit_s": limit_s,
        }
        source, destination = (QmpAddress(str(qemu.path)) for qemu in (self.source, self.destination))
        drive(source, destination, **{"uri": URI, **arguments, **more})

    def fails(self, expected: type[VtpmError] = LiveMigrationError, **more: Any) -> Any:
        """Move the guest, in vain, and return the error."""
        with pytest.raises(expected) as caught:
            self.drive(**more)
        assert type(caught.value) is expected
        return caught.value


@pytest.fixture
def two(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Two]:
    with ExitStack() as stack:
        both = Two(tmp_path)
        stack.enter_context(both.source)
        stack.enter_context(both.destination)
        yield both
    # What is to be said is in the errors; no library says it a second time.
    assert capfd.readouterr() == ("", "")


def interrupt() -> None:
    """Send this process what Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def raise_(error: BaseException) -> None:
    raise error


def test_guest_goes_on_only_after_its_vtpm_when_all_goes_well(two: Two) -> None:
    two.drive()
    assert two.calls == MOVED
    assert two.source.arguments["migrate"] == two.destination.arguments["migrate-incoming"] == {"uri": URI}
    assert two.destination.run_state == "running"
    assert two.source.run_state == "postmigrate"


def test_return_path_is_set_at_both_ends_and_no_other_way_of_moving_when_it_begins(two: Two) -> None:
    two.drive()
    for qemu in (two.source, two.destination):
        (listed,) = qemu.arguments["migrate-set-capabilities"].values()
        assert {one["capability"]: one["state"] for one in listed} == {
            "return-path": True,
            "events": True,
            "postcopy-ram": False,
            "pause-before-switchover": False,
        }


def test_progress_is_told_when_the_source_says_something(two: Two) -> None:
    two.drive()
    assert two.seen[-1] == Progress("completed", transferred_bytes=3, remaining_bytes=5, total_bytes=9)


def test_progress_is_asked_for_when_the_source_says_nothing(two: Two) -> None:
    def stay_quiet() -> None:
        two.source.migration = {"status": "active", "ram": RAM}
        two.source.then["query-migrate"] = two.complete

    two.source.then["migrate"] = stay_quiet
    two.drive()
    assert [one.status for one in two.seen] == ["active", "completed"]


def test_end_is_awaited_when_the_destination_reports_later_than_the_source(two: Two) -> None:
    def source_first() -> None:
        two.source.becomes("completed", "postmigrate")
        two.destination.then["query-status"] = partial(two.destination.becomes, "completed", "paused")

    two.source.then["migrate"] = source_first
    two.drive()
    assert two.calls == MOVED


def test_events_are_not_kept_when_there_are_many(two: Two) -> None:
    def flood() -> None:
        for _ in range(5000):
            two.destination.say("MIGRATION", status="active", padding="x" * 200)
            two.destination.say("RTC_CHANGE", offset=78)
        two.complete()

    def arrived() -> None:
        listeners = [one for one in gc.get_objects() if isinstance(one, EventListener)]
        assert listeners
        assert not any(one.history for one in listeners)

    two.source.then["migrate"] = flood
    two.drive(arrived=arrived)


REFUSALS: dict[str, tuple[Callable[[Two], None], str]] = {
    "source-paused": (lambda two: setattr(two.source, "run_state", "paused"), "does not run: it is paused"),
    "source-moved": (lambda two: two.source.migration.update(status="completed", ram=RAM), "given its guest away"),
    "source-migrating": (lambda two: two.source.migration.update(status="active"), "migrating already: active"),
    "source-cancelling": (lambda two: two.source.migration.update(status="cancelling"), "already: cancelling"),
    "source-blocked": (
        lambda two: two.source.migration.update({"blocked-reasons": ["TPM emulator too old", "9p"]}),
        "cannot be migrated: TPM emulator too old; 9p",
    ),
    "destination-running": (lambda two: setattr(two.destination, "run_state", "running"), "does not wait for a guest"),
    "destination-prelaunch": (lambda two: setattr(two.destination, "run_state", "prelaunch"), "it is prelaunch"),
    "destination-listens": (lambda two: two.destination.migration.update(status="setup"), "migration setup"),
    "source-without-tpm": (lambda two: two.source.tpms.clear(), "the source's QEMU has 0 TPMs"),
    "destination-without-tpm": (lambda two: two.destination.tpms.clear(), "the destination's QEMU has 0 TPMs"),
    "passthrough": (
        lambda two: setattr(two.destination, "tpms", [tpm("tpm-crb", "passthrough")]),
        "the destination's QEMU has 0 TPMs of an emulator",
    ),
    "two-tpms": (lambda two: setattr(two.source, "tpms", [tpm("tpm-crb")] * 2), "the source's QEMU has 2 TPMs"),
    "other-model": (lambda two: setattr(two.destination, "tpms", [tpm("tpm-tis")]), "has a tpm-crb, .* a tpm-tis"),
    "other-uuid": (lambda two: setattr(two.destination, "uuid", str(UUID(int=7))), f"the machine {UUID(int=7)}"),
    "capability": (
        lambda two: two.destination.refuses.update({"migrate-set-capabilities": "Return path is not supported"}),
        "the destination's QEMU refuses migrate-set-capabilities: Return path is not supported",
    ),
}


@pytest.mark.parametrize("unfit", REFUSALS)
def test_nothing_is_begun_when_one_is_not_fit(two: Two, unfit: str) -> None:
    change, message = REFUSALS[unfit]
    change(two)
    with pytest.raises(ConflictError, match=message):
        two.drive()
    assert set(two.calls) <= set(PREPARED)


def test_nothing_is_begun_when_the_vtpm_is_another_machine_s(two: Two) -> None:
    assert str(MACHINE) in two.fails(ConflictError, vm_uuid=MACHINE).message
    assert not two.calls


def test_guest_is_moved_when_the_vtpm_is_its_machine_s(two: Two) -> None:
    two.source.uuid = two.destination.uuid = str(MACHINE)
    two.drive(vm_uuid=MACHINE)
    assert two.calls == MOVED


@pytest.mark.parametrize("before", ["completed", "failed", "cancelled"])
def test_guest_is_moved_when_it_came_by_a_migration_or_one_has_failed(two: Two, before: str) -> None:
    two.source.migration = {"status": before}
    two.drive()
    assert two.calls == MOVED


@pytest.mark.parametrize("uri", ["exec:cat > /tmp/state", "fd:guest", "file:/tmp/state", "host-b:4444", ""])
def test_nobody_is_asked_when_there_is_no_way_back(two: Two, uri: str) -> None:
    two.fails(UsageError, uri=uri)
    assert not two.source.arguments


def test_nothing_is_begun_when_the_vtpm_may_not_depart(two: Two) -> None:
    error = AttestationError("the peer has booted something else")
    assert two.fails(AttestationError, departing=partial(raise_, error)) is error
    assert two.calls == PREPARED


def test_nothing_is_begun_when_nobody_listens(two: Two, tmp_path: Path) -> None:
    nowhere = QmpAddress(str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match=r"the source's QEMU cannot be reached at .*/nowhere: .*No such file"):
        drive(nowhere, nowhere, URI, arrived=lambda: None, progress=two.seen.append, limit_s=1)


@pytest.mark.parametrize("greeting", [b"220 mail.example ESMTP\r\n", b'{"event": "x"}\r\n', b"x" * 100_000 + b"\n"])
def test_nothing_is_begun_when_it_is_no_qemu_that_listens(two: Two, greeting: bytes) -> None:
    two.destination.greeting = greeting
    assert "the destination's QEMU cannot be reached" in two.fails(UnavailableError).message
    assert not two.calls


def test_nothing_is_begun_when_another_client_has_the_monitor(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_monitor, "CONNECT_LIMIT_S", 0.2)
    two.destination.greeting = None
    error = two.fails(UnavailableError)
    assert "does not greet" in error.message
    assert "one client at a time" in error.next_step
    assert not two.calls


def test_nothing_is_begun_when_an_answer_cannot_be_read(two: Two) -> None:
    two.destination.answers["query-tpm"] = {"model": "tpm-crb"}
    error = two.fails(qemu_monitor.MonitorLost)
    assert "what the destination's QEMU answers cannot be read: query-tpm is of type dict" in error.message
    assert not two.calls


def test_nothing_is_begun_when_one_does_not_answer(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_monitor.Monitor.execute, "__defaults__", (None, 0.2))
    two.destination.silent.add("query-uuid")
    error = two.fails(qemu_monitor.MonitorLost)
    assert error.message == "the destination's QEMU has not answered query-uuid within 0.2 s"
    assert not two.calls


@pytest.mark.parametrize(("who", "command"), [("destination", "migrate-incoming"), ("source", "migrate")])
def test_guest_runs_on_when_qemu_refuses_to_begin(two: Two, who: str, command: str) -> None:
    del two.source.then["migrate"]
    getattr(two, who).refuses[command] = "Address already in use"
    error = two.fails()
    assert error.message == (
        f"the {who}'s QEMU refuses {command}: Address already in use. The guest runs on at the source"
    )
    assert error.whereabouts is Whereabouts.SOURCE
    # Nothing is cancelled: if a migration is under way, it is somebody else's.
    assert two.calls == BEGUN[: BEGUN.index(f"{who} {command}") + 1]


def test_guest_runs_on_and_qemu_s_reason_is_named_when_the_migration_fails(two: Two) -> None:
    two.source.then["migrate"] = lambda: two.source.becomes("failed", **{"error-desc": "Broken pipe"})
    error = two.fails()
    assert error.message == "QEMU's migration has failed: Broken pipe. The guest runs on at the source"
    assert error.whereabouts is Whereabouts.SOURCE
    assert two.calls == BEGUN


def test_guest_is_seen_to_run_again_when_the_migration_fails_at_the_end(two: Two) -> None:
    def resume() -> None:
        del two.source.then["query-status"]
        two.source.run_state = "running"
        two.source.say("RESUME")

    def fail() -> None:
        two.source.then["query-status"] = resume
        two.source.becomes("failed", "finish-migrate")

    two.source.then["migrate"] = fail
    error = two.fails()
    assert "QEMU gives no reason" in error.message
    assert error.message.endswith("The guest runs on at the source")
    assert two.calls == BEGUN


def test_nothing_is_taken_for_known_when_the_source_is_lost_after_its_migration_has_failed(two: Two) -> None:
    def fail() -> None:
        two.source.silent.add("query-status")
        two.source.then["query-status"] = two.source.hang_up
        two.source.becomes("failed", "finish-migrate", **{"error-desc": "Broken pipe"})

    two.source.then["migrate"] = fail
    error = two.fails()
    assert error.message.startswith(
        "QEMU's migration has failed: Broken pipe; then the connection to the source's QEMU is lost"
    )
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert two.calls == BEGUN


@pytest.mark.parametrize("run_state", ["postmigrate", "paused", "finish-migrate"])
def test_source_is_not_told_to_go_on_when_it_does_not_by_itself(
    two: Two, run_state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_migration, "SETTLE_LIMIT_S", 0.2)
    two.source.then["migrate"] = lambda: two.source.becomes("failed", run_state)
    error = two.fails()
    assert error.message.endswith(f"The guest is still the source's, but does not run there: it is {run_state}")
    assert error.whereabouts is Whereabouts.SOURCE
    assert two.calls == BEGUN


def test_migration_is_cancelled_when_it_is_interrupted(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.activate(), interrupt())
    error = two.fails(InterruptedMigrationError)
    assert error.message == "interrupted. The guest runs on at the source"
    assert error.exit_status == 130
    assert error.whereabouts is Whereabouts.SOURCE
    assert two.calls == [*BEGUN, "source migrate_cancel"]


def test_nothing_is_begun_when_it_is_interrupted_before(two: Two) -> None:
    two.destination.silent.add("query-uuid")
    two.destination.then["query-uuid"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        two.drive()
    assert not two.calls


def test_interrupt_is_not_heard_when_the_caller_has_it_ignored(two: Two) -> None:
    two.source.then["migrate"] = lambda: (interrupt(), two.complete())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        two.drive()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert two.calls == MOVED


def test_guest_goes_on_at_the_destination_when_the_interrupt_comes_too_late(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.activate(), interrupt())
    two.source.then["migrate_cancel"] = two.complete
    two.source.answers["migrate_cancel"] = {}
    two.drive()
    assert two.calls == [*BEGUN, "source migrate_cancel", "arrived", "destination cont"]


def test_nothing_is_taken_for_known_when_it_is_interrupted_twice(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.activate(), interrupt())
    two.source.answers["migrate_cancel"] = {}
    two.source.then["migrate_cancel"] = interrupt
    error = two.fails(InterruptedMigrationError)
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert "query-migrate" in error.next_step
    assert "arrived" not in two.calls


def test_migration_is_cancelled_when_it_takes_too_long(two: Two) -> None:
    two.source.then["migrate"] = two.activate
    error = two.fails(limit_s=0.3)
    assert error.message == "the migration has not completed within 0.3 s. The guest runs on at the source"
    assert error.whereabouts is Whereabouts.SOURCE
    assert two.calls == [*BEGUN, "source migrate_cancel"]


def test_migration_is_cancelled_when_qemu_is_busy_for_too_long(two: Two) -> None:
    def hang() -> None:
        two.source.silent.add("query-migrate")
        two.activate()

    two.source.then["migrate"] = hang
    two.source.then["migrate_cancel"] = lambda: two.source.silent.clear()
    assert two.fails(limit_s=0.3).whereabouts is Whereabouts.SOURCE
    assert two.calls == [*BEGUN, "source migrate_cancel"]


def test_nothing_is_taken_for_known_when_a_cancelled_migration_does_not_end(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_migration, "SETTLE_LIMIT_S", 0.2)
    two.source.then["migrate"] = lambda: two.source.becomes("cancelling")
    error = two.fails(limit_s=0.3)
    assert "then the source's QEMU has not ended its migration within 0.2 s" in error.message
    assert error.whereabouts is Whereabouts.UNKNOWN


def test_migration_is_cancelled_when_the_destination_is_lost(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.activate(), two.destination.hang_up())
    error = two.fails()
    assert error.message == "the connection to the destination's QEMU is lost. The guest runs on at the source"
    assert error.whereabouts is Whereabouts.SOURCE
    assert two.calls == [*BEGUN, "source migrate_cancel"]


def test_nothing_leaves_when_the_destination_is_lost_before_it_listens(two: Two) -> None:
    two.destination.silent.add("migrate-incoming")
    two.destination.then["migrate-incoming"] = two.destination.hang_up
    assert two.fails().whereabouts is Whereabouts.SOURCE
    assert two.calls == [*PREPARED, "departing", "destination migrate-incoming"]


def test_vtpm_is_not_released_when_the_destination_is_lost_and_the_source_completes(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.activate(), two.destination.hang_up())
    two.source.answers["migrate_cancel"] = {}
    two.source.then["migrate_cancel"] = lambda: two.source.becomes("completed", "postmigrate")
    error = two.fails()
    assert error.message == (
        "the source's migration has completed, but the connection to the destination's QEMU is lost. "
        "Whose the guest is, is not known: the source's QEMU says postmigrate"
    )
    assert error.next_step.startswith("Never let the source's go on. Ask the destination's")
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert two.calls == [*BEGUN, "source migrate_cancel"]


def test_vtpm_is_not_released_when_the_destination_is_lost_at_the_end(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.destination.hang_up(), two.source.becomes("completed", "postmigrate"))
    assert two.fails().whereabouts is Whereabouts.UNKNOWN
    assert two.calls == BEGUN


@pytest.mark.parametrize("active", [True, False], ids=["under-way", "begun-unanswered"])
def test_nothing_is_taken_for_known_when_the_source_is_lost(two: Two, active: bool) -> None:
    if active:
        two.source.then["migrate"] = lambda: (two.activate(), two.source.hang_up())
    else:
        two.source.silent.add("migrate")
        two.source.then["migrate"] = two.source.hang_up
    error = two.fails()
    assert error.message == (
        "the connection to the source's QEMU is lost. Whose the guest is, is not known: "
        "the destination's QEMU says inmigrate"
    )
    assert error.next_step.startswith("Let neither QEMU go on")
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert two.calls == BEGUN


def test_nothing_is_taken_for_known_when_both_are_lost(two: Two) -> None:
    two.source.then["migrate"] = lambda: (two.activate(), two.destination.hang_up(), two.source.hang_up())
    error = two.fails()
    assert error.message.endswith("Whose the guest is, is not known: neither QEMU answers")
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert two.calls == BEGUN


@pytest.mark.parametrize(
    "answer", [[], {"status": 7}, {"status": "active", "ram": {"transferred": "all"}}, {"status": None}]
)
def test_nothing_is_taken_for_known_when_the_source_s_answer_cannot_be_read(two: Two, answer: object) -> None:
    two.source.then["migrate"] = lambda: two.source.answers.update({"query-migrate": answer})
    error = two.fails()
    assert "what the source's QEMU answers cannot be read" in error.message
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert "arrived" not in two.calls


def test_destination_counts_as_lost_when_it_says_more_than_a_line_may_hold(two: Two) -> None:
    long = json.dumps({"event": "x" * qemu_monitor.MAX_LINE_BYTES}).encode() + b"\r\n"
    two.source.then["migrate"] = lambda: (two.activate(), two.destination.send(long))
    error = two.fails(limit_s=5)
    assert error.message.startswith("the connection to the destination's QEMU is lost")
    assert error.whereabouts is Whereabouts.SOURCE


@pytest.mark.parametrize(
    ("here", "there"), [("postmigrate", "running"), ("running", "paused"), ("postmigrate", "inmigrate")]
)
def test_vtpm_is_not_released_when_not_both_stand_still(
    two: Two, here: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_migration, "SETTLE_LIMIT_S", 0.2)

    def complete() -> None:
        two.destination.becomes("completed", there)
        two.source.becomes("completed", here)

    two.source.then["migrate"] = complete
    error = two.fails()
    assert error.message.endswith(f"the source's QEMU says {here}, the destination's QEMU says {there}")
    assert error.whereabouts is Whereabouts.UNKNOWN
    assert two.calls == BEGUN


def test_vtpm_is_not_released_when_the_interrupt_comes_between(two: Two) -> None:
    def complete() -> None:
        two.destination.silent.add("query-status")
        two.destination.then["query-status"] = interrupt
        two.complete()

    two.source.then["migrate"] = complete
    assert two.fails(InterruptedMigrationError).whereabouts is Whereabouts.BETWEEN
    assert two.calls == BEGUN


@pytest.mark.parametrize("next_step", ["", "Ask the other host"])
def test_guest_stays_paused_and_the_error_says_so_when_the_vtpm_does_not_arrive(two: Two, next_step: str) -> None:
    refused = AttestationError("the destination has not proven itself", next_step=next_step)
    error = two.fails(AttestationError, arrived=partial(raise_, refused))
    assert error.message == (
        "the destination has not proven itself. The source's migration has completed, and the guest waits at the "
        "destination, paused"
    )
    assert error.next_step.startswith(f"{next_step}. Never let" if next_step else "Never let")
    assert two.calls == BEGUN
    assert (two.source.run_state, two.destination.run_state) == ("postmigrate", "paused")


def test_guest_stays_paused_when_it_is_interrupted_before_its_vtpm_has_arrived(two: Two) -> None:
    error = two.fails(InterruptedMigrationError, arrived=interrupt)
    assert error.whereabouts is Whereabouts.BETWEEN
    assert two.calls == BEGUN


def _refuse_cont(two: Two) -> None:
    two.destination.refuses["cont"] = "Failed to lock the disk"


def _lose_destination(two: Two) -> None:
    two.destination.silent.add("cont")
    two.destination.then["cont"] = two.destination.hang_up


def _stay_paused(two: Two) -> None:
    two.destination.answers["cont"] = {}


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (_refuse_cont, "the destination's QEMU refuses cont: Failed to lock the disk"),
        (_lose_destination, "the connection to the destination's QEMU is lost"),
        (_stay_paused, "it is paused"),
    ],
)
def test_error_says_that_both_have_arrived_when_the_guest_is_not_seen_to_go_on(
    two: Two, happens: Callable[[Two], None], why: str
) -> None:
    happens(two)
    error = two.fails()
    assert error.message == (f"guest and vTPM are at the destination, but the guest is not seen to run there: {why}")
    assert error.next_step.startswith("Never let the source's go on")
    assert error.whereabouts is Whereabouts.DESTINATION


def test_error_says_that_both_have_arrived_when_the_interrupt_comes_at_the_end(two: Two) -> None:
    two.destination.silent.add("cont")
    two.destination.then["cont"] = interrupt
    assert two.fails(InterruptedMigrationError).whereabouts is Whereabouts.DESTINATION


def test_no_connection_is_left_when_it_is_over(two: Two) -> None:
    before = len(os.listdir("/proc/self/fd"))
    two.drive()
    # The played QEMUs have one accepted connection each.
    assert len(os.listdir("/proc/self/fd")) == before + 2


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("/run/qmp", "/run/qmp"),
        ("./a:4", "./a:4"),
        ("localhost:4444", ("localhost", 4444)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_address_is_read_when_it_is_a_path_or_a_host_with_its_port(text: str, where: object) -> None:
    assert QmpAddress.parse(text).where == where


@pytest.mark.parametrize("text", ["", "qmp", ":4444", "host:", "host:0", "host:65536", "host:4x"])
def test_address_is_refused_when_it_is_neither(text: str) -> None:
    with pytest.raises(UsageError, match="no address of a QEMU's monitor"):
        QmpAddress.parse(text)
