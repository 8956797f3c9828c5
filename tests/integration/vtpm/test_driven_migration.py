"""The client drives two unmodified QEMUs; vtpmds carry the guest's TPM, the managers between them are played."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.guest import Guest, GuestConfig, Image, TpmModel
from tests.support.guest.beat import LIMIT_S, beat_image, begin_beat, check_beats
from tests.support.vtpmd import PlayedManager, Vtpmd
from vtpm.client.live_migration import InterruptedMigrationError, LiveMigrationError, Whereabouts, drive
from vtpm.client.qemu_monitor import Progress, QmpAddress
from vtpm.errors import ConflictError, UnavailableError
from vtpm.tpm.types import StateKind
from vtpm.wire.manager_link import Arrive, Return

MACHINE = UUID("0d8e2f1c-3a4b-4c5d-8e6f-7a8b9c0d1e2f")
SLOW_BYTES_PER_S = 1 << 20
"""At this rate no guest's memory is over within a test."""
FAST_BYTES_PER_S = 1 << 30


def unreachable() -> None:
    """Be the word to a manager that does not answer."""
    raise UnavailableError("the manager does not answer")


def interrupt_once_active() -> Callable[[Progress], None]:
    """Return what interrupts the caller, as Ctrl-C does, once memory is on its way."""
    sent: list[Progress] = []

    def look(now: Progress) -> None:
        if now.transferred_bytes and not sent:
            sent.append(now)
            os.kill(os.getpid(), signal.SIGINT)

    return look


class Moves:
    """A guest at home, and hosts to which it moves. Each has a vtpmd, and one QEMU after the other."""

    def __init__(self, stack: ExitStack, image: Image, folder: Path) -> None:
        self._image, self._folder = image, folder
        self.managers: dict[str, PlayedManager] = {}
        self._controls: dict[str, Path] = {}
        sealed: dict[bytes, dict[StateKind, bytes]] = {}
        for name in ("home", "away", "third"):
            vtpmd = stack.enter_context(Vtpmd())
            self.managers[name], self._controls[name] = vtpmd.manager, vtpmd.folder / "control"
            vtpmd.manager.moves.sealed = sealed
            vtpmd.manager.moves.has_load = name == "home"
            vtpmd.manager.moves.departs = True
            vtpmd.manager.moves.returns = None
            vtpmd.manager.hello()
        self.guest = stack.enter_context(self._guest("home"))

    def awaiting(self, name: str) -> Guest:
        """Return a new QEMU that is to wait for the guest; without -S, which the drive does not rely on."""
        return self._guest(name, "-incoming", "defer")

    def drive(
        self,
        to: str,
        *,
        source: str = "home",
        arrived: Callable[[], None] = unreachable,
        progress: Callable[[Progress], None] = lambda now: None,
    ) -> None:
        """Move the guest."""
        drive(
            self._monitor(source),
            self._monitor(to),
            f"unix:{self._folder / 'm'}",
            arrived=arrived,
            progress=progress,
            limit_s=LIMIT_S,
            vm_uuid=MACHINE,
        )

    def move(self, guest: Guest, source: str, other: Guest, to: str) -> None:
        """Move it with its vTPM, which is released on what its holder relies on."""

        def arrived() -> None:
            assert other.qmp.execute("query-status")["status"] == "paused"
            assert guest.qmp.execute("query-status")["status"] == "postmigrate"
            self.managers[to].state.update(self.managers[source].state)
            self.managers[to].activate()

        self.drive(to, source=source, arrived=arrived)
        other.adopt(guest)

    def _monitor(self, name: str) -> QmpAddress:
        return QmpAddress(str(self._folder / f"{name}.qmp"))

    def _guest(self, name: str, *arguments: str) -> Guest:
        monitor = f"unix:{self._folder / name}.qmp,server=on,wait=off"
        config = GuestConfig(
            self._image,
            self._controls[name],
            TpmModel.CRB,
            uuid=MACHINE,
            extra_arguments=("-qmp", monitor, *arguments),
        )
        return Guest(config, self._folder / name, incoming=bool(arguments))


@pytest.fixture
def moves(tmp_path: Path) -> Iterator[Moves]:
    with ExitStack() as stack:
        one = Moves(stack, beat_image(), tmp_path)
        begin_beat(one.guest)
        yield one


def test_guest_runs_on_at_its_source_until_an_attempt_succeeds(moves: Moves) -> None:
    home, away = moves.managers["home"], moves.managers["away"]
    # Interrupted while its memory is on its way.
    moves.guest.qmp.execute("migrate-set-parameters", max_bandwidth=SLOW_BYTES_PER_S)
    with pytest.raises(InterruptedMigrationError) as interrupted, moves.awaiting("away"):
        moves.drive("away", progress=interrupt_once_active())
    assert interrupted.value.whereabouts is Whereabouts.SOURCE
    assert "runs on at the source" in interrupted.value.message
    assert not away.of(Arrive)

    # Its TPM is refused at the destination, at the very end.
    moves.guest.qmp.execute("migrate-set-parameters", max_bandwidth=FAST_BYTES_PER_S)
    with pytest.raises(LiveMigrationError) as refused, moves.awaiting("away"):
        moves.drive("away")
    assert refused.value.whereabouts is Whereabouts.SOURCE
    assert "runs on at the source" in refused.value.message
    assert away.of(Arrive)
    assert home.of(Return)

    away.moves.arrives = True
    with moves.awaiting("away") as other:
        moves.move(moves.guest, "home", other, "away")
        check_beats(other)


def test_guest_moves_on_from_where_it_came_to_and_never_again_from_where_it_was(moves: Moves) -> None:
    moves.managers["away"].moves.arrives = moves.managers["third"].moves.arrives = True
    with moves.awaiting("away") as other, moves.awaiting("third") as third:
        moves.move(moves.guest, "home", other, "away")
        with pytest.raises(ConflictError, match="given its guest away already"):
            moves.drive("third")
        # QEMU lets it go on, its vTPM does not; and it is not moved.
        moves.guest.qmp.execute("cont")
        with pytest.raises(ConflictError, match="given its guest away already"):
            moves.drive("third")
        moves.guest.qmp.execute("stop")
        moves.move(other, "away", third, "third")
        check_beats(third)


def test_guest_waits_at_the_destination_when_its_vtpm_has_not_arrived(moves: Moves) -> None:
    moves.managers["away"].moves.arrives = True
    with moves.awaiting("away") as other:
        with pytest.raises(UnavailableError) as caught:
            moves.drive("away")
        assert caught.value.message.endswith("the guest waits at the destination, paused")
        assert other.qmp.execute("query-status")["status"] == "paused"
        assert moves.guest.qmp.execute("query-status")["status"] == "postmigrate"
        # What the error says is to be done.
        moves.managers["away"].activate()
        other.qmp.execute("cont")
        other.adopt(moves.guest)
        check_beats(other)
