"""The guest's side of the hold: hands the guest link's descriptors to the launcher to keep (decision record 1).

For whoever holds those descriptors: an instance, or the relay in front of one.
"""

from __future__ import annotations

import socket

from vtpm.wire.hold import HoldMessage, HoldType, ParkedKind, encode_hold


class Hold:
    """See the module. A launcher that does not take a message is dead or hung, and this raises OSError.

    Args:
        sock: the hold, SOCK_SEQPACKET.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(1.0)
        self._sock = sock

    def fileno(self) -> int:
        """Descriptor to wait on; it becomes readable only when the launcher has gone."""
        return self._sock.fileno()

    def park(self, kind: ParkedKind, fd: int) -> None:
        """Have a descriptor kept, in place of an earlier one of its kind. Raises OSError."""
        socket.send_fds(self._sock, [encode_hold(HoldMessage(HoldType.PARK, kind))], [fd])

    def drop(self, kind: ParkedKind) -> None:
        """Have the kept descriptor of this kind closed. Raises OSError."""
        self._sock.send(encode_hold(HoldMessage(HoldType.DROP, kind)))
