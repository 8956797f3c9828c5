"""Commands on the host's services: status, events, shutdown, completion."""

from __future__ import annotations

import json
import sys

import click

from vtpm.cli.output import (
    Output,
    print_fields,
    print_json,
    print_line,
    print_message,
    print_table,
    print_warnings,
    progress,
)
from vtpm.cli.session import Session, confirm, json_option, pass_session, yes_option
from vtpm.wire.api import AuditEvent, LifeState, MeasuredServices, Status

_OFF = frozenset({LifeState.STOPPED, LifeState.FROZEN, LifeState.INERT, LifeState.FAILED})


@click.command()
@json_option
@pass_session
def status(session: Session) -> None:
    """Show the platform, its TPM, what protects the root key, and warnings."""
    with session.connect() as manager:
        now = manager.status()
    if session.output is Output.JSON:
        print_json(now)
        return
    platform = now.platform
    fields = [
        ("version", f"{now.version} (API {now.api_version})"),
        ("vTPMs", f"{now.vtpms}, {now.running} running"),
        ("state", now.state_dir),
        ("sockets", now.run_dir),
    ]
    if platform is not None:
        fields += [
            ("platform TPM", f"{platform.kind}, {'answers' if platform.reachable else 'does not answer'}"),
            ("manufacturer", platform.manufacturer or "-"),
            ("TCTI", platform.tcti or "-"),
            ("PCRs", platform.pcrs or "-"),
            ("root key", f"{platform.protection}, {'LOCKED' if platform.locked else 'open'}"),
            ("recovery key", platform.recovery or "none"),
        ]
    if now.measured is not None:
        fields.append(("services", _measured_line(now.measured)))
    if now.anchor is not None:
        anchor = now.anchor
        every = f", every {anchor.interval_s} s" if anchor.interval_s else ""
        fields += [
            ("anchor", f"{anchor.mode}{every}: {anchor.writes} writes for {anchor.commits} commits"),
            ("rollback window", anchor.window),
        ]
    print_fields(fields)
    if now.services:
        click.echo()
        print_table(
            ("SERVICE", "ANSWERS", "PID", "DETAIL"),
            [(s.name, "yes" if s.reachable else "NO", str(s.pid or "-"), s.detail) for s in now.services],
        )
    if now.confinement:
        click.echo()
        print_table(("CONFINEMENT", "STATUS", "WHY"), [(c.step, c.status, c.why) for c in now.confinement])
    if warnings := status_warnings(now):
        click.echo()
        print_warnings(warnings)


def _measured_line(measured: MeasuredServices) -> str:
    if not measured.pcr:
        return measured.note
    return f"{measured.measurement}, measured into PCR {measured.pcr} of {measured.bank}"


def status_warnings(now: Status) -> list[str]:
    """Return what a reader must not overlook: the manager's warnings, and what follows from the rest."""
    warnings = []
    if now.platform is None:
        warnings.append("The keeper does not answer: no vTPM can start, and what protects the root key is not known.")
    elif now.platform.protection == "unprotected" and not any("UNPROTECTED" in text for text in now.warnings):
        warnings.append(
            "The root key is UNPROTECTED: no hardware TPM seals it. Whoever reads the state directory reads every "
            "vTPM's state, and can put an old one back."
        )
    return warnings + [warning for warning in now.warnings if warning not in warnings]


@click.command()
@click.option("--follow", is_flag=True, help="Go on with new events as they come, until interrupted.")
@json_option
@pass_session
def events(session: Session, follow: bool) -> None:
    """Print the audit log, oldest first; with --json one object a line."""
    with session.connect() as manager:
        for event in manager.follow_events() if follow else manager.all_events():
            if session.output is Output.JSON:
                print_json(event, indent=None)
            else:
                print_line(_event_line(event))


def _event_line(event: AuditEvent) -> str:
    actor = "-" if event.actor_uid is None else f"uid={event.actor_uid}"
    detail = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in event.detail.items())
    return "  ".join([event.time, actor, event.kind, event.vtpm or "-", *detail])


@click.command()
@yes_option
@json_option
@pass_session
def shutdown(session: Session, yes: bool) -> None:
    """Stop every vTPM in order, then all host services. Asks, on a terminal, if vTPMs are running."""
    with session.connect() as manager:
        if not yes and sys.stdin.isatty():
            running = [vtpm.name for vtpm in manager.list() if vtpm.state not in _OFF]
            if running:
                print_message(f"Running: {', '.join(running)}")
                confirm("Stop them and all host services?", refusal="nothing is shut down")
        with progress("Stopping every vTPM, then the host services", session.output):
            done = manager.shutdown()
    if session.output is Output.JSON:
        print_json(done)
    else:
        print_line(f"stopped: {', '.join(done.stopped) or 'no vTPM was running'}; the host services end")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL; for bash: source <(vtpm completion bash)."""
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None, "click knows the shells of the choice above"
    script = complete(context.find_root().command, {}, "vtpm", "_VTPM_COMPLETE").source()
    if context.ensure_object(Session).output is Output.JSON:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
