"""A running guest goes from host to host with its vTPM, and back: real hosts, unmodified QEMUs, all emulated."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.support.cut_link import CutLink
from tests.support.guest import Image
from tests.support.guest.beat import beat_image, begin_beat, check_beats
from tests.support.host import wait_ended
from tests.support.journey import LIMIT_S, OTHER, Journey
from tests.support.two_hosts import Peers, free_port, known_to_each_other
from vtpm.errors import ConflictError, VtpmError
from vtpm.wire.api_migrations import Guest as With

pytestmark = pytest.mark.timeout(300)
MOVES = int(os.environ.get("VTPM_MOVES", "20"))


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with tempfile.TemporaryDirectory(prefix="vtpm-two-") as folder, known_to_each_other(Path(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def image() -> Image:
    return beat_image()


@pytest.fixture
def journey(peers: Peers, image: Image, tmp_path: Path) -> Iterator[Journey]:
    with contextlib.ExitStack() as stack:
        yield Journey(peers, image, tmp_path, stack)


def test_guest_goes_there_and_back_with_its_vtpm_and_misses_nothing(journey: Journey) -> None:
    begin_beat(journey.guest)
    # Somebody else's tool: the guest is wanted there by its first command.
    other = journey.expect()
    journey.prepare(With.FOREIGN)
    assert journey.migrate(other) == "completed"
    assert journey.states() == {"host-a": "frozen", "host-b": "inert"}
    other.qmp.execute("cont")
    journey.has_moved(other)
    journey.guest.check("tpm2_pcrread sha256:16", timeout_s=LIMIT_S)
    assert journey.states() == {"host-b": "running"}
    # Back, driven from here by the command.
    other = journey.expect()
    uri = f"unix:{journey.folder / 'back.migration'}"
    here, there = (str(journey.monitor(leg)) for leg in (journey.legs - 1, journey.legs))
    moved = journey.here.cli(
        *("migrate", journey.name, "--to", OTHER[journey.at], "--qmp", here, "--peer-qmp", there, "--uri", uri)
    )
    assert moved.stdout.startswith("web1 has moved to host-a")
    assert journey.states() == {"host-a": "running"}
    journey.has_moved(other)
    check_beats(journey.guest)
    journey.end()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_guest_goes_to_and_fro_again_and_again_and_misses_nothing(journey: Journey) -> None:
    begin_beat(journey.guest)
    stalls_ms = []
    for leg in range(MOVES):
        other = journey.expect()
        how = (With.FOREIGN, With.DRIVEN)[leg % 2]
        journey.prepare(how)
        assert journey.migrate(other) == "completed"
        stalls_ms.append(int(journey.guest.qmp.execute("query-migrate")["downtime"]))
        if how is With.DRIVEN:
            with journey.here.client() as client:
                client.arrived(journey.name)
        other.qmp.execute("cont")
        journey.leave(other)
    check_beats(journey.guest)
    journey.end()
    print(f"{MOVES} moves; QEMU's downtime in ms: median {median(stalls_ms)}, most {max(stalls_ms)}")


def test_guest_goes_on_where_it_is_when_its_vtpm_may_not_leave_or_does_not_arrive(journey: Journey) -> None:
    begin_beat(journey.guest)
    # Nobody has let it leave.
    other = journey.expect()
    assert journey.migrate(other) == "failed"
    other.kill()
    # Another name is expected there than comes.
    with journey.there.client() as client:
        client.discard_arrival(journey.name)
        journey.name = "web2"
        other = journey.expect()
        journey.name = "web1"
        journey.prepare(With.FOREIGN)
        assert journey.migrate(other) == "failed"
        client.discard_arrival("web2")
    assert journey.states() == {"host-a": "running"}
    check_beats(journey.guest)
    journey.end()


@pytest.mark.parametrize("dies", ["emulator", "vtpmd", "link"])
def test_guest_goes_on_where_it_is_when_its_destination_fails_at_the_switch_over(journey: Journey, dies: str) -> None:
    begin_beat(journey.guest)
    other = journey.expect()
    journey.prepare(With.FOREIGN)
    port = free_port()
    with CutLink(("127.0.0.1", port)) as link:
        journey.begin_and_pause(other, f"tcp:127.0.0.1:{port}", f"tcp:127.0.0.1:{link.port}")
        match dies:
            case "emulator":
                other.kill()
            case "vtpmd":
                os.kill(journey.waiting, signal.SIGKILL)
                assert wait_ended(journey.waiting, LIMIT_S)
            case "link":
                link.cut_after(0, answers=False)
        journey.guest.qmp.execute("migrate-continue", state="pre-switchover")
        assert journey.guest.wait_migrated(LIMIT_S) == "failed"
    check_beats(journey.guest)
    assert journey.states() == {"host-a": "running"}
    with journey.there.client() as client, contextlib.suppress(VtpmError):
        client.discard_arrival(journey.name)
    journey.end()


def test_preparing_is_refused_when_nobody_expects_the_vtpm_there(journey: Journey) -> None:
    with journey.here.client() as client:
        with pytest.raises(ConflictError, match="no instance waits there"):
            client.migrate(journey.name, "host-b", guest=With.FOREIGN)
        with pytest.raises(VtpmError, match="cannot migrate it"):
            client.migrate(journey.name, "host-b")
    assert journey.states() == {"host-a": "running"}
    journey.end()
