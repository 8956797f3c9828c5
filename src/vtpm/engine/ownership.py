"""Which engine has this process' libtpms, and what a fork does to it. May be imported by `engine` alone."""

from __future__ import annotations

import os
from typing import Protocol

from vtpm.errors import EngineError


class Owner(Protocol):
    """Who can own libtpms."""

    def on_fork(self) -> None:
        """Called in a child process that inherits the owner."""


class Ownership:
    """The one place in the process where libtpms is claimed; made once, below."""

    def __init__(self) -> None:
        self._owner: Owner | None = None
        self._watches_forks = False

    def claim(self, owner: Owner) -> None:
        """Take libtpms, or raise EngineError when another has it."""
        if self._owner is not None:
            raise EngineError(
                "this process has a TPM already; libtpms runs one per process",
                next_step="Close the other engine, or start another process",
            )
        self._owner = owner
        if not self._watches_forks:
            os.register_at_fork(after_in_child=self._after_fork)
            self._watches_forks = True

    def release(self) -> None:
        """Give libtpms back."""
        self._owner = None

    def _after_fork(self) -> None:
        if self._owner is not None:
            self._owner.on_fork()


LIBTPMS = Ownership()
