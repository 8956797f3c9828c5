"""Target for a program that is no Python module: executes it when all is in force. Standard library only.

The program brings its own seccomp filter (AllowList.OWN), which whoever started it must see in force.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

from vtpm.confine.spec import ConfinementSpec
from vtpm.errors import ConfinementError

TARGET = "vtpm.confine.execute:prepare"


def prepare(spec: ConfinementSpec, _keep_fds: tuple[int, ...]) -> Callable[[], int]:
    """Return what executes the program that the spec's target_args name.

    Args:
        spec: its target_args have `path`, absolute, and `arguments`, a list of texts without argv[0].
    Raises:
        ConfinementError: they are of another form, or the program is not there.
    """
    match spec.target_args:
        case {"path": str(path), "arguments": [*arguments]} if all(isinstance(text, str) for text in arguments):
            pass
        case _:
            raise ConfinementError(f"the target arguments of {spec.name} are not path and arguments")
    if not os.access(path, os.X_OK):
        raise ConfinementError(f"{path} cannot be executed where {spec.name} runs")
    title = f"{spec.program} {spec.name}"

    def execute() -> NoReturn:
        try:
            os.execve(path, [title, *arguments], {})  # noqa: S606
        except OSError as error:
            raise ConfinementError(f"{path} could not be executed: {error.strerror}") from error

    return execute
