"""What a relay is connected to: the launcher's descriptors, by number. For the relay."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from vtpm.errors import ProtocolError
from vtpm.guest_link.hold import Hold
from vtpm.guest_link.journal import Journal
from vtpm.guest_link.listener import SocketListener
from vtpm.guest_link.refusals import Client
from vtpm.wire.instance_spec import RelayFd


@dataclass(frozen=True)
class RelayEnds:
    """See the module.

    Args:
        hold: to the launcher.
        port_fd: to the virtual machine; see RelayFd.GUEST_PORT.
        control_listener, data_listener: of the guest link.
        control_journal, data_journal: of its channels; perhaps a predecessor's.
        control, data: connections that a predecessor had parked.
    """

    hold: Hold
    port_fd: int
    control_listener: SocketListener
    data_listener: SocketListener
    control_journal: Journal
    data_journal: Journal
    control: Client | None = None
    data: socket.socket | None = None

    @classmethod
    def from_descriptors(cls, fds: set[int]) -> RelayEnds:
        """Make them.

        Args:
            fds: by number, as the launcher gave them.
        Raises:
            ProtocolError: they are not a whole set.
        """
        needed = set(RelayFd) - {RelayFd.CONTROL, RelayFd.DATA}
        if not needed <= fds:
            raise ProtocolError(f"a relay was started without the descriptors {sorted(needed - fds)}")
        return cls(
            Hold(socket.socket(fileno=RelayFd.HOLD)),
            RelayFd.GUEST_PORT,
            SocketListener(socket.socket(fileno=RelayFd.CONTROL_LISTENER)),
            SocketListener(socket.socket(fileno=RelayFd.DATA_LISTENER)),
            Journal(RelayFd.CONTROL_JOURNAL),
            Journal(RelayFd.DATA_JOURNAL),
            control=Client.of(socket.socket(fileno=RelayFd.CONTROL)) if RelayFd.CONTROL in fds else None,
            data=socket.socket(fileno=RelayFd.DATA) if RelayFd.DATA in fds else None,
        )
