"""Commands on the root key: the PCR values that it opens under, and its recovery."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vtpm.cli.files import NewFile
from vtpm.cli.output import Output, print_fields, print_json, print_line, print_message, print_table
from vtpm.cli.prediction import EVENT_LOG, Changes, pcr_indexes, predicted
from vtpm.cli.session import Session, confirm, json_option, pass_session, yes_option
from vtpm.errors import UsageError
from vtpm.wire.api import MeasuredServices, Policy

if TYPE_CHECKING:
    from vtpm.client.manager_client import ManagerClient

_MAX_KEY_CHARS = 1024
Command = TypeVar("Command", bound=Callable[..., Any])


def changes_options(command: Command) -> Command:
    """Add the options that say what will be another: the fields of Changes."""
    for option in reversed(
        (
            click.option("--pcr", "pcrs", multiple=True, metavar="N=HEX", help="What a PCR will hold."),
            click.option("--extend", "extends", multiple=True, metavar="N=HEX", help="A digest that will be extended."),
            click.option("--services", is_flag=True, help="The services will be those installed with this command."),
            click.option(
                "--efi", multiple=True, metavar="OLD=NEW", help="Files: what the firmware starts now, and will start."
            ),
            click.option(
                "--event-log", type=click.Path(path_type=Path), default=EVENT_LOG, help="Of this boot, for --efi."
            ),
        )
    ):
        command = option(command)
    return command


@click.group()
def policy() -> None:
    """Say under which PCR values the root key opens, and which images may run vTPMs.

    Allow the next boot, or the next image, before an update; drop or retire the last one after.
    """


@policy.command("show")
@json_option
@pass_session
def show_policy(session: Session) -> None:
    """Show the allowed sets of PCR values, and what the PCRs hold now."""
    with session.connect() as manager:
        _print_policy(manager.policy(), session.output)


@policy.command()
@changes_options
@json_option
@pass_session
def predict(session: Session, /, **changes: Any) -> None:
    """Print the PCR values that `allow` would allow with the same options; changes nothing."""
    asked = Changes(**changes)
    with session.connect() as manager:
        state, measured = manager.policy(), _measured(manager, asked)
    values = predicted(state, asked, measured)
    indexes = pcr_indexes(state.selection)
    if session.output is Output.JSON:
        print_json(dict(zip((str(index) for index in indexes), values, strict=True)))
        return
    print_table(
        ("PCR", "NOW", "PREDICTED"),
        [
            (str(index), now, "the same" if now == then else then)
            for index, now, then in zip(indexes, state.current, values, strict=True)
        ],
    )


@policy.command()
@click.argument("label")
@changes_options
@json_option
@pass_session
def allow(session: Session, /, label: str, **changes: Any) -> None:
    """Allow a further set of PCR values, under the name LABEL; without options, those of now."""
    asked = Changes(**changes)
    with session.connect() as manager:
        values = predicted(manager.policy(), asked, _measured(manager, asked))
        _print_policy(manager.policy_allow(label, values), session.output)


@policy.command()
@click.argument("label")
@yes_option
@json_option
@pass_session
def drop(session: Session, label: str, yes: bool) -> None:
    """Allow the set of PCR values named LABEL no more."""
    with session.connect() as manager:
        state = manager.policy()
        if not yes and any(found.matches and found.label == label for found in state.sets):
            alone = sum(found.matches for found in state.sets) == 1
            if alone:
                confirm(
                    f"{label} is the set that this boot has: without it the next start of the keeper needs the recovery"
                    " key. Drop it?",
                    refusal=f"{label} stays allowed",
                )
        _print_policy(manager.policy_drop(label), session.output)


@click.command("recovery-key")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it to a new file, instead of printing it."
)
@yes_option
@json_option
@pass_session
def recovery_key(session: Session, output: Path | None, yes: bool) -> None:
    """Make the recovery key, and show it once: write it down and keep it offline.

    It opens the vault when the platform TPM is lost or its PCRs have changed. It is kept nowhere. Once it is written,
    one that was made before counts no more; it opens copies of the state directory that were made before, for ever.
    """
    _hold_a_key()
    with session.connect() as manager, contextlib.ExitStack() as stack:
        platform = manager.status().platform
        if platform is not None and platform.recovery and not yes:
            confirm(
                f"The recovery key {platform.recovery} will open nothing but earlier copies of the state directory."
                " Make a new one?",
                refusal="the recovery key stays as it is",
            )
        # Opened before the key is made: one that cannot be kept is of no use.
        file = None if output is None else stack.enter_context(NewFile(output))
        made = manager.new_recovery_key()
        if file is not None:
            file.fill(f"{made.recovery_key}\n".encode("ascii"))
        elif session.output is Output.JSON:
            print_json(made)
        else:
            for row in made.recovery_key.splitlines():
                print_line(row)
        # Only once it has left: if it does not, an earlier one goes on to count.
        sys.stdout.flush()
        manager.confirm_recovery_key(made.public_key)
    if output is not None:
        print_message(f"written to {output}: move it to a place that is not this machine")
    elif session.output is Output.JSON:
        return
    else:
        print_message("write it down and keep it off this machine; it is shown this once")
    print_message(f"its fingerprint, as vtpm status shows it: {made.fingerprint}")
    print_message(f"its public half, which seals backups and may be known: {made.public_key}")


@click.command()
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, allow_dash=True),
    default="-",
    show_default="standard input",
    metavar="FILE",
    help="Holds the recovery key.",
)
@yes_option
@json_option
@pass_session
def recover(session: Session, key_file: Path, yes: bool) -> None:
    """Open the vault by the recovery key, and seal the root key to the platform TPM as it is now.

    For a platform TPM that was lost or cleared, or PCRs that changed for a reason that you know.
    """
    _hold_a_key()
    if not yes and key_file == Path("-"):
        raise UsageError("the recovery key comes from standard input, so nobody can be asked", next_step="Say --yes")
    if not yes:
        confirm(
            "Whatever this machine booted will be trusted with every vTPM, and the store as it is taken for the newest."
            " Recover?",
            refusal="nothing is recovered",
        )
    text = _read_key(key_file)
    with session.connect() as manager:
        status = manager.recover(text)
    if session.output is Output.JSON:
        print_json(status)
    else:
        print_line("recovered: the root key is sealed to the platform TPM as it is now")


def _hold_a_key() -> None:
    """No core dump of this process, and no debugger, from here on."""
    from vtpm.confine.service import forbid_core_dumps

    forbid_core_dumps()


def _measured(manager: ManagerClient, changes: Changes) -> MeasuredServices | None:
    """Return what is known of the services of now, where the prediction needs it."""
    return manager.status().measured if changes.services else None


def _print_policy(state: Policy, output: Output) -> None:
    if output is Output.JSON:
        print_json(state)
        return
    print_fields([("PCRs", state.selection)])
    click.echo()
    print_table(
        ("ALLOWED", "MATCHES NOW", "PCR VALUES"),
        [
            (
                found.label,
                "yes" if found.matches else "no",
                " ".join(
                    f"{index}={value[:16]}"
                    for index, value in zip(pcr_indexes(state.selection), found.values, strict=True)
                ),
            )
            for found in state.sets
        ],
    )


def _read_key(path: Path) -> str:
    try:
        if path == Path("-"):
            return sys.stdin.read(_MAX_KEY_CHARS)
        with path.open(encoding="ascii") as file:
            return file.read(_MAX_KEY_CHARS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recovery key cannot be read from {path}: {error}") from error
