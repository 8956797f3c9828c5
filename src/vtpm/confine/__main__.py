"""The program that every instance enters through: reads its spec, locks itself in, runs the target.

Started by `spawn`, never by hand: main(spec_fd, report_fd, launcher_namespaces). The steps, their order and
their reasons are in `steps`. A step that fails ends the process with ConfinementError's exit status; nothing
of the target runs half confined. What is in force, or which step failed, is written to the report pipe, which
is then closed.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from vtpm.confine.report import encode_failure, encode_report
from vtpm.confine.spec import MAX_SPEC_BYTES, ConfinementSpec, decode_spec
from vtpm.confine.steps import Context, lock_in
from vtpm.errors import ConfinementError, VtpmError


def main(spec_fd: int, report_fd: int, launcher_namespaces: str) -> int:
    """Lock this process in and run its target.

    Args:
        spec_fd: pipe that gives the spec until its end.
        report_fd: pipe that takes the report.
        launcher_namespaces: "kind:inode,…" of the launcher, to check that none of them is shared.
    Returns:
        The target's exit status, or the error's.
    """
    try:
        context = Context(_read_spec(spec_fd), _namespaces_of(launcher_namespaces), own_fds=(report_fd,))
        report = lock_in(context)
    except VtpmError as error:
        # A step's own, or one of the target, which is loaded and made ready on the way.
        _tell(report_fd, encode_failure(error))
        sys.stderr.write(f"vtpmd: {error}\n")
        return error.exit_status
    _tell(report_fd, encode_report(report))
    if context.run is None:
        return ConfinementError.exit_status
    try:
        return context.run()
    except VtpmError as error:
        sys.stderr.write(f"vtpmd: {error}\n")
        return error.exit_status


def end(status: int) -> NoReturn:
    """End this process at once, its threads included.

    Not sys.exit: the interpreter would end the target's threads with pthread_exit, for which glibc loads libgcc_s.
    There is no file system to load it from, and glibc's complaint about that is a system call that the filter
    kills for.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _read_spec(spec_fd: int) -> ConfinementSpec:
    with open(spec_fd, "rb") as pipe:
        encoded = pipe.read(MAX_SPEC_BYTES + 1)
    if not encoded:
        raise ConfinementError("the launcher ended before it gave the confinement spec")
    return decode_spec(encoded)


def _namespaces_of(text: str) -> dict[str, int]:
    try:
        return {kind: int(inode) for kind, inode in (entry.split(":") for entry in text.split(","))}
    except ValueError as error:
        raise ConfinementError("the launcher's namespaces are not of the form kind:inode") from error


def _tell(report_fd: int, message: bytes) -> None:
    os.write(report_fd, message)
    os.close(report_fd)


if __name__ == "__main__":
    end(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
