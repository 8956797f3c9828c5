"""Messages on the hold: the channel on which an instance hands descriptors to the launcher to keep (decision record 1).

One packet (SOCK_SEQPACKET) per message: u8 version, u8 type, u8 kind, u8 zero. A PARK carries exactly one descriptor.
The launcher sends nothing; a hang-up means that the other side is gone. Pure; for instance and launcher.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vtpm.errors import ProtocolError

HOLD_VERSION = 1
MESSAGE_BYTES = 4


class HoldType(enum.IntEnum):
    """What the instance asks of the launcher."""

    PARK = 1
    """Keep the descriptor that comes with this message, in place of an earlier one of the same kind."""
    DROP = 2
    """Close the parked descriptor of this kind; none parked is no error."""


class ParkedKind(enum.IntEnum):
    """Descriptors of the guest link that a successor needs."""

    CONTROL = 1
    DATA = 2


@dataclass(frozen=True)
class HoldMessage:
    """One message."""

    type: HoldType
    kind: ParkedKind


def encode_hold(message: HoldMessage) -> bytes:
    """Return the packet for a message."""
    return bytes((HOLD_VERSION, message.type, message.kind, 0))


def decode_hold(packet: bytes, descriptors: int) -> HoldMessage:
    """Read one packet that came with a number of descriptors.

    Raises:
        ProtocolError: wrong size, version, type or kind, or a descriptor too many or too few.
    """
    if len(packet) != MESSAGE_BYTES or packet[0] != HOLD_VERSION or packet[3] != 0:
        raise ProtocolError(f"a hold message of {len(packet)} bytes is malformed or of another version")
    try:
        message = HoldMessage(HoldType(packet[1]), ParkedKind(packet[2]))
    except ValueError:
        raise ProtocolError(f"a hold message has the unknown type {packet[1]} or kind {packet[2]}") from None
    if descriptors != (1 if message.type is HoldType.PARK else 0):
        raise ProtocolError(f"a hold message {message.type.name} came with {descriptors} descriptors")
    return message
