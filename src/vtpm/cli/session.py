"""What the commands share: the options that all take, the connection to the manager, names completed from it.

httpx takes longer to import than all the rest, so the client is imported when first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vtpm.cli.output import Output
from vtpm.errors import UsageError, VtpmError

if TYPE_CHECKING:
    from vtpm.client.manager_client import ManagerClient

COMPLETION_TIMEOUT_S = 2.0

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Session:
    """One use of the command line."""

    socket_path: Path | None = None
    output: Output = Output.HUMAN

    def connect(self, timeout_s: float | None = None) -> ManagerClient:
        """Return a client of the manager that was asked for; a context manager."""
        from vtpm.client.manager_client import DEFAULT_TIMEOUT_S, ManagerClient

        return ManagerClient(self.socket_path, timeout_s or DEFAULT_TIMEOUT_S)


pass_session = click.make_pass_decorator(Session, ensure=True)


def _set_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).output = Output.JSON


def _set_socket(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    context.ensure_object(Session).socket_path = value


def _complete_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    session = context.find_object(Session) or Session()
    try:
        with session.connect(COMPLETION_TIMEOUT_S) as manager:
            return [vtpm.name for vtpm in manager.list() if vtpm.name.startswith(incomplete)]
    except VtpmError:
        # Whoever presses Tab has asked for names, not for errors.
        return []


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_set_json, help="Print the result, or the error, as JSON."
)
socket_option = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_set_socket,
    help="The manager's socket.  [default: $VTPM_SOCKET, else that of the caller's own manager]",
)
name_argument = click.argument("name", shell_complete=_complete_names)
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def choice_option(name: str, words: type[StrEnum], default: StrEnum, text: str) -> Callable[[Command], Command]:
    """Return an option that takes one of an enumeration's words, with a default that its help shows."""
    choice = click.Choice([word.value for word in words])
    return click.option(name, type=choice, default=default.value, show_default=True, help=text)


def confirm(question: str, *, refusal: str) -> None:
    """Ask on the terminal; return if the answer is yes.

    Raises:
        UsageError: there is no terminal to ask on, or the answer is no. Its message is `refusal`.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"{refusal}: there is no terminal to ask on", next_step="Say --yes, if it is meant")
    if not click.confirm(question, err=True):
        raise UsageError(f"{refusal}: not confirmed")
