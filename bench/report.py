"""Prints figures and writes them as JSON beside each other: build/bench/NAME.json."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.figures import Comparison
from bench.flood import P99_LIMIT_US, Flood
from bench.flood import RATIO_LIMIT as FLOOD_RATIO_LIMIT
from bench.hostile import Hostile
from bench.image import INITRAMFS_LIMIT_BYTES, START_RATIO_LIMIT, ImageFigures
from bench.machines import MachineFigures
from bench.measure import Floor, Footprint
from bench.moves import Stall
from bench.rates import RATIO_LIMIT, Rate, Registered
from bench.saves import LIMIT_US, Spent

FOLDER = Path("build/bench")


def versions() -> dict[str, str]:
    """Return the date and what was measured with."""
    found = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found |= {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()}
    found["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    for package in ("libtpms0", "swtpm"):
        done = subprocess.run(
            ["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True, timeout=10
        )
        found[package] = done.stdout or "not a Debian package"
    return found


def print_comparisons(rows: Sequence[Comparison], where: str = "round trip, us") -> None:
    """Print a table of round trips."""
    print(f"{where:<22}{'ours':>9}{'p99':>9}{'swtpm':>9}{'p99':>9}{'ratio':>7}  per-block      round trips")
    for row in rows:
        print(
            f"{row.command:<22}{row.ours_median_us:>9.1f}{row.ours_p99_us:>9.1f}{row.peer_median_us:>9.1f}"
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


def print_spent(rows: Sequence[Spent]) -> None:
    """Print what one save spends."""
    print(
        f"{'one save, us':<13}{'all':>8}{'p99':>8}{'flushes':>9}{'anchor':>8}{'ours':>7}{'libtpms':>9}  ours, per block"
    )
    for row in rows:
        print(
            f"{row.mode:<13}{row.total_us:>8.0f}{row.total_p99_us:>8.0f}{row.flushes_us:>9.0f}{row.anchor_us:>8.0f}"
            f"{row.ours_us:>7.0f}{row.libtpms_us:>9.1f}  {row.ours_least_us:.0f} - {row.ours_most_us:.0f};"
            f" at most {LIMIT_US:.0f} at the median: {_verdict(row.met)}"
        )
    print(f"one exchange with the keeper alone: {max(row.exchange_us for row in rows):.0f} us")


def print_rate(row: Rate) -> None:
    """Print one line of the rates."""
    print(
        f"{row.platform:<9}{row.mode:<12}{row.writers:>3} vTPMs{row.saves_per_s:>7.0f} saves/s, median"
        f"{row.median_us:>8.0f} us, p99{row.p99_us:>8.0f} us,{row.anchor_writes_per_1000:>8.1f} anchor writes per 1000"
    )


def print_registered(row: Registered) -> None:
    """Print what many registered vTPMs cost one save."""
    print(
        f"a save beside {row.few} and {row.many} registered vTPMs: {row.few_us:.0f} and {row.many_us:.0f} us, ratio"
        f" {row.ratio:.2f} ({row.ratio_least:.2f} - {row.ratio_most:.2f}), at most {RATIO_LIMIT}: {_verdict(row.met)}"
    )


def print_flood(row: Flood) -> None:
    """Print what a flood does to siblings."""
    print(
        f"{row.mode}: {row.siblings} siblings beside {row.floods} saves and {row.creations} creations of a flood,"
        f" {row.saves} saves: median {row.calm_median_us:.0f} -> {row.flood_median_us:.0f} us,"
        f" p99 {row.calm_p99_us:.0f} -> {row.flood_p99_us:.0f} us, ratio {row.ratio:.2f}"
        f" (at most {FLOOD_RATIO_LIMIT:g}, and {P99_LIMIT_US:.0f} us): {_verdict(row.met)}"
    )


def print_image(row: ImageFigures) -> None:
    """Print size, start and memory of a vTPM's virtual machine."""
    print(
        f"image: kernel {row.kernel_bytes / 1e6:.1f} MB, initramfs {row.initramfs_bytes / 1e6:.1f} MB"
        f" (at most {INITRAMFS_LIMIT_BYTES / 1e6:.0f}), unpacked {row.unpacked_bytes / 1e6:.1f} MB in {row.files} files"
    )
    print(
        f"median of {row.starts} starts, s: bare {row.bare_s:.2f} (processor {row.bare_cpu_s:.2f}),"
        f" to the first word {row.hello_s:.2f} ({row.hello_cpu_s:.2f}), ratio {row.ratio:.2f} ({row.cpu_ratio:.2f}),"
        f" at most {START_RATIO_LIMIT:g}"
    )
    print(
        f"starts with {row.least_memory_mb} MB of memory, {row.available_kib / 1024:.0f} MB of it left:"
        f" {_verdict(row.met)}"
    )


def print_machines(row: MachineFigures) -> None:
    """Print start, memory and sizes of vTPMs in processes and in machines."""
    print(f"median of {row.starts}: process / virtual machine (emulated) / swtpm")
    print(
        f"start to first answer, ms  {row.process_start_s * 1e3:.0f} / {row.machine_start_s * 1e3:.0f} /"
        f" {row.swtpm_start_s * 1e3:.0f}; bare boot of the machine's kernel {row.bare_s * 1e3:.0f},"
        f" ratio {row.ratio:.2f} (at most {START_RATIO_LIMIT:g}): {_verdict(row.met)}"
    )
    print(
        f"PSS, KiB                   {row.process_pss_kib:.0f} / QEMU {row.machine_pss_kib:.0f} and relay"
        f" {row.relay_pss_kib:.0f} / {row.swtpm_pss_kib:.0f}"
    )
    print(f"kernel {row.kernel_bytes / 1e6:.1f} MB, initramfs {row.initramfs_bytes / 1e6:.1f} MB")


def print_hostile(rows: Sequence[Hostile]) -> None:
    """Print what a machine in an attacker's hands does to siblings."""
    print(
        f"{'siblings, p99 in us':<24}{'reads, calm':>12}{'flood':>8}{'ratio':>7}"
        f"{'writes, calm':>14}{'flood':>8}{'ratio':>7}"
    )
    for row in rows:
        print(
            f"{row.flood:<24}{row.calm_read_p99_us:>12.0f}{row.flood_read_p99_us:>8.0f}{row.read_ratio:>7.2f}"
            f"{row.calm_write_p99_us:>14.0f}{row.flood_write_p99_us:>8.0f}{row.write_ratio:>7.2f}"
            f"  {row.reads}, {row.writes}; {_verdict(row.met)}"
        )


def print_stalls(rows: Sequence[Stall]) -> None:
    """Print for how long guests stand still that move with their TPMs."""
    print(f"{'a guest that moves, ms':<24}{'stands still':>13}{'most':>8}{'downtime':>10}{'ratio':>7}")
    for row in rows:
        print(
            f"{row.kind:<24}{row.median_ms:>13.0f}{row.most_ms:>8.0f}{row.downtime_ms:>10.0f}{row.ratio:>7.2f}"
            f"  {row.moves} moves"
        )


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


Figure = (
    Comparison | Floor | Footprint | Spent | Rate | Registered | Flood | ImageFigures | MachineFigures | Hostile | Stall
)


def save(name: str, figures: Sequence[Figure], facts: dict[str, str]) -> None:
    """Write figures as JSON."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    document = {"measured": facts, "figures": [dataclasses.asdict(row) for row in figures]}
    (FOLDER / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
