"""Whether this instance may run its TPM's commands, while the vTPM passes from one host to another under its guest.

Pure but for waiting. The TPM thread moves it on; that the manager has activated the vTPM, or that the guest has given
up a command, is said by the main thread. Nothing here outlives the process: a successor comes up powered off or failed,
and its Load is answered as the manager's own record says.
"""

from __future__ import annotations

import enum
import threading


class Stage(enum.Enum):
    """Where the vTPM is, as far as this instance knows."""

    HERE = "runs here"
    LEAVING = "is on its way to another host, or may be"
    """Asked for and not refused. Nothing runs until the manager has taken that back."""
    INERT = "has arrived and is not activated"
    GONE = "has moved to another host"
    """For good."""


class Passage:
    """See the module."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stage = Stage.HERE
        self._arrival = 0
        self._waits = False
        self._given_up = False

    @property
    def stage(self) -> Stage:
        """Where the vTPM is. From any thread."""
        return self._stage

    @property
    def runs(self) -> bool:
        """Whether a TPM command may run and state may be saved."""
        return self._stage is Stage.HERE

    @property
    def arrival(self) -> int:
        """The number by which it is activated."""
        return self._arrival

    @property
    def waits(self) -> bool:
        """Whether a command waits for the activation now."""
        return self._waits

    # -- TPM thread -------------------------------------------------------------------------------------------------
    def enter(self, stage: Stage) -> None:
        """Move on."""
        with self._changed:
            self._stage = stage

    def expect(self, arrival: int) -> None:
        """The vTPM is about to arrive under this number; from here on nothing runs."""
        with self._changed:
            self._arrival, self._waits = arrival, False
            self._stage = Stage.INERT

    def begin_wait(self) -> bool:
        """A command has come. Returns True when it is the first to wait for this arrival's activation."""
        with self._changed:
            first, self._waits = not self._waits, True
            return first

    def wait_activated(self, timeout_s: float) -> bool:
        """Wait until the vTPM is activated, or somebody gives up; return whether it runs."""
        with self._changed:
            self._given_up = False
            self._changed.wait_for(lambda: self._stage is not Stage.INERT or self._given_up, timeout_s)
            return self._stage is Stage.HERE

    # -- main thread ------------------------------------------------------------------------------------------------
    def activate(self, arrival: int) -> None:
        """The manager says that the vTPM which arrived under this number may run. Of another one, nothing follows."""
        with self._changed:
            if self._stage is Stage.INERT and arrival == self._arrival:
                self._stage = Stage.HERE
                self._waits = False
                self._changed.notify_all()

    def give_up(self) -> None:
        """The guest gives the command up that waits, if one does."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
