"""What is seen of a guest that is moved: on a terminal, in a log, with JSON; the QEMUs are played."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.support.played_qemu import PlayedQemu
from tests.unit.cli.conftest import read_terminal
from vtpm.cli.live_migration import drive_guest
from vtpm.cli.output import Output
from vtpm.errors import UsageError

MIB = 1 << 20
NUMBERS = [(0, 256), (100, 156), (240, 20)]


class Guest:
    """A guest that is moved from one played QEMU to another, telling some numbers on its way."""

    def __init__(self, folder: Path) -> None:
        self.calls: list[str] = []
        self.source = PlayedQemu(folder / "s", "source", "running", self.calls)
        self.destination = PlayedQemu(folder / "d", "destination", "inmigrate", self.calls)
        self._left = list(NUMBERS)
        self.source.then["migrate"] = partial(self.source.becomes, "active")
        self.source.then["query-migrate"] = self._go_further

    def _go_further(self) -> None:
        if "source migrate" not in self.calls or self.source.run_state == "postmigrate":
            return
        if self._left:
            sent, left = self._left.pop(0)
            ram = {"transferred": sent * MIB, "remaining": left * MIB, "total": 256 * MIB}
            self.source.becomes("active", ram=ram)
        else:
            self.destination.becomes("completed", "paused")
            self.source.becomes("completed", "postmigrate")

    def move(self, output: Output = Output.HUMAN) -> None:
        drive_guest(
            "web1",
            str(self.source.path),
            str(self.destination.path),
            "tcp:host-b:4444",
            departing=partial(self.calls.append, "departing"),
            arrived=partial(self.calls.append, "arrived"),
            vm_uuid=None,
            limit_s=20,
            output=output,
        )
        assert self.calls[-2:] == ["arrived", "destination cont"]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with ExitStack() as stack:
        one = Guest(tmp_path)
        stack.enter_context(one.source)
        stack.enter_context(one.destination)
        yield one


def test_each_change_is_a_line_and_numbers_are_at_most_one_a_second_when_it_is_no_terminal(
    guest: Guest, capfd: pytest.CaptureFixture[str]
) -> None:
    guest.move()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Moving web1: both hosts prove what they are",
        "Moving web1: active",
        "Moving web1: completed",
        "Moving web1: its guest waits, paused, for the vTPM to arrive",
    ]


def test_numbers_are_lines_when_a_second_has_passed(
    guest: Guest, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtpm.cli.live_migration.LINE_EVERY_S", 0.0)
    guest.move()
    assert "Moving web1: active, 156 of 256 MiB to go, 100 MiB sent\n" in capfd.readouterr().err


def test_one_line_is_rewritten_when_it_is_a_terminal(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as seen:
        with open(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            monkeypatch.setenv("TERM", "xterm")
            guest.move()
            monkeypatch.undo()
        text = b"".join(iter(lambda: read_terminal(seen), b"")).decode()
    assert "Moving web1" in text
    # Erase the line: each text takes the place of the one before.
    assert "\x1b[2K" in text


def test_nothing_is_shown_when_json_is_asked_for(guest: Guest, capfd: pytest.CaptureFixture[str]) -> None:
    guest.move(Output.JSON)
    assert capfd.readouterr() == ("", "")


def test_guest_is_moved_all_the_same_when_nobody_reads_how_far_it_is(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.FileIO(writer, "w") as raw:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        guest.move()
        monkeypatch.undo()


def test_nobody_is_asked_when_an_address_is_none(guest: Guest) -> None:
    with pytest.raises(UsageError, match="'qmp' is no address"):
        drive_guest(
            "web1",
            "qmp",
            str(guest.destination.path),
            "tcp:h:1",
            departing=lambda: None,
            arrived=lambda: None,
            vm_uuid=None,
            limit_s=1,
            output=Output.HUMAN,
        )
    assert not guest.destination.arguments
