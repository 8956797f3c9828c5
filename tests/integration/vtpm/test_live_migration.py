"""Two unmodified QEMUs migrate a running guest whose TPM two vtpmds carry; the managers between them are played."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.guest import Guest, GuestConfig, Image, TpmModel, build_image
from tests.support.guest.channel import Deadline
from tests.support.relayed import RelayedVtpmd
from tests.support.vtpmd import Vtpmd
from vtpm.wire.manager_link import Arrive, Depart, LinkPower, PowerChanged, Return, Wanted

LIMIT_S = 60.0
BEAT = """
(
    n=0
    while [ ! -e /tmp/stop ]; do
        tpm2_pcrextend 16:sha256=$(printf %064x $n) 2>> /tmp/beat.errors || echo "extend $n" >> /tmp/beat.errors
        n=$((n + 1))
        echo $n > /tmp/beat.count
    done
    touch /tmp/beat.over
) > /dev/null 2>&1 < /dev/null &
"""
"""Extends PCR 16 with 0, 1, 2, ... without pause, and notes each failure."""


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
        for one in (self.guest, self.other):
            one.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
        self.other.qmp.execute("migrate-incoming", uri=self.uri)
        self.guest.qmp.execute("migrate", uri=self.uri)
        return self.guest.wait_migrated(LIMIT_S)


def beats(guest: Guest) -> int:
    """Return how often the guest has extended its PCR so far."""
    return int(guest.check("cat /tmp/beat.count"))


def check_beats(guest: Guest) -> None:
    """End the beat; the PCR holds just what was extended, and no command failed."""
    before = beats(guest)
    deadline = Deadline(LIMIT_S)
    while beats(guest) < before + 3:
        assert deadline.remaining_s(), "the guest's TPM does not go on"
    guest.check("touch /tmp/stop; while [ ! -e /tmp/beat.over ]; do sleep 0.1; done", timeout_s=LIMIT_S)
    assert guest.check("cat /tmp/beat.errors") == ""
    expected = bytes(32)
    for number in range(beats(guest)):
        expected = sha256(expected + number.to_bytes(32, "big")).digest()
    held = re.search(r"16\s*: 0x([0-9A-F]{64})", guest.check("tpm2_pcrread sha256:16"))
    assert held is not None
    assert bytes.fromhex(held[1]) == expected


@pytest.fixture(scope="session")
def image() -> Image:
    return build_image()


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
            guest.check(BEAT)
            deadline = Deadline(LIMIT_S)
            while guest.run("test $(cat /tmp/beat.count) -gt 2").status:
                assert deadline.remaining_s()
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
