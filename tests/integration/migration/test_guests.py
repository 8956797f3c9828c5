"""A running guest goes from host to host with its vTPM, and back: real hosts, unmodified QEMUs, all emulated."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from uuid import UUID

import pytest

from tests.support.cut_link import CutLink
from tests.support.guest import Guest, GuestConfig, Image, TpmModel
from tests.support.guest.beat import beat_image, begin_beat, check_beats
from tests.support.guest.channel import Deadline
from tests.support.host import Host, wait_ended
from tests.support.two_hosts import Peers, free_port, known_to_each_other
from vtpm.errors import ConflictError, VtpmError
from vtpm.wire.api_migrations import Guest as With
from vtpm.wire.api_migrations import Phase, ReceiveVtpm

pytestmark = pytest.mark.timeout(300)
LIMIT_S = 60.0
MOVES = int(os.environ.get("VTPM_MOVES", "20"))
OTHER = {"host-a": "host-b", "host-b": "host-a"}


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with tempfile.TemporaryDirectory(prefix="vtpm-two-") as folder, known_to_each_other(Path(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def image() -> Image:
    return beat_image()


class Journey:
    """One guest and its vTPM, and where they are.

    Args:
        guest: that runs.
        waiting: process id of the instance that waits for its vTPM.
    """

    def __init__(self, peers: Peers, image: Image, folder: Path, stack: contextlib.ExitStack) -> None:
        self.peers = peers
        self.image = image
        self.folder = folder
        self.stack = stack
        self.legs = 0
        self.waiting = 0
        self.at = "host-a"
        self.name = "web1"
        with self.here.client() as client:
            self.uuid = UUID(str(client.create(self.name).uuid))
            control = Path(client.start(self.name).control_socket)
        config = GuestConfig(image, control, TpmModel.CRB, extra_arguments=self._monitor())
        self.guest = stack.enter_context(Guest(config, folder / "first"))

    @property
    def here(self) -> Host:
        return self.peers.hosts[self.at]

    @property
    def there(self) -> Host:
        return self.peers.hosts[OTHER[self.at]]

    def expect(self) -> Guest:
        """Have the other host expect both; returns the emulator that waits for the guest."""
        self.legs += 1
        with self.there.client() as client:
            waiting = client.receive(self.name, ReceiveVtpm(self.uuid))
        assert waiting.pid is not None
        self.waiting, control = waiting.pid, Path(waiting.control_socket)
        arguments = ("-incoming", "defer", "-S", *self._monitor())
        config = GuestConfig(self.image, control, TpmModel.CRB, extra_arguments=arguments)
        return self.stack.enter_context(Guest(config, self.folder / f"leg{self.legs}", incoming=True))

    def monitor(self, leg: int) -> Path:
        """Return the socket of a QEMU's monitor that is an operator's."""
        return self.folder / f"leg{leg}.qmp"

    def _monitor(self) -> tuple[str, ...]:
        return "-qmp", f"unix:{self.monitor(self.legs)},server=on,wait=off"

    def prepare(self, guest: With) -> None:
        """Have both hosts prove what they are."""
        with self.here.client() as client:
            assert client.migrate(self.name, OTHER[self.at], guest=guest).phase is Phase.READY

    def migrate(self, other: Guest) -> str:
        """Have the guest migrated, as somebody else's tool does, and return how that ended for its source."""
        uri = f"unix:{self.folder / f'leg{self.legs}.migration'}"
        for one in (self.guest, other):
            one.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
        other.qmp.execute("migrate-incoming", uri=uri)
        self.guest.qmp.execute("migrate", uri=uri)
        return self.guest.wait_migrated(LIMIT_S)

    def begin_and_pause(self, other: Guest, listens: str, uri: str) -> None:
        """Have the guest migrated up to where its last state would go, which is its TPM's too."""
        wanted = [{"capability": name, "state": True} for name in ("return-path", "pause-before-switchover")]
        self.guest.qmp.execute("migrate-set-capabilities", capabilities=wanted)
        other.qmp.execute("migrate-set-capabilities", capabilities=wanted[:1])
        other.qmp.execute("migrate-incoming", uri=listens)
        self.guest.qmp.execute("migrate", uri=uri)
        deadline = Deadline(LIMIT_S)
        while (status := self.guest.qmp.execute("query-migrate").get("status")) != "pre-switchover":
            assert deadline.remaining_s() and status not in ("failed", "completed"), status
            time.sleep(0.05)

    def has_moved(self, other: Guest) -> None:
        """The guest is the other's from here on."""
        other.adopt(self.guest)
        self.guest, self.at = other, OTHER[self.at]

    def leave(self, other: Guest) -> None:
        """As has_moved, and end the emulator that the guest has left."""
        left = self.guest
        self.has_moved(other)
        self.guest.check("tpm2_pcrread sha256:16", timeout_s=LIMIT_S)
        left.kill()

    def states(self) -> dict[str, str]:
        """Return in which state the vTPM is, where it is at all."""
        found = dict[str, str]()
        for name, host in self.peers.hosts.items():
            with host.client() as client:
                found.update((name, vtpm.state) for vtpm in client.list() if vtpm.name == self.name)
        return found

    def end(self) -> None:
        """End guest and vTPM."""
        self.guest.power_off()
        with self.here.client() as client:
            client.stop(self.name)
            client.delete(self.name)


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
