"""Prints figures and writes them as JSON beside each other: build/bench/NAME.json."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.figures import Comparison
from bench.measure import Floor, Footprint

FOLDER = Path("build/bench")


def versions() -> dict[str, str]:
    """Return the date and what was measured with."""
    found = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found |= {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()}
    for package in ("libtpms0", "swtpm"):
        done = subprocess.run(
            ["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True, timeout=10
        )
        found[package] = done.stdout or "not a Debian package"
    return found


def print_comparisons(rows: Sequence[Comparison]) -> None:
    """Print a table of round trips."""
    print(f"{'round trip, us':<14}{'ours':>9}{'p99':>9}{'swtpm':>9}{'p99':>9}{'ratio':>7}  per-block      round trips")
    for row in rows:
        print(
            f"{row.command:<14}{row.ours_median_us:>9.1f}{row.ours_p99_us:>9.1f}{row.peer_median_us:>9.1f}"
            f"{row.peer_p99_us:>9.1f}{row.ratio:>7.2f}  {row.ratio_least:.2f} - {row.ratio_most:.2f}"
            f"  {row.round_trips:>9} each"
        )


def print_floors(rows: Sequence[Floor]) -> None:
    """Print what bounds a round trip from below."""
    print("floor, us: libtpms in this process / a Python echo over the same kind of socket")
    for row in rows:
        print(f"{row.command:<14}{row.libtpms_us:>9.1f} / {row.echo_us:.1f}")


def print_footprint(row: Footprint) -> None:
    """Print start-up time and memory."""
    print(f"median of {row.starts}: ours / swtpm")
    print(f"start to first answer, ms  {row.ours_start_s * 1e3:.0f} / {row.swtpm_start_s * 1e3:.0f}")
    print(f"PSS of a process, KiB      {row.ours_pss_kib:.0f} / {row.swtpm_pss_kib:.0f}")


def save(name: str, figures: Sequence[Comparison | Floor | Footprint], facts: dict[str, str]) -> None:
    """Write figures as JSON."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    document = {"measured": facts, "figures": [dataclasses.asdict(row) for row in figures]}
    (FOLDER / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
