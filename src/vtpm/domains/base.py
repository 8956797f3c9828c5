"""What the launcher asks of any kind of domain, and gets from it. For the launcher and the kinds beside this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vtpm.confine.report import Report
from vtpm.wire.instance_spec import InstanceArgs, InstanceFd

ORDERLY = "exit status 0"
"""How a domain ends that was told to, and wants no successor."""


@dataclass(frozen=True)
class DomainPlan:
    """What a domain is to run.

    Args:
        name: the vTPM's, for `ps` and logs.
        uid: user id of the instance, its own; ignored where the launcher is an ordinary user.
        args: what the vtpmd is told.
        fds: the launcher's descriptors for the instance's links, by the instance's number; they stay the launcher's.
        log_fd: pipe that takes what the instance writes to stderr.
    """

    name: str
    uid: int
    args: InstanceArgs
    fds: Mapping[InstanceFd, int]
    log_fd: int


class RunningDomain(Protocol):
    """One started domain. Its owner must await `ended` in the end."""

    @property
    def pid(self) -> int:
        """Process id on the host: the vtpmd's, or its virtual machine's."""
        ...

    async def confined(self) -> Report:
        """Wait until the domain is locked in, and return what is in force; call once.

        Raises:
            ConfinementError: a step failed, or the domain ended before it was confined. It may still be there.
        """
        ...

    def kill(self) -> None:
        """End the domain at once; no error when it has ended already."""
        ...

    async def ended(self) -> str:
        """Wait until nothing of the domain is left, take leave of it, and say how it ended; call once."""
        ...


class Domain(Protocol):
    """A kind of domain."""

    @property
    def measurement(self) -> str:
        """SHA-256, in hex, over all that a domain of this kind runs, as it was when it was prepared last."""
        ...

    @property
    def engine_version(self) -> int:
        """Version of the engine that is part of it, MAJOR<<16 | MINOR<<8 | MICRO; 0: not known."""
        ...

    @property
    def label(self) -> str:
        """What a domain of this kind runs, in a few words for people."""
        ...

    @property
    def ready_within_s(self) -> int:
        """How long the vtpmd of a domain may take until it answers its manager."""
        ...

    async def prepare(self) -> None:
        """Make ready, and measure, what starts of this kind have in common; called before each.

        Raises:
            VtpmError: domains of this kind cannot be started on this host; the message says why.
        """
        ...

    def start(self, plan: DomainPlan) -> RunningDomain:
        """Start a domain.

        Raises:
            VtpmError: it could not be started; nothing is left behind.
        """
        ...
