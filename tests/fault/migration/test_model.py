"""Two hosts that move a vTPM to each other, in every schedule: never two that may run it, always one in the end."""

from __future__ import annotations

import pytest

from tests.fault.migration.model import Bounds, Explored, explore
from vtpm.wire.migration import Mode

BY_MODE = pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
DEPTH = 20


def _told(mode: Mode, bounds: Bounds, found: Explored) -> None:
    print(
        f"{mode.name.lower()}, {bounds.proposals} proposals, {bounds.writes} writes: {found.states:,} worlds,"
        f" {found.steps:,} steps; {found.schedules:,} schedules of at most {DEPTH} steps lie within them;"
        f" the deepest world is {found.deepest} steps away; from {found.moved:,} it comes to rest at the second host"
    )


@BY_MODE
def test_one_host_holds_the_vtpm_in_every_schedule_of_one_move(mode: Mode) -> None:
    bounds = Bounds(proposals=1, offers=2, writes=2)
    found = explore(mode, bounds, DEPTH)
    _told(mode, bounds, found)
    # The world is as large as it was when this was written: a machine that refuses everything is safe, too.
    assert found.schedules > 1_000_000 and found.moved > 100 and found.back > 100


@pytest.mark.timeout(400)
def test_one_host_holds_the_vtpm_in_every_schedule_there_and_back() -> None:
    bounds = Bounds(proposals=2, offers=2, writes=0)
    found = explore(Mode.STOPPED, bounds, DEPTH)
    _told(Mode.STOPPED, bounds, found)
    assert found.states > 10_000 and found.moved > 1_000 and found.back > 1_000


@pytest.mark.soak
@pytest.mark.timeout(3600)
@BY_MODE
def test_one_host_holds_the_vtpm_in_every_schedule_there_and_back_with_writes(mode: Mode) -> None:
    bounds = Bounds(proposals=2, offers=3, writes=2)
    found = explore(mode, bounds, DEPTH)
    _told(mode, bounds, found)
    assert found.steps > 1_000_000
