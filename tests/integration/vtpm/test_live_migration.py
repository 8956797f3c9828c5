"""Two unmodified QEMUs migrate a running guest whose TPM two vtpmds carry; the managers between them are played."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.guest import Guest, GuestConfig, Image, TpmModel
from tests.support.guest.beat import beat_image, begin_beat, check_beats
from tests.support.relayed import RelayedVtpmd
from tests.support.vtpmd import Vtpmd
from vtpm.wire.manager_link import Arrive, Depart, LinkPower, PowerChanged, Return, Wanted

LIMIT_S = 60.0


@dataclass
class Pair:
    """A guest at its source, a QEMU that waits for it, and the vtpmds of both."""

    source: Vtpmd
    destination: Vtpmd
    guest: Guest
    other: Guest
    uri: str

    def migrate(self) -> str:
        """Migrate the guest and return how that ended for the source."""
        return self.guest.migrate(self.other, self.uri, LIMIT_S)


@pytest.fixture(scope="session")
def image() -> Image:
    return beat_image()


@pytest.fixture(params=[Vtpmd, RelayedVtpmd], ids=["process", "relayed"])
def pair(request: pytest.FixtureRequest, image: Image, tmp_path: Path) -> Iterator[Pair]:
    uri = f"unix:{tmp_path / 'm'}"
    with request.param() as source, request.param() as destination:
        source.manager.hello()
        destination.manager.moves.sealed = source.manager.moves.sealed
        destination.manager.moves.has_load = False
        destination.manager.hello()
        home = GuestConfig(image, source.folder / "control", TpmModel.CRB)
        away = GuestConfig(
            image, destination.folder / "control", TpmModel.CRB, extra_arguments=("-incoming", "defer", "-S")
        )
        with Guest(home, tmp_path / "home") as guest, Guest(away, tmp_path / "away", incoming=True) as other:
            begin_beat(guest)
            yield Pair(source, destination, guest, other, uri)


def test_guest_goes_on_at_the_destination_when_its_vtpm_is_activated(pair: Pair) -> None:
    pair.source.manager.moves.departs = True
    pair.destination.manager.moves.arrives = True
    assert pair.migrate() == "completed"
    # The sign of whoever drives both: the source has completed and the destination is paused.
    assert pair.other.qmp.execute("query-status")["status"] in ("paused", "prelaunch")
    pair.destination.manager.activate()
    pair.other.qmp.execute("cont")
    pair.other.adopt(pair.guest)
    check_beats(pair.other)
    assert not pair.source.manager.of(Return)


def test_guest_s_command_waits_when_the_vtpm_is_activated_only_after_it(pair: Pair) -> None:
    pair.source.manager.moves.departs = True
    pair.destination.manager.moves.arrives = True
    assert pair.migrate() == "completed"
    pair.other.qmp.execute("cont")
    pair.destination.manager.wait_for(Wanted)
    pair.destination.manager.activate()
    pair.other.adopt(pair.guest)
    check_beats(pair.other)


def test_guest_goes_on_at_the_source_when_the_destination_s_init_is_refused(pair: Pair) -> None:
    pair.source.manager.moves.departs = True
    pair.source.manager.moves.returns = None
    assert pair.migrate() == "failed"
    pair.destination.manager.wait_for(Arrive)
    check_beats(pair.guest)
    assert pair.source.manager.of(Return)
    assert not [one for one in pair.destination.manager.of(PowerChanged) if one.power is LinkPower.ON]


def test_guest_goes_on_at_the_source_when_the_manager_grants_no_departure(pair: Pair) -> None:
    assert pair.migrate() == "failed"
    check_beats(pair.guest)
    assert pair.source.manager.of(Depart)
    assert not pair.source.manager.of(Return)
