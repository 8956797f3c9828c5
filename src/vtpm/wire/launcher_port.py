"""Messages between the two ends of vtpm-bridge, each the body of one frame, where the manager has a machine of its own.

They carry the packets of launcher and manager unread, and the bytes of the manager links whose descriptors go beside
those packets: a descriptor is told by a number. A body is u8 version, u8 type, u16 zero, u32 link, fields; big-endian.
docs/protocols.md has the tables and the order of messages. Pure; for the bridge. Decision record 25.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtpm.wire.fields import Field, fixed, number, rest
from vtpm.wire.message_codec import HEADER, MAX_NUMBER, Layout, MessageCodec, Numbered
from vtpm.wire.packet_stream import MAX_FDS
from vtpm.wire.service import MAX_PACKET_BYTES

LAUNCHER_PORT = "org.vtpm.launcher"
"""Name of the virtio-serial port that carries these messages."""
PORT_VERSION = 1
SESSION_BYTES = 8
WINDOW_BYTES = 64 * 1024
"""What either side sends on a link before it is told that some of it was taken."""
CHUNK_BYTES = 16 * 1024
"""Most in one Data, so that no link has the port for long."""
MAX_LINK = MAX_NUMBER
_LINKS_BYTES = 5
MAX_BODY_BYTES = HEADER.size + _LINKS_BYTES + MAX_PACKET_BYTES


class Direction(enum.Enum):
    """Who sent a message."""

    TO_LAUNCHER = "manager's side"
    TO_MANAGER = "launcher's side"


@dataclass(frozen=True)
class Hello:
    """Manager's side: whatever was before is over; a connection to the launcher is wanted. `session` is drawn anew."""

    session: bytes


@dataclass(frozen=True)
class Ready:
    """Launcher's side: the launcher is connected for the session of this Hello. Nothing else counts before it."""

    session: bytes


@dataclass(frozen=True)
class Ended:
    """Launcher's side: there is no session, for it has just begun or the launcher has gone. Answered by Hello."""


@dataclass(frozen=True)
class Packet:
    """One packet of launcher or manager, whole.

    Fields: first, number of the first manager link that came with it, 0 for none: they count up, and none comes again
    in a session; links, how many, 0 to 8, and none in what a manager sends; data, kept out of repr.
    """

    first: int
    links: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Data:
    """Bytes of a manager link, from 1 to CHUNK_BYTES, kept out of repr: they may be a TPM's state."""

    link: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Taken:
    """So many bytes of the link were handed on, and as many more may come."""

    link: int
    count: int


@dataclass(frozen=True)
class Close:
    """The link is closed on this side, and what comes for it is dropped."""

    link: int


Message = Hello | Ready | Ended | Packet | Data | Taken | Close

_SESSION: Mapping[str, Field] = {"session": fixed(SESSION_BYTES)}
_Layouts = Mapping[type[Any], tuple[int, Mapping[str, Field]]]
_BOTH: _Layouts = {
    Packet: (
        0x11,
        {"first": number("I"), "links": number("B", most=MAX_FDS), "data": rest(MAX_PACKET_BYTES, least=1)},
    ),
    Data: (0x12, {"data": rest(CHUNK_BYTES, least=1)}),
    Taken: (0x13, {"count": number("I", least=1, most=WINDOW_BYTES)}),
    Close: (0x14, {}),
}


def _codec(direction: Direction, own: _Layouts) -> MessageCodec[Message]:
    layouts = {cls: Layout(code, direction, fields) for cls, (code, fields) in {**own, **_BOTH}.items()}
    return MessageCodec(
        "a message of the launcher's port", PORT_VERSION, MAX_BODY_BYTES, Numbered("link", "link"), layouts
    )


_CODECS = {
    Direction.TO_LAUNCHER: _codec(Direction.TO_LAUNCHER, {Hello: (0x01, _SESSION)}),
    Direction.TO_MANAGER: _codec(Direction.TO_MANAGER, {Ready: (0x81, _SESSION), Ended: (0x82, {})}),
}


def encode_message(message: Message, direction: Direction) -> bytes:
    """Return the body of a message that goes in one direction. Raises ProtocolError: a field is out of its bounds."""
    return _CODECS[direction].encode(message)


def decode_message(body: bytes, direction: Direction) -> Message:
    """Read the body of a message that came from one direction.

    Raises:
        ProtocolError: it is not exactly a message of that direction with all its fields within bounds.
    """
    return _CODECS[direction].decode(body, direction)
