"""vtpm: entry of the command line. Puts the commands together and turns errors into messages and exit statuses.

Imports the client, wire and errors; whatever is slow to import is left to the command that needs it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import click

from vtpm.cli.authority import authority
from vtpm.cli.backups import export, import_vtpm
from vtpm.cli.enrolment import check_policy, platform
from vtpm.cli.host import completion, events, shutdown, status
from vtpm.cli.images import image
from vtpm.cli.launch_policy import allow_image, launches, list_images, retire_image
from vtpm.cli.migration import adopt, migrate, receive
from vtpm.cli.output import Output, print_error
from vtpm.cli.peers import peer
from vtpm.cli.platform import policy, recover, recovery_key
from vtpm.cli.run import run
from vtpm.cli.session import json_option, socket_option
from vtpm.cli.vtpms import create, delete, list_vtpms, show, start, stop
from vtpm.errors import UsageError, VtpmError

_COMMANDS = (
    *(
        status,
        create,
        start,
        stop,
        delete,
        list_vtpms,
        show,
        events,
        run,
        export,
        import_vtpm,
        migrate,
        receive,
        adopt,
        peer,
    ),
    *(platform, authority),
    *(policy, recovery_key, recover, image, shutdown, completion),
)
for _command in (list_images, allow_image, retire_image, launches, check_policy):
    policy.add_command(_command)


class _InOrder(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        # As they are needed, not by the alphabet.
        return list(self.commands)


@click.group(cls=_InOrder, commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@socket_option
@json_option
@click.version_option(package_name="vtpm", message="%(prog)s %(version)s")
def cli() -> None:
    """Look after this host's virtual TPMs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see vtpm.errors, and 128 + n for signal n.

    When the reader of its output has gone, click ends the process quietly, with status 1.

    Args:
        argv: the words after the program's name; the process's own when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    output = _output_asked_for(words)
    try:
        return cli.main(words, prog_name="vtpm", standalone_mode=False) or 0
    except VtpmError as error:
        print_error(error, output)
        return error.exit_status
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return UsageError.exit_status
    except click.ClickException as error:
        usage = _usage_error(error)
        print_error(usage, output)
        return usage.exit_status
    except (click.Abort, KeyboardInterrupt) as error:
        # click makes an Abort of an interrupt and of the end of input alike.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            return 128 + signal.SIGINT
        print_error(UsageError("not confirmed, the input has ended"), output)
        return UsageError.exit_status


def _output_asked_for(words: Sequence[str]) -> Output:
    # Errors need to know before the words are parsed, and when they cannot be.
    own = words[: words.index("--")] if "--" in words else words
    return Output.JSON if "--json" in own else Output.HUMAN


def _usage_error(error: click.ClickException) -> UsageError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "vtpm"
    return UsageError(error.format_message().rstrip("."), next_step=f"See {command} --help")


if __name__ == "__main__":
    sys.exit(main())
