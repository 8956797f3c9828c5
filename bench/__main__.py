"""`python -m bench [FIGURE] [--command NAME]`; everything when no figure is named."""

from __future__ import annotations

import argparse

from tests.support.host import Host

from bench import flood, hostile, image, machines, measure, moves, rates, report, saves
from bench.commands import READS
from bench.peers import ours, swtpm
from vtpm.vault.anchor import AnchorMode

SIDE_BY_SIDE = ("roundtrip", "nvwrite", "footprint")
FIGURES = ("floor", *SIDE_BY_SIDE, "saves", "flood", "image", "machines", "hostile", "moves")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Figures side by side with Debian's swtpm.")
    parser.add_argument("figure", nargs="?", choices=FIGURES, help="one figure alone")
    parser.add_argument("--command", choices=sorted(READS), help="one command alone (roundtrip, floor)")
    options = parser.parse_args()
    wanted = (options.figure,) if options.figure else FIGURES
    names = [options.command] if options.command else list(READS)
    facts = report.versions()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if "floor" in wanted:
        floors = measure.floors(names)
        report.print_floors(floors)
        report.save("floor", floors, facts)
    if set(wanted) & set(SIDE_BY_SIDE):
        with Host() as host:
            _side_by_side(host, wanted, names, facts)
    if "saves" in wanted:
        _saves(facts)
    if "flood" in wanted:
        _flood(facts)
    if "image" in wanted:
        figures = image.image()
        report.print_image(figures)
        report.save("image", [figures], facts)
    if "machines" in wanted:
        _machines(facts)
    if "hostile" in wanted:
        rows = hostile.hostile()
        report.print_hostile(rows)
        report.save("hostile", rows, facts)
    if "moves" in wanted:
        found = moves.stalls()
        report.print_stalls(found)
        report.save("moves", found, facts)


def _side_by_side(host: Host, wanted: tuple[str, ...], names: list[str], facts: dict[str, str]) -> None:
    if "roundtrip" in wanted or "nvwrite" in wanted:
        with ours(host, "bench") as a, swtpm() as b:
            if "roundtrip" in wanted:
                rows = [measure.roundtrip(name, a, b) for name in names]
                report.print_comparisons(rows)
                report.save("roundtrip", rows, facts)
            if "nvwrite" in wanted:
                row = measure.nvwrite(a, b)
                report.print_comparisons([row])
                report.save("nvwrite", [row], facts)
    if "footprint" in wanted:
        figures = measure.footprint(host)
        report.print_footprint(figures)
        report.save("footprint", [figures], facts)


def _saves(facts: dict[str, str]) -> None:
    spent = saves.spent()
    report.print_spent(spent)
    report.save("saves", spent, facts)
    rows = []
    for row in rates.rates():
        report.print_rate(row)
        rows.append(row)
    report.save("rates", rows, facts)
    registered = rates.registered()
    report.print_registered(registered)
    report.save("registered", [registered], facts)


def _flood(facts: dict[str, str]) -> None:
    rows = [flood.flood(mode) for mode in AnchorMode]
    for row in rows:
        report.print_flood(row)
    report.save("flood", rows, facts)


def _machines(facts: dict[str, str]) -> None:
    with machines.host_with_image() as (host, folder):
        figures = machines.footprint(host, folder)
        report.print_machines(figures)
        report.save("machines", [figures], facts)
        for name, where, measured in (
            ("machines-roundtrip", "on the socket, us", machines.roundtrips),
            ("machines-guest", "at /dev/tpm0, us", machines.guests),
        ):
            rows = measured(host)
            report.print_comparisons(rows, where)
            report.save(name, rows, facts)


if __name__ == "__main__":
    main()
