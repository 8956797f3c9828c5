"""Statistics of interleaved runs. Pure; for bench."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile, 0 < percent <= 100, of one value or more."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


@dataclass(frozen=True)
class Comparison:
    """One command on two TPMs; times in microseconds, ratios ours to theirs, spread over pairs of blocks."""

    command: str
    round_trips: int
    ours_median_us: float
    ours_p99_us: float
    peer_median_us: float
    peer_p99_us: float
    ratio: float
    ratio_least: float
    ratio_most: float


def compare(command: str, ours: Sequence[Sequence[float]], peer: Sequence[Sequence[float]]) -> Comparison:
    """Compare blocks of times, in seconds; block n of one was taken next to block n of the other.

    Raises:
        ValueError: the numbers of blocks differ, or there are none.
    """
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(ours, peer, strict=True)]
    if not ratios:
        raise ValueError("there are no blocks to compare")
    all_ours = [time_s for block in ours for time_s in block]
    all_peer = [time_s for block in peer for time_s in block]
    ours_s, peer_s = statistics.median(all_ours), statistics.median(all_peer)
    return Comparison(
        command=command,
        round_trips=len(all_ours),
        ours_median_us=ours_s * 1e6,
        ours_p99_us=percentile(all_ours, 99) * 1e6,
        peer_median_us=peer_s * 1e6,
        peer_p99_us=percentile(all_peer, 99) * 1e6,
        ratio=ours_s / peer_s,
        ratio_least=min(ratios),
        ratio_most=max(ratios),
    )
