"""Commands on one vTPM or all: create, start, stop, delete, list, show."""

from __future__ import annotations

import pwd
from uuid import UUID

import click

from vtpm.cli.output import Output, print_fields, print_json, print_line, print_table, progress
from vtpm.cli.session import Session, choice_option, confirm, json_option, name_argument, pass_session, yes_option
from vtpm.tpm.types import Make, Startup, TpmVersion
from vtpm.wire.api import Client, DomainName, LifeState, Lockout, Owner, Vtpm


@click.command()
@click.argument("name")
@choice_option("--tpm-version", TpmVersion, TpmVersion.V2_0, "TPM specification that it follows, for ever.")
@choice_option(
    "--domain",
    DomainName,
    DomainName.PROCESS,
    "What it runs in: a confined process, a QEMU VM or a Xen domain of its own.",
)
@choice_option("--make", Make, Make.LIBTPMS, "Whose TPM it is, for ever: swtpm, unchanged, in a QEMU VM alone.")
@click.option("--vm-uuid", type=click.UUID, help="The VM that it belongs to; no other may use it.")
@json_option
@pass_session
def create(session: Session, name: str, tpm_version: str, domain: str, make: str, vm_uuid: UUID | None) -> None:
    """Create the vTPM NAME, stopped."""
    with session.connect() as manager, progress(f"Creating {name}", session.output):
        vtpm = manager.create(name, TpmVersion(tpm_version), DomainName(domain), vm_uuid, Make(make))
    _print_vtpm(vtpm, session.output, f"{vtpm.name} created: TPM {vtpm.tpm_version}, uuid {vtpm.uuid}")


@click.command()
@name_argument
@click.option(
    "--startup",
    type=click.Choice([Startup.CLEAR.value, Startup.STATE.value]),
    help="Send TPM2_Startup, too; without, that is left to the guest's firmware, as hardware leaves it.",
)
@json_option
@pass_session
def start(session: Session, name: str, startup: str | None) -> None:
    """Start the vTPM NAME: powered on, and waiting for a client."""
    with session.connect() as manager, progress(f"Starting {name}", session.output):
        vtpm = manager.start(name, Startup(startup) if startup else Startup.NONE)
    _print_vtpm(
        vtpm,
        session.output,
        f"{vtpm.name} is {vtpm.state}; for tpm2-tools: -T {vtpm.tcti}",
        f"for QEMU: -chardev socket,path={vtpm.control_socket}",
    )


@click.command()
@name_argument
@click.option("--force", is_flag=True, help="Also when a virtual machine uses it, which then has no TPM any more.")
@json_option
@pass_session
def stop(session: Session, name: str, force: bool) -> None:
    """Stop the vTPM NAME in order; its state is kept."""
    with session.connect() as manager, progress(f"Stopping {name}", session.output):
        vtpm = manager.stop(name, force=force)
    _print_vtpm(vtpm, session.output, f"{vtpm.name} is {vtpm.state}")


@click.command()
@name_argument
@yes_option
@json_option
@pass_session
def delete(session: Session, name: str, yes: bool) -> None:
    """Delete the vTPM NAME for ever, with its key: what the guest sealed to it is lost."""
    with session.connect() as manager:
        if not yes:
            vtpm = manager.show(name)
            confirm(f"Delete {vtpm.name} for ever, and all that its guest sealed to it?", refusal=f"{name} is kept")
        manager.delete(name)
    if session.output is Output.JSON:
        print_json({"deleted": name})
    else:
        print_line(f"{name} deleted")


@click.command("list")
@json_option
@pass_session
def list_vtpms(session: Session) -> None:
    """List the vTPMs that you may see."""
    with session.connect() as manager:
        vtpms = manager.list()
    if session.output is Output.JSON:
        print_json(vtpms)
        return
    rows = [
        (v.name, v.state, v.tpm_version, v.domain, _owner(v.owner), _client(v.client), str(v.vm_uuid or "-"))
        for v in vtpms
    ]
    print_table(("NAME", "STATE", "TPM", "DOMAIN", "OWNER", "CLIENT", "VM"), rows)


@click.command()
@name_argument
@json_option
@pass_session
def show(session: Session, name: str) -> None:
    """Show all about the vTPM NAME."""
    with session.connect() as manager:
        vtpm = manager.show(name)
    if session.output is Output.JSON:
        print_json(vtpm)
        return
    state = f"{vtpm.state}: {vtpm.reason}" if vtpm.reason else vtpm.state
    print_fields(
        [
            ("name", vtpm.name),
            ("uuid", str(vtpm.uuid)),
            ("owner", f"{_owner(vtpm.owner)} (uid {vtpm.owner.uid}, gid {vtpm.owner.gid})"),
            ("VM", str(vtpm.vm_uuid or "-")),
            ("TPM version", vtpm.tpm_version),
            ("domain", vtpm.domain),
            ("make", vtpm.make),
            ("state", state),
            ("epoch", str(vtpm.epoch)),
            ("version", str(vtpm.version)),
            ("measurement", vtpm.measurement or "-"),
            ("control socket", vtpm.control_socket or "-"),
            ("TCTI", vtpm.tcti or "-"),
            ("pid", str(vtpm.pid or "-")),
            ("client", _client(vtpm.client)),
            ("created", vtpm.created_at or "-"),
            *_lockout(vtpm.lockout, vtpm.tcti),
        ]
    )


def _print_vtpm(vtpm: Vtpm, output: Output, *lines: str) -> None:
    if output is Output.JSON:
        print_json(vtpm)
        return
    for line in lines:
        print_line(line)
    if vtpm.state is LifeState.FAILED and vtpm.reason:
        print_line(f"because: {vtpm.reason}")


def _lockout(lockout: Lockout | None, tcti: str) -> list[tuple[str, str]]:
    """What is wrong with a locked TPM, and what to do."""
    if lockout is None:
        return []
    return [
        (
            "LOCKED OUT",
            f"since {lockout.since}: {lockout.failed_tries} of {lockout.max_tries} failed authorisations; "
            "what is protected against dictionary attacks is refused",
        ),
        (
            "next",
            f"Wait: after {lockout.interval_s} s of power one failure is forgiven. Or, with the TPM's lockout "
            f"authorisation, in the guest or without one: tpm2_dictionarylockout -c -T {tcti}",
        ),
    ]


def _owner(owner: Owner) -> str:
    try:
        return pwd.getpwuid(owner.uid).pw_name
    except KeyError:
        return str(owner.uid)


def _client(client: Client | None) -> str:
    if client is None:
        return "-"
    return f"{client.kind}, pid {client.pid}" if client.pid else client.kind
