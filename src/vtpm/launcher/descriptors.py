"""How many instances the launcher's limit of open files allows. For the launcher's entry module."""

from __future__ import annotations

import resource

from vtpm.wire.launcher import MAX_INSTANCES

PER_INSTANCE = 10
"""Two listening sockets, two journals, two parked descriptors, hold, manager link, log, pidfd."""
RESERVED = 256
"""For the launcher itself, its clients and what is under way to them, and for what a start needs for a moment."""


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it may be, and return it. Instances set their own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def instances_for(limit: int) -> int:
    """Return how many instances a limit of open files allows, at most MAX_INSTANCES."""
    if limit == resource.RLIM_INFINITY:
        return MAX_INSTANCES
    return max(0, min(MAX_INSTANCES, (limit - RESERVED) // PER_INSTANCE))
