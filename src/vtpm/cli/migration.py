"""Commands that move a vTPM to another host, or decide about one that is on its way: migrate, adopt."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from uuid import UUID

import click

from vtpm.cli.live_migration import drive_guest
from vtpm.cli.output import Output, print_json, print_line, print_table, progress
from vtpm.cli.session import Session, choice_option, confirm, json_option, name_argument, pass_session, yes_option
from vtpm.errors import NotFoundError, UsageError, VtpmError
from vtpm.tpm.types import TpmVersion
from vtpm.wire.api import DomainName
from vtpm.wire.api_migrations import Guest, Migration, Phase, ReceiveVtpm

if TYPE_CHECKING:
    from vtpm.client.manager_client import ManagerClient

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
@click.option("--live", is_flag=True, help="Let it leave with its guest, which you then migrate; see also --qmp.")
@click.option("--qmp", metavar="ADDRESS", help="QEMU's monitor here, a socket or HOST:PORT: have its guest migrated.")
@click.option("--peer-qmp", metavar="ADDRESS", help="With --qmp: that of the QEMU which waits there for the guest.")
@click.option("--uri", help="With --qmp: the way that the guest takes, such as tcp:HOST:PORT, the same for both QEMUs.")
@click.option("--limit-s", type=click.FloatRange(1), default=900.0, show_default=True, help="For the guest to leave.")
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
    live: bool,
    qmp: str | None,
    peer_qmp: str | None,
    uri: str | None,
    limit_s: float,
    status: bool,
    abort: bool,
    discard: bool,
    yes: bool,
) -> None:
    """Move the vTPM NAME to another host, which has to prove first what it is: stopped, or with its guest.

    At most one of the two hosts can ever run it. Once it has moved it cannot be taken back; it moves back.
    """
    with_guest = live or qmp or peer_qmp or uri
    if [to is not None, status, abort, discard].count(True) != 1 or ((domain or with_guest) and to is None):
        raise UsageError(
            "a migration needs one of --to, --status, --abort and --discard; --domain, --live and --qmp go with --to",
            next_step="See vtpm migrate --help",
        )
    driven = qmp is not None and peer_qmp is not None and uri is not None
    if (live and (qmp or peer_qmp or uri)) or (bool(qmp or peer_qmp or uri) and not driven):
        raise UsageError(
            "to have the guest migrated takes --qmp, --peer-qmp and --uri, and no --live",
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
        elif qmp is not None and peer_qmp is not None and uri is not None:
            done = _drive(manager, session, name, to, (qmp, peer_qmp, uri), limit_s)
        elif live:
            with progress(f"Preparing {name} for {to}: both hosts prove what they are", session.output):
                done = manager.migrate(name, to, DomainName(domain) if domain else None, Guest.FOREIGN)
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


def _drive(
    manager: ManagerClient, session: Session, name: str, to: str, way: tuple[str, str, str], limit_s: float
) -> Migration:
    """Have the guest migrated, and its vTPM with it; take the permission to leave back if that came to nothing."""
    # Takes long to import.
    from vtpm.client.live_migration import LiveMigrationError, Whereabouts

    moved: list[Migration] = []

    def departing() -> None:
        manager.migrate(name, to, guest=Guest.DRIVEN)

    def arrived() -> None:
        moved.append(manager.arrived(name))

    vm_uuid = manager.show(name).vm_uuid
    try:
        drive_guest(
            name,
            *way,
            departing=departing,
            arrived=arrived,
            vm_uuid=vm_uuid,
            limit_s=limit_s,
            output=session.output,
        )
    except LiveMigrationError as error:
        if error.whereabouts is Whereabouts.SOURCE:
            # Used already, or not: it is worth nothing from here on.
            with contextlib.suppress(VtpmError):
                manager.abort_migration(name)
        raise
    return moved[0]


@click.command()
@name_argument
@click.option("--uuid", type=click.UUID, required=True, help="The vTPM's uuid, as vtpm show says it where it is now.")
@choice_option("--tpm-version", TpmVersion, TpmVersion.V2_0, "TPM specification that it follows.")
@choice_option("--domain", DomainName, DomainName.PROCESS, "What it is to live in here.")
@click.option("--vm-uuid", type=click.UUID, help="The VM that it has to be bound to.")
@click.option("--owner", metavar="UID:GID", help="Whose it is to be here; without, yours.")
@json_option
@pass_session
def receive(
    session: Session,
    name: str,
    uuid: UUID,
    tpm_version: str,
    domain: str,
    vm_uuid: UUID | None,
    owner: str | None,
) -> None:
    """Have an instance wait for the vTPM NAME, which is to arrive here with its guest.

    Start the guest's QEMU on its control socket, with -incoming defer and -S; then have the guest migrated.
    """
    wanted = ReceiveVtpm(uuid, TpmVersion(tpm_version), DomainName(domain), vm_uuid, _owner(owner))
    with session.connect() as manager, progress(f"Preparing for {name}", session.output):
        vtpm = manager.receive(name, wanted)
    if session.output is Output.JSON:
        print_json(vtpm)
        return
    print_line(f"{vtpm.name} is expected; for QEMU: -chardev socket,path={vtpm.control_socket}")


def _owner(owner: str | None) -> tuple[int, int] | None:
    if owner is None:
        return None
    uid, _, gid = owner.partition(":")
    if not (uid.isdecimal() and gid.isdecimal()):
        raise UsageError(f"{owner!r} is no owner", next_step="Give it as two numbers: --owner UID:GID")
    return int(uid), int(gid)


def _print(migration: Migration, output: Output) -> None:
    if output is Output.JSON:
        print_json(migration)
        return
    if migration.phase is Phase.READY:
        print_line(f"{migration.name} may leave for {migration.peer} with its guest: migrate it now, with return-path")
        return
    print_line(f"{migration.name} {_WHAT[migration.right].format(peer=migration.peer)}, epoch {migration.epoch}")


def _print_table(migrations: list[Migration]) -> None:
    rows = [
        (one.name, str(one.uuid), one.right, one.peer or "-", str(one.epoch), one.phase, one.trouble or "-")
        for one in migrations
    ]
    print_table(("NAME", "UUID", "RIGHT", "PEER", "EPOCH", "PHASE", "TROUBLE"), rows)
