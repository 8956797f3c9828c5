"""Commands on the hosts that vTPMs may move to and come from: peer add, list, remove, certificate."""

from __future__ import annotations

from pathlib import Path

import click

from vtpm.cli.files import read_text
from vtpm.cli.output import Output, print_json, print_line, print_table
from vtpm.cli.session import Session, json_option, pass_session


@click.group()
def peer() -> None:
    """Name the hosts that vTPMs may move to and come from."""


@peer.command()
@click.argument("name")
@click.option("--url", required=True, metavar="URL", help="https://HOST:PORT, its setting migration_address.")
@click.option(
    "--certificate",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `vtpm peer certificate` prints there.",
)
@json_option
@pass_session
def add(session: Session, name: str, url: str, certificate: Path) -> None:
    """Name the host NAME, by the name under which its platform is enrolled; or change what is known of it."""
    text = read_text("certificate", certificate)
    with session.connect() as manager:
        added = manager.add_peer(name, url, text)
    if session.output is Output.JSON:
        print_json(added)
    else:
        print_line(f"{added.name} at {added.url} is a peer; its certificate is {added.fingerprint}")


@peer.command("list")
@json_option
@pass_session
def list_peers(session: Session) -> None:
    """List the peers."""
    with session.connect() as manager:
        peers = manager.peers()
    if session.output is Output.JSON:
        print_json(peers)
    else:
        print_table(("NAME", "URL", "CERTIFICATE"), [(one.name, one.url, one.fingerprint) for one in peers])


@peer.command()
@click.argument("name")
@json_option
@pass_session
def remove(session: Session, name: str) -> None:
    """Name the host NAME no more: it is not talked to, and not let in."""
    with session.connect() as manager:
        manager.remove_peer(name)
    if session.output is Output.JSON:
        print_json({"removed": name})
    else:
        print_line(f"{name} is no peer any more")


@peer.command()
@json_option
@pass_session
def certificate(session: Session) -> None:
    """Print this host's own certificate, to be carried to its peers."""
    with session.connect() as manager:
        own = manager.host_certificate()
    if session.output is Output.JSON:
        print_json({"certificate": own})
    else:
        click.echo(own, nl=False)
