"""Commands that move a vTPM to another host, or decide about one that is on its way: migrate, adopt."""

from __future__ import annotations

import click

from vtpm.cli.output import Output, print_json, print_line, print_table, progress
from vtpm.cli.session import Session, confirm, json_option, name_argument, pass_session, yes_option
from vtpm.errors import NotFoundError, UsageError
from vtpm.wire.api import DomainName
from vtpm.wire.api_migrations import Migration

_WHAT = {
    "absent": "is not here",
    "held": "is here",
    "frozen": "is frozen here, on its way to {peer}",
    "moved": "has moved to {peer}",
    "inert": "is inert here, on its way from {peer}",
}


@click.command()
@click.argument("name", required=False)
@click.option("--to", metavar="PEER", help="The host that is to take it: its name or URL, as `vtpm peer add` was told.")
@click.option(
    "--domain",
    type=click.Choice([domain.value for domain in DomainName]),
    help="What it is to live in there; without, what it lives in here.",
)
@click.option("--status", is_flag=True, help="Show what has moved or is on its way: of NAME, or all.")
@click.option("--abort", is_flag=True, help="Take back what is frozen on its way; never what has moved.")
@click.option("--discard", is_flag=True, help="Destroy what is inert here: it is its source's, or nobody's.")
@yes_option
@json_option
@pass_session
def migrate(
    session: Session,
    name: str | None,
    to: str | None,
    domain: str | None,
    status: bool,
    abort: bool,
    discard: bool,
    yes: bool,
) -> None:
    """Move the stopped vTPM NAME to another host, which has to prove first what it is.

    At most one of the two hosts can ever run it. Once it has moved it cannot be taken back; it moves back.
    """
    if [to is not None, status, abort, discard].count(True) != 1 or (domain is not None and to is None):
        raise UsageError(
            "a migration needs one of --to, --status, --abort and --discard; --domain goes with --to",
            next_step="See vtpm migrate --help",
        )
    with session.connect() as manager:
        if status:
            found = [one for one in manager.migrations() if name in (None, one.name)]
            if name is not None and not found:
                raise NotFoundError(f"no vTPM {name} has moved, or is on its way")
            if session.output is Output.JSON:
                print_json(found)
            else:
                _print_table(found)
            return
        if name is None:
            raise UsageError("which vTPM? give its name")
        if discard:
            if not yes:
                confirm(f"Destroy {name}, which waits here for its source's word?", refusal=f"{name} stays inert")
            done = manager.discard_arrival(name)
        elif to is None:
            done = manager.abort_migration(name)
        else:
            with progress(
                f"Moving {name} to {to}: both hosts prove what they are, then its state goes", session.output
            ):
                done = manager.migrate(name, to, DomainName(domain) if domain else None)
    _print(done, session.output)


@click.command()
@name_argument
@click.option(
    "--source-is-lost", is_flag=True, required=True, help="Your word that the host that it comes from never comes back."
)
@yes_option
@json_option
@pass_session
def adopt(session: Session, name: str, source_is_lost: bool, yes: bool) -> None:
    """Take the inert vTPM NAME for this host's own, because the host that it comes from is lost for good."""
    if not yes:
        confirm(f"Is the host that {name} comes from lost for good?", refusal=f"{name} stays inert")
    with session.connect() as manager:
        done = manager.adopt(name, source_is_lost=source_is_lost)
    _print(done, session.output)


def _print(migration: Migration, output: Output) -> None:
    if output is Output.JSON:
        print_json(migration)
        return
    print_line(f"{migration.name} {_WHAT[migration.right].format(peer=migration.peer)}, epoch {migration.epoch}")


def _print_table(migrations: list[Migration]) -> None:
    rows = [
        (one.name, str(one.uuid), one.right, one.peer or "-", str(one.epoch), one.phase, one.trouble or "-")
        for one in migrations
    ]
    print_table(("NAME", "UUID", "RIGHT", "PEER", "EPOCH", "PHASE", "TROUBLE"), rows)
