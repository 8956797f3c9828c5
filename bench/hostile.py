"""Siblings' waits beside a vTPM's virtual machine in an attacker's hands, with its floods and without. For bench.

Calm and flood alternate, for a machine that others use too is calmer at one time than at another. In calm the machine
runs and does nothing. Floods that end the attacker are no row: they are over at once.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fault.writer import data_socket
from tests.support.host import Host
from tests.support.hostile.machine import Attacker, build_hostile
from tests.support.hostile.siblings import Siblings, Waits

from bench.figures import percentile
from bench.flood import P99_LIMIT_US, RATIO_LIMIT
from vtpm.client.manager_client import ManagerClient
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.wire.api import DomainName

TURNS, TURN_S = 3, 3.0
STATE_BYTES = 2 * 1024 * 1024
FLOODS = {
    "manager link, words": "flood words",
    "manager link, borders": "flood empty",
    "manager link, no end": "flood endless",
    "manager link, loads": "flood loads",
    "manager link, saves": "flood saves",
    "guest port, power": "flood-guest power",
}
"""Orders of tests.support.hostile.vm_hostile; loads and saves are of 2 MiB."""


@dataclass(frozen=True)
class Hostile:
    """What siblings' commands took beside one flood, in microseconds: reads of PCR and NV, and NV writes."""

    flood: str
    reads: int
    calm_read_p99_us: float
    flood_read_p99_us: float
    writes: int
    calm_write_p99_us: float
    flood_write_p99_us: float

    @property
    def read_ratio(self) -> float:
        """How many times the reads' p99 is with the flood what it is without."""
        return self.flood_read_p99_us / self.calm_read_p99_us

    @property
    def write_ratio(self) -> float:
        """Likewise of the writes."""
        return self.flood_write_p99_us / self.calm_write_p99_us

    @property
    def met(self) -> bool:
        """Whether both limits are kept, by reads and writes."""
        ratio = max(self.read_ratio, self.write_ratio)
        return ratio <= RATIO_LIMIT and max(self.flood_read_p99_us, self.flood_write_p99_us) <= P99_LIMIT_US


def hostile() -> list[Hostile]:
    """Measure on a host of its own, with a machine that is emulated.

    Raises:
        TpmGone: a sibling's command failed.
    """
    with tempfile.TemporaryDirectory(prefix="vtpm-bench-") as work:
        images = build_hostile(Path(work))
        settings = f'vm_accelerator = "tcg"\nvm_images = "{images}"\n'
        with Host(settings=settings) as host, host.client() as client, Siblings(host) as siblings:
            _use(siblings, TURN_S / 2)
            # One attacker for each: what a link owes for one flood would be paid in the next.
            rows = [_attacked(client, siblings, f"hostile{number}", name) for number, name in enumerate(FLOODS)]
    return rows


def _attacked(client: ManagerClient, siblings: Siblings, vtpm: str, flood: str) -> Hostile:
    client.create(vtpm, TpmVersion.V2_0, DomainName.QEMU)
    with Attacker(data_socket(client.start(vtpm).tcti)) as attacker:
        attacker.order("load")
        for kind in (StateKind.PERMANENT, StateKind.VOLATILE):
            attacker.order("save", int(kind), "c0", STATE_BYTES)
        row = _beside(siblings, attacker, flood)
    client.stop(vtpm, force=True)
    return row


def _beside(siblings: Siblings, attacker: Attacker, name: str) -> Hostile:
    calm, flooded = Waits(), Waits()
    for _ in range(TURNS):
        _add(calm, _use(siblings, TURN_S))
        attacker.order(*FLOODS[name].split())
        _add(flooded, _use(siblings, TURN_S))
        attacker.order("rest")
    return Hostile(
        flood=name,
        reads=len(flooded.reads),
        calm_read_p99_us=percentile(calm.reads, 99) * 1e6,
        flood_read_p99_us=percentile(flooded.reads, 99) * 1e6,
        writes=len(flooded.writes),
        calm_write_p99_us=percentile(calm.writes, 99) * 1e6,
        flood_write_p99_us=percentile(flooded.writes, 99) * 1e6,
    )


def _use(siblings: Siblings, duration_s: float) -> Waits:
    with siblings.used() as waits:
        time.sleep(duration_s)
    return waits


def _add(to: Waits, more: Waits) -> None:
    to.reads += more.reads
    to.writes += more.writes
