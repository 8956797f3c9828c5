"""How long a guest stands still that moves with its vTPM, beside the same guest with Debian's swtpm. For bench.

All is emulated, on one host. The guest uses its TPM without pause; it stands still from its source's stop until it has
done two rounds of commands (a PCR extended, an NV counter incremented) where it arrived. swtpm anchors nothing; ours
with a platform TPM as fast as swtpm, and with one that takes 50 ms for each NV write, shows what anchoring costs.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.support.guest import Guest, GuestConfig, Image, TpmModel, swtpm_emulator
from tests.support.guest.beat import beat_image, beats, begin_beat, check_beats
from tests.support.guest.channel import Deadline
from tests.support.journey import Journey
from tests.support.swtpm import booted_platform
from tests.support.two_hosts import known_to_each_other

from bench.slow_tpm import slow_platform
from vtpm.wire.api_migrations import Guest as With

MOVES = 6
LIMIT_S = 60.0
KINDS = ("swtpm", "vtpm, fast TPM", "vtpm, 50 ms a write")


@dataclass(frozen=True)
class Stall:
    """Milliseconds until the TPM went on, and what of that QEMU calls downtime; `ratio` of the medians, to swtpm's."""

    kind: str
    moves: int
    median_ms: float
    most_ms: float
    downtime_ms: float
    ratio: float


class Trip(Protocol):
    """A guest that moves."""

    guest: Guest

    def expect(self, *, paused: bool) -> Guest:
        """Return the emulator that waits for it."""

    def prepare(self, guest: With) -> None:
        """Have its TPM ready to go."""

    def migrate(self, other: Guest) -> str:
        """Have it migrated; returns how that ended."""

    def has_moved(self, other: Guest) -> None:
        """It is the other's from here on."""


class Swtpm:
    """The same with swtpm, and QEMU alone."""

    def __init__(self, image: Image, folder: Path, stack: contextlib.ExitStack) -> None:
        self._image, self._folder, self._stack = image, folder, stack
        self._legs = 0
        self.guest = self._emulator()

    def _emulator(self, *arguments: str) -> Guest:
        place = self._folder / f"leg{self._legs}"
        control = self._stack.enter_context(swtpm_emulator(place / "tpm"))
        config = GuestConfig(self._image, control, TpmModel.CRB, extra_arguments=arguments)
        return self._stack.enter_context(Guest(config, place / "guest", incoming=bool(arguments)))

    def expect(self, *, paused: bool) -> Guest:
        """See Trip."""
        self._legs += 1
        return self._emulator("-incoming", "defer", *(("-S",) if paused else ()))

    def prepare(self, guest: With) -> None:
        """See Trip."""

    def migrate(self, other: Guest) -> str:
        """See Trip."""
        return self.guest.migrate(other, f"unix:{self._folder / f'leg{self._legs}.migration'}", LIMIT_S)

    def has_moved(self, other: Guest) -> None:
        """See Trip."""
        other.adopt(self.guest)
        self.guest = other


def stalls() -> list[Stall]:
    """Measure all kinds, one move of each in turn."""
    with contextlib.ExitStack() as stack:
        image = beat_image()
        trips = {kind: stack.enter_context(_trip(kind, image)) for kind in KINDS}
        seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for _ in range(MOVES):
            for kind, trip in trips.items():
                seen[kind].append(_move(trip))
        for trip in trips.values():
            check_beats(trip.guest)
    medians = {kind: statistics.median(stall for stall, _ in found) for kind, found in seen.items()}
    return [
        Stall(
            kind,
            MOVES,
            medians[kind],
            max(stall for stall, _ in found),
            statistics.median(downtime for _, downtime in found),
            medians[kind] / medians[KINDS[0]],
        )
        for kind, found in seen.items()
    ]


@contextlib.contextmanager
def _trip(kind: str, image: Image) -> Iterator[Trip]:
    # Services of other users read there what operators put there.
    with tempfile.TemporaryDirectory(prefix="vtpm-moves-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        trip: Trip
        if kind == KINDS[0]:
            trip = Swtpm(image, folder, stack)
        else:
            platform = booted_platform if kind == KINDS[1] else slow_platform
            peers = stack.enter_context(known_to_each_other(folder, platform=platform))
            guests = folder / "guests"
            guests.mkdir()
            trip = Journey(peers, image, guests, stack)
        begin_beat(trip.guest)
        yield trip


def _move(trip: Trip) -> tuple[float, float]:
    """Return for how long the guest stood still, and QEMU's downtime; in milliseconds."""
    other = trip.expect(paused=False)
    trip.prepare(With.FOREIGN)
    source = trip.guest
    assert trip.migrate(other) == "completed"
    trip.has_moved(other)
    deadline = Deadline(LIMIT_S)
    began = beats(trip.guest)
    while beats(trip.guest) < began + 2:
        assert deadline.remaining_s(), "the guest's TPM does not go on"
    went_on_s = time.time()
    stopped = source.qmp.wait_event("STOP", LIMIT_S)["timestamp"]
    downtime_ms = float(source.qmp.execute("query-migrate")["downtime"])
    source.kill()
    return (went_on_s - stopped["seconds"] - stopped["microseconds"] / 1e6) * 1e3, downtime_ms
