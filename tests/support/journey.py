"""A guest and its vTPM between two hosts: where they are, and how they go on. For tests and bench."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from uuid import UUID

from tests.support.guest import Guest, GuestConfig, Image, TpmModel
from tests.support.guest.channel import Deadline
from tests.support.host import Host
from tests.support.two_hosts import Peers
from vtpm.wire.api_migrations import Guest as With
from vtpm.wire.api_migrations import Phase, ReceiveVtpm

LIMIT_S = 60.0
OTHER = {"host-a": "host-b", "host-b": "host-a"}


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

    def expect(self, *, paused: bool = True) -> Guest:
        """Have the other host expect both; returns the emulator that waits for the guest.

        Args:
            paused: whether it leaves the guest paused that arrives.
        """
        self.legs += 1
        with self.there.client() as client:
            waiting = client.receive(self.name, ReceiveVtpm(self.uuid))
        assert waiting.pid is not None
        self.waiting, control = waiting.pid, Path(waiting.control_socket)
        arguments = ("-incoming", "defer", *(("-S",) if paused else ()), *self._monitor())
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
        return self.guest.migrate(other, f"unix:{self.folder / f'leg{self.legs}.migration'}", LIMIT_S)

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
