"""Runs a function in a process of its own: one process has one TPM. Test code only."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("fork")


class ChildDied(Exception):
    """The process ended without an answer; says with which exit code."""


def in_process(function: Callable[..., Any], *arguments: Any, timeout_s: float = 30.0) -> Any:
    """Return what `function` returns in a child process; raise what it raises."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    child = _CONTEXT.Process(target=_run, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            raise TimeoutError(f"{function.__name__} did not end within {timeout_s} s")
        value, error, trace = receiver.recv()
    except EOFError:
        child.join(timeout_s)
        raise ChildDied(f"{function.__name__} died with exit code {child.exitcode}") from None
    finally:
        receiver.close()
        child.kill()
        child.join()
    if error is not None:
        error.add_note(trace)
        raise error
    return value


def _run(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*arguments), None, ""))
    except BaseException as error:
        sender.send((None, error, traceback.format_exc()))
