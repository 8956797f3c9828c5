"""Commands on who this host's platform is, and on who others must be: platform, and policy check on files alone."""

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


@platform.command()
@click.option("--out", type=_PATH, required=True, metavar="FILE", help="A new file for it.")
@json_option
@pass_session
def evidence(session: Session, out: Path) -> None:
    """Write what this host shows to others, for `vtpm policy check --evidence`."""
    with session.connect() as manager, NewFile(out) as file:
        file.fill(manager.platform_evidence().encode("ascii"))
    if session.output is Output.JSON:
        print_json({"file": str(out)})


@platform.command("policy")
@json_option
@pass_session
def own_policy(session: Session) -> None:
    """Print a platform policy that this host passes as it is now.

    Look at each line before you give it to the hosts that are to trust this one.
    """
    with session.connect() as manager:
        text = manager.platform_policy()
    if session.output is Output.JSON:
        print_json({"policy": text})
    else:
        click.echo(text, nl=False)


@click.command("check")
@click.argument("file", type=_PATH)
@click.option("--evidence", type=_PATH, metavar="FILE", help="Of a host: what `vtpm platform evidence` wrote there.")
@click.option("--authorities", type=_PATH, metavar="DIR", help="Who is trusted to enrol it; else not looked at.")
@json_option
@pass_session
def check_policy(session: Session, file: Path, evidence: Path | None, authorities: Path | None) -> None:
    """Check the platform policy FILE, and what a host has shown against it; needs no manager."""
    from datetime import UTC, datetime

    from vtpm.migration.certificates import read_certified
    from vtpm.migration.evidence_file import MAX_FILE_BYTES, decode_evidence_file
    from vtpm.migration.pem_folder import read_certificates
    from vtpm.migration.policy import read_policy
    from vtpm.migration.verifier import check_evidence, verify_evidence
    from vtpm.tpm.attest import read_signing_key
    from vtpm.wire.evidence import decode_evidence

    if authorities is not None and evidence is None:
        raise UsageError("whose authority? --authorities needs --evidence")
    policy = read_policy(file)
    pcrs = f"{policy.bank.value}:{','.join(map(str, policy.quoted))}"
    shown = {"policy": str(file), "pcrs": pcrs, "embedded": "allowed" if policy.embedded else "refused"}
    if evidence is not None:
        held = decode_evidence_file(read_bytes("evidence", evidence, MAX_FILE_BYTES))
        found = decode_evidence(held.evidence)
        if authorities is not None:
            trusted = read_certificates(authorities, "enrolment authorities")
            passed = verify_evidence(found, held.nonce, policy, trusted, datetime.now(UTC))
        else:
            passed = read_certified(found.certificate, read_signing_key(found.attestation_key))
            check_evidence(found, passed, held.nonce, policy)
        shown |= {"passes": passed.name, "kind": passed.kind.value}
    if session.output is Output.JSON:
        print_json(shown)
        return
    print_fields(list(shown.items()))
    if evidence is not None and authorities is None:
        print_message("who has enrolled it was not looked at: give --authorities")


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
