"""The measurements. Each takes its TPMs and returns figures; printing is report.py's."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.host import Host

from bench import floor
from bench.client import Exchange, succeed, time_block
from bench.commands import NV_DEFINE, READS, nv_write
from bench.figures import Comparison, compare
from bench.peers import Peer, ours, swtpm

BLOCKS = 20
ROUND_TRIPS = 500
NV_BLOCKS = 10
NV_ROUND_TRIPS = 20
STARTS = 5


@dataclass(frozen=True)
class Floor:
    """Medians of what bounds a round trip from below, microseconds."""

    command: str
    libtpms_us: float
    echo_us: float


@dataclass(frozen=True)
class Footprint:
    """Medians over some starts: seconds to the first answer, and KiB of PSS while all of them run."""

    starts: int
    ours_start_s: float
    swtpm_start_s: float
    ours_pss_kib: float
    swtpm_pss_kib: float


def roundtrip(name: str, a: Peer, b: Peer) -> Comparison:
    """Time one reading command on both TPMs in alternating blocks, after a block of warm-up each."""
    data = READS[name]
    return alternate(name, lambda: data, a.client.exchange, b.client.exchange, BLOCKS, ROUND_TRIPS)


def nvwrite(a: Peer, b: Peer) -> Comparison:
    """Time NV_Write of 32 bytes: ours is on the disk, encrypted, when it answers; swtpm's is in a written file."""
    for peer in (a, b):
        succeed(peer.client.exchange, NV_DEFINE)
    counter = itertools.count(1)
    return alternate(
        "NV_Write",
        lambda: nv_write(next(counter)),
        a.client.exchange,
        b.client.exchange,
        NV_BLOCKS,
        NV_ROUND_TRIPS,
    )


def floors(names: list[str]) -> list[Floor]:
    """Time libtpms without a socket, and a socket without libtpms."""
    with floor.in_process() as direct, floor.echo() as echo:
        return [_floor(name, direct, echo) for name in names]


def footprint(host: Host) -> Footprint:
    """Start some TPMs of each make in turn, keep them running, then look at their memory."""
    mine, theirs = [], []
    with contextlib.ExitStack() as stack:
        for number in range(STARTS):
            mine.append(stack.enter_context(ours(host, f"start{number}")))
            theirs.append(stack.enter_context(swtpm()))
        return Footprint(
            starts=STARTS,
            ours_start_s=statistics.median(peer.start_s for peer in mine),
            swtpm_start_s=statistics.median(peer.start_s for peer in theirs),
            ours_pss_kib=statistics.median(peer.pss_kib() for peer in mine),
            swtpm_pss_kib=statistics.median(peer.pss_kib() for peer in theirs),
        )


def alternate(
    name: str, command: Callable[[], bytes], a: Exchange, b: Exchange, blocks: int, round_trips: int
) -> Comparison:
    """Time a command on two TPMs in alternating blocks, after a block of warm-up each."""
    for exchange in (a, b):
        time_block(exchange, command, round_trips)
    times_a, times_b = [], []
    for _ in range(blocks):
        times_a.append(time_block(a, command, round_trips))
        times_b.append(time_block(b, command, round_trips))
    return compare(name, times_a, times_b)


def _floor(name: str, direct: Exchange, echo: Exchange) -> Floor:
    data = READS[name]
    result = alternate(name, lambda: data, direct, echo, BLOCKS // 2, ROUND_TRIPS)
    return Floor(name, result.ours_median_us, result.peer_median_us)
