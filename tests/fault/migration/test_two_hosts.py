"""Two hosts' services, each with a platform TPM of its own: a vTPM goes between them whatever is killed or cut.

After each round exactly one of the two has the vTPM, with the value that its guest wrote and the endorsement key of its
first day.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fault.test_import_kills import killed_at
from tests.integration.vtpm.test_backups import looked_at, manufactured
from tests.support.cut_link import CutLink
from tests.support.host import Host, wait_ended
from tests.support.two_hosts import Peers, known_to_each_other
from vtpm.errors import VtpmError
from vtpm.wire.api_migrations import Migration, Phase

SETTLE_S = 60.0
"""For both to find out how an attempt ended, once both are there and the link holds."""
DYING_S = 0.5
NAMES = ("host-a", "host-b")
CUT_BYTES = int(os.environ.get("VTPM_CUT_BYTES", "1000"))
"""How far apart the points are where the link is cut, counted over a whole move."""


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    # Services of other users read there what operators put there.
    with tempfile.TemporaryDirectory(prefix="vtpm-two-") as folder, known_to_each_other(Path(folder)) as made:
        yield made


@dataclass
class Round:
    """One vTPM between two hosts.

    Args:
        endorsement_key: that it was made with.
        value: that its guest wrote last.
    """

    peers: Peers
    endorsement_key: bytes
    value: bytes
    kept: int = 0
    moved: int = 0

    def holder(self) -> str:
        """Return which host has it, once nobody waits for the other any more; fails unless it is exactly one."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            found = {name: _migration(host) for name, host in self.peers.hosts.items()}
            if all(one is None or one.phase is Phase.OVER for one in found.values()):
                break
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not decided: {found}\n{self.logs()}")
            # Ends with the next event, or in a second: being over is no event of its own.
            with self.peers.hosts["host-a"].client() as client:
                last = max(event.id for event in client.all_events())
                client.events(last, wait_s=1)
        holders = []
        for name, host in self.peers.hosts.items():
            with host.client() as client:
                holders += [name for vtpm in client.list() if vtpm.state == "stopped"]
        assert len(holders) == 1, f"{holders} have it: {found}\n{self.logs()}"
        return holders[0]

    def check(self, name: str) -> None:
        """See that it is whole there."""
        with self.peers.hosts[name].client() as client:
            assert looked_at(client, "web1") == (self.value, self.endorsement_key)

    def move(self, source: str) -> None:
        """Try to move it away from there."""
        (other,) = set(NAMES) - {source}
        with self.peers.hosts[source].client() as client:
            client.migrate("web1", other)

    def settled(self, source: str) -> None:
        """See where it is after an attempt from there, and that it is whole."""
        holder = self.holder()
        self.check(holder)
        self.kept += holder == source
        self.moved += holder != source

    def logs(self) -> str:
        return "\n".join(f"{name}:\n{host.log()[-3000:]}" for name, host in self.peers.hosts.items())


def _migration(host: Host) -> Migration | None:
    with host.client() as client:
        return next((one for one in client.migrations() if one.name == "web1"), None)


@pytest.fixture(scope="module")
def vtpm(peers: Peers) -> Round:
    with peers.hosts["host-a"].client() as client:
        _, endorsement_key = manufactured(client, "web1")
        value, _ = looked_at(client, "web1")
    return Round(peers, endorsement_key, value)


@pytest.mark.timeout(120)
def test_vtpm_goes_there_and_back_and_only_one_host_has_it(vtpm: Round) -> None:
    assert vtpm.holder() == "host-a"
    for source, target in (NAMES, NAMES[::-1]):
        moved = vtpm.peers.hosts[source].cli("migrate", "web1", "--to", target).stdout
        assert moved.startswith(f"web1 has moved to {target}")
        with vtpm.peers.hosts[source].client() as client:
            assert client.list() == []
        assert vtpm.holder() == target
        vtpm.check(target)
    kinds = [event.kind for event in _events(vtpm.peers.hosts["host-a"])]
    assert [kind for kind in kinds if kind in ("leaving", "moved", "arriving", "arrived")] == [
        *("leaving", "moved", "arriving", "arrived")
    ]


def _events(host: Host) -> list[object]:
    with host.client() as client:
        return list(client.all_events())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize(
    "call",
    [
        "fdatasync",
        pytest.param("pwrite64", marks=pytest.mark.soak),
        pytest.param("sendto", marks=pytest.mark.soak),
    ],
)
def test_exactly_one_host_has_it_whole_when_a_manager_is_killed_at_any_such_call(
    vtpm: Round, side: str, call: str
) -> None:
    vtpm.kept = vtpm.moved = 0
    for number in itertools.count(1):
        source = vtpm.holder()
        (other,) = set(NAMES) - {source}
        victim = vtpm.peers.hosts[source if side == "source" else other]
        pid = victim.pid("manager")
        assert pid is not None
        with killed_at(victim, call, number, "-f"), contextlib.suppress(VtpmError):
            vtpm.move(source)
        # One that was killed dies once nobody traces it any more.
        killed = wait_ended(pid, DYING_S)
        if killed:
            # Reaps it.
            victim.kill("manager")
            victim.start()
        vtpm.settled(source)
        if not killed:
            break
    # The last attempt went through.
    assert vtpm.moved >= 1
    print(f"{side} killed at {number - 1} {call}: {vtpm.kept} stayed, {vtpm.moved} moved")
    assert number > 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("answers", [False, True], ids=["asked", "answered"])
def test_exactly_one_host_has_it_whole_when_the_link_is_cut_at_any_message(vtpm: Round, answers: bool) -> None:
    vtpm.kept = vtpm.moved = 0
    source = vtpm.holder()
    (other,) = set(NAMES) - {source}
    # Each message has a connection of its own: a cut falls in front of, in or behind a handshake or a message.
    with CutLink(vtpm.peers.address(other)) as link:
        vtpm.peers.reach(source, other, link.port)
        for count in itertools.count(1, CUT_BYTES):
            link.cut_after(count, answers=answers)
            with contextlib.suppress(VtpmError):
                vtpm.move(source)
            cut = link.was_cut
            link.restore()
            holder = vtpm.holder()
            vtpm.settled(source)
            if not cut:
                assert holder == other
                break
            if holder == other:
                vtpm.move(other)
                assert vtpm.holder() == source
        vtpm.peers.reach(source, other, None)
    print(f"link cut at {count // CUT_BYTES} points: {vtpm.kept} stayed, {vtpm.moved} moved")
    assert vtpm.kept >= 1
