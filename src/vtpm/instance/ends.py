"""What an instance is connected to: the near ends of its links, whatever is at the far ones.

A process domain's are descriptors that the launcher made (`from_descriptors`). Something else can stand behind them,
where the same links come another way. For the instance.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vtpm.errors import ProtocolError
from vtpm.guest_link.hold import Hold
from vtpm.guest_link.journal import Journal, JournaledPower
from vtpm.guest_link.listener import Listener, SocketListener
from vtpm.guest_link.refusals import Client
from vtpm.wire.hold import ParkedKind
from vtpm.wire.instance_spec import InstanceFd


class HoldEnd(Protocol):
    """Who keeps the guest link's descriptors for a successor; see `guest_link.hold`."""

    def fileno(self) -> int:
        """Descriptor that becomes readable when nobody keeps them any more."""
        ...

    def park(self, kind: ParkedKind, fd: int) -> None:
        """Have a descriptor kept, in place of an earlier one of its kind. Raises OSError."""
        ...

    def drop(self, kind: ParkedKind) -> None:
        """Have the kept descriptor of this kind closed. Raises OSError."""
        ...


@dataclass(frozen=True)
class Ends:
    """See the module.

    Args:
        hold: see HoldEnd.
        manager_fd: the manager link, to read and write; see ManagerChannel.
        control_listener, data_listener: of the guest link.
        control_journal, data_journal: of its channels; perhaps a predecessor's.
        control, data: connections that a predecessor had parked.
        tell_power: called, in either thread, with each power that a successor must know, once it is in the journal.
    """

    hold: HoldEnd
    manager_fd: int
    control_listener: Listener
    data_listener: Listener
    control_journal: Journal
    data_journal: Journal
    control: Client | None = None
    data: socket.socket | None = None
    tell_power: Callable[[JournaledPower], None] = lambda _: None

    @classmethod
    def from_descriptors(cls, fds: set[int]) -> Ends:
        """Make them of a process domain's descriptors.

        Args:
            fds: by number, as the launcher gave them; see InstanceFd.
        Raises:
            ProtocolError: they are not a whole set.
        """
        needed = set(InstanceFd) - {InstanceFd.CONTROL, InstanceFd.DATA}
        if not needed <= fds:
            raise ProtocolError(f"an instance was started without the descriptors {sorted(needed - fds)}")
        has_control, has_data = InstanceFd.CONTROL in fds, InstanceFd.DATA in fds
        return cls(
            Hold(socket.socket(fileno=InstanceFd.HOLD)),
            InstanceFd.MANAGER_LINK,
            SocketListener(socket.socket(fileno=InstanceFd.CONTROL_LISTENER)),
            SocketListener(socket.socket(fileno=InstanceFd.DATA_LISTENER)),
            Journal(InstanceFd.CONTROL_JOURNAL),
            Journal(InstanceFd.DATA_JOURNAL),
            control=Client.of(socket.socket(fileno=InstanceFd.CONTROL)) if has_control else None,
            data=socket.socket(fileno=InstanceFd.DATA) if has_data else None,
        )
