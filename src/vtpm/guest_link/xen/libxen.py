"""The hypervisor's services as Xen's libraries give them. Nothing is loaded before `open_hypervisor` is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vtpm.guest_link.xen.event_channels import LibEventChannels
from vtpm.guest_link.xen.grants import LibGrants
from vtpm.guest_link.xen.hypervisor import Hypervisor
from vtpm.guest_link.xen.xenstore import LibXenstore


@contextlib.contextmanager
def open_hypervisor() -> Iterator[Hypervisor]:
    """Open xenstore, event channels and grants, for one thread of one process; all are closed at the end.

    Raises:
        UnavailableError: a library is missing, or this does not run in a Xen domain.
    """
    with LibXenstore() as xenstore, LibEventChannels() as channels, LibGrants() as grants:
        yield Hypervisor(xenstore, channels, grants)
