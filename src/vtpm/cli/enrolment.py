"""Commands on who this host's platform is: platform enroll, show."""

from __future__ import annotations

from pathlib import Path

import click

from vtpm.cli.files import NewFile, read_bytes
from vtpm.cli.output import Output, print_fields, print_json, print_message
from vtpm.cli.session import Session, json_option, pass_session
from vtpm.errors import UsageError
from vtpm.wire.api_platform import EnrolledPlatform

REQUEST_FILE = Path("platform-enrolment.json")
_MAX_FILE_BYTES = 16 * 1024
_PATH = click.Path(path_type=Path)


@click.group()
def platform() -> None:
    """Prove to other hosts what this one is: its platform TPM, certified by an enrolment authority."""


@platform.command()
@click.option("--name", help="Ask to be certified under this name.")
@click.option("--out", type=_PATH, metavar="FILE", help=f"A new file for the request.  [default: {REQUEST_FILE}]")
@click.option("--certificate", type=_PATH, metavar="FILE", help="What `vtpm authority certify` has made of a request.")
@json_option
@pass_session
def enroll(session: Session, name: str | None, out: Path | None, certificate: Path | None) -> None:
    """Enrol this host's platform: write a request with --name, then keep what came of it with --certificate."""
    if (name is None) == (certificate is None) or (certificate is not None and out is not None):
        raise UsageError(
            "enrolment takes --name, to ask an authority, or --certificate, to keep its answer",
            next_step="See vtpm platform enroll --help",
        )
    if certificate is not None:
        try:
            text = read_bytes("sealed certificate", certificate, _MAX_FILE_BYTES).decode()
        except UnicodeDecodeError:
            raise UsageError(f"{certificate} is no sealed certificate: it is not UTF-8") from None
        with session.connect() as manager:
            _print(manager.keep_certificate(text), session.output)
        return
    path = out or REQUEST_FILE
    with session.connect() as manager, NewFile(path) as file:
        made = manager.request_enrolment(name or "")
        file.fill(made.request.encode("ascii"))
    shown = {"name": made.name, "kind": made.kind, "ek": made.ek, "file": str(path)}
    if session.output is Output.JSON:
        print_json(shown)
        return
    print_fields(list(shown.items()))
    print_message("carry the file to the authority, and the ek by another way: vtpm authority certify DIR FILE --ek EK")


@platform.command("show")
@json_option
@pass_session
def show_platform(session: Session) -> None:
    """Show as what this host's platform is enrolled."""
    with session.connect() as manager:
        _print(manager.enrolled(), session.output)


def _print(enrolled: EnrolledPlatform, output: Output) -> None:
    if output is Output.JSON:
        print_json(enrolled)
        return
    print_fields(
        [
            ("name", enrolled.name),
            ("kind", enrolled.kind),
            ("key", enrolled.key),
            ("valid until", enrolled.valid_until),
            ("authority", enrolled.authority),
        ]
    )
