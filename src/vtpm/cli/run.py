"""The command run: starts a vTPM if need be, gives it to a QEMU, waits for that QEMU, and puts things back.

The vTPM is left as it was found: one that was started here is stopped in order when the command has ended, one that was
running goes on. QEMU keeps the terminal; signals sent to this process go on to it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from vtpm.cli.output import print_message, progress
from vtpm.cli.qemu_command import build_command, check_command, detaches
from vtpm.cli.session import Session, json_option, name_argument, pass_session
from vtpm.errors import ConflictError, ProtocolError, UsageError
from vtpm.wire.api import LifeState, Vtpm

if TYPE_CHECKING:
    from vtpm.client.manager_client import ManagerClient

_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_HANG_UP_S = 2.0
_LOOK_EVERY_S = 0.05
_SENT_BY_KERNEL = 0x80  # SI_KERNEL of asm-generic/siginfo.h, which the signal module does not name


def _complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(incomplete, type="file")]


@click.command(options_metavar="[OPTIONS]", short_help="Run a QEMU command with the vTPM NAME as its TPM.")
@name_argument
@click.argument("command", nargs=-1, required=True, metavar="-- qemu-system-x86_64 ...", shell_complete=_complete_files)
@json_option
@click.pass_context
@pass_session
def run(session: Session, context: click.Context, name: str, command: tuple[str, ...]) -> None:
    """Run a QEMU command with the vTPM NAME as its TPM, and exit with its status.

    Starts the vTPM if it is not running, and then stops it again when the command has ended. Adds -chardev, -tpmdev,
    -device (tpm-crb; tpm-tis for TPM 1.2) and the VM's -uuid. To choose the device yourself, write for instance
    -device tpm-tis,tpmdev=vtpm0. With --json errors are JSON; stdout is the command's own.
    """
    with session.connect() as manager:
        vtpm = manager.show(name)
        check_command(command, vtpm)
        if vtpm.state is LifeState.RUNNING:
            _refuse_if_in_use(vtpm)
            exit_status = run_in_foreground(_with_vtpm(command, vtpm))
        else:
            with progress(f"Starting {name}", session.output):
                vtpm = manager.start(name)
            detached = False
            try:
                exit_status = run_in_foreground(_with_vtpm(command, vtpm))
                detached = exit_status == 0 and detaches(command)
            finally:
                if detached or not _stop_unless_used(manager, name, session):
                    print_message(f"{name} is in use and goes on; when done: vtpm stop {name}")
    context.exit(exit_status)


def run_in_foreground(command: Sequence[str]) -> int:
    """Run a command on this process's terminal and return its exit status, 128 + n if signal n ended it.

    SIGTERM, SIGINT, SIGHUP and SIGQUIT that somebody sends to this process go on to the command; those that the
    terminal makes reach both by themselves. To be called where there is no other thread: it would take the signals.

    Raises:
        UsageError: the program cannot be run.
    """
    sys.stdout.flush()
    # Blocked from before the command starts, so that no signal is lost between its start and the wait for it.
    awaited = {*_FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    try:
        pid = _spawn(command, before)
        while True:
            caught = signal.sigwaitinfo(awaited)
            if caught.si_signo != signal.SIGCHLD:
                if caught.si_code != _SENT_BY_KERNEL:
                    os.kill(pid, caught.si_signo)
                continue
            ended, wait_status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    exit_status = os.waitstatus_to_exitcode(wait_status)
    return exit_status if exit_status >= 0 else 128 - exit_status


def _spawn(command: Sequence[str], mask: Iterable[int]) -> int:
    try:
        # Python ignores two signals; an ordinary program does not.
        return os.posix_spawnp(
            command[0], list(command), os.environ, setsigmask=mask, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
    except OSError as error:
        raise UsageError(
            f"{command[0]} cannot be run: {error.strerror}", next_step="See that it is installed and on PATH"
        ) from error


def _with_vtpm(command: Sequence[str], vtpm: Vtpm) -> list[str]:
    if not vtpm.control_socket:
        raise ProtocolError(f"{vtpm.name} is {vtpm.state}, but the manager names no control socket for it")
    return build_command(command, vtpm)


def _refuse_if_in_use(vtpm: Vtpm) -> None:
    if vtpm.client is not None:
        who = f"pid {vtpm.client.pid}" if vtpm.client.pid else "another client"
        raise ConflictError(
            f"{vtpm.name} is in use by {who}", next_step="End that client first: a TPM has one user at a time"
        )


def _stop_unless_used(manager: ManagerClient, name: str, session: Session) -> bool:
    """Stop the vTPM in order; return False, and leave it running, when another client uses it."""
    deadline_s = time.monotonic() + _HANG_UP_S
    while manager.show(name).client is not None:
        # The command has ended, and the manager is about to hear that its connection has gone; or it is another's.
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_EVERY_S)
    try:
        with progress(f"Stopping {name}", session.output):
            # Not forced: a virtual machine that came just now keeps its TPM.
            manager.stop(name)
    except ConflictError:
        if manager.show(name).client is None:
            raise
        return False
    return True
