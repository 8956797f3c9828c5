"""Messages between a relay on the host and the vtpmd in its virtual machine, each the body of one frame. Pure.

They carry what clients of the guest link ask and what the TPM answers, whole requests and whole answers alone: the
relay reads a client's stream and knows where a request ends, and neither side can be brought to pass on a half. A body
is u8 version, u8 type, u16 zero, u32 connection, fields; big-endian. docs/protocols.md has the tables and the order of
messages. For the relay and the instance.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtpm.errors import ProtocolError
from vtpm.tpm.headers import MAX_COMMAND_BYTES, CommandHeader, ResponseHeader
from vtpm.tpm.types import MAX_LOCALITY, TpmVersion
from vtpm.wire.emulator import Command, ControlDecoder, Malformed, Request, SetStateBlob, encode_request
from vtpm.wire.fields import Field, choice, fixed, number, rest, text
from vtpm.wire.instance_spec import Role
from vtpm.wire.message_codec import HEADER, MAX_NUMBER, Layout, MessageCodec, Numbered

GUEST_PORT = "org.vtpm.guest"
"""Name of the virtio-serial port that carries these messages."""
MANAGER_PORT = "org.vtpm.manager"
"""Name of the one that carries the manager link."""

PORT_VERSION = 1
SESSION_BYTES = 8
MAX_CONNECTION = MAX_NUMBER
MAX_REPLY_BYTES = 4096
"""Bound on a Reply; of what a vtpmd answers only a state is longer, and comes in ReplyParts before it."""
MAX_PIECE_BYTES = 16 * 1024
"""Most of a state in one message."""
MAX_NOTE_BYTES = 200
MAX_BODY_BYTES = HEADER.size + 16 + max(MAX_COMMAND_BYTES, MAX_PIECE_BYTES)
_LEAST_REPLY_BYTES = 4
_NO_LOCALITY = 0xFF


class Direction(enum.Enum):
    """Who sent a message."""

    TO_VM = "relay to vtpmd"
    TO_RELAY = "vtpmd to relay"


class ConnectionKind(enum.IntEnum):
    """What a client has connected to."""

    CONTROL = 1
    DATA = 2


@dataclass(frozen=True)
class Hello:
    """Relay: what this instance is, and which connections it takes over. The first message, and it comes once.

    Fields: session, random bytes that READY repeats; tpm_version; role; powered (whether the guest was left with a TPM
    that is on); locality, 0 to 4, that the control channel set last; control and data, a successor's connections to
    an emulator, 0: none; uid of that emulator.
    """

    session: bytes
    tpm_version: TpmVersion
    role: Role
    powered: bool = False
    locality: int = 0
    control: int = 0
    data: int = 0
    uid: int = 0


@dataclass(frozen=True)
class Open:
    """Relay: a client of this uid has connected."""

    connection: int
    kind: ConnectionKind
    uid: int


@dataclass(frozen=True)
class Close:
    """Relay: the client has gone; answered by Closed, and then the next one of its kind may be opened."""

    connection: int


@dataclass(frozen=True)
class Control:
    """Relay: one control request, answered by one Reply before the next comes; never SET_DATAFD.

    A SET_STATEBLOB has at most MAX_PIECE_BYTES of data: the relay cuts a longer one.
    """

    connection: int
    request: Request


@dataclass(frozen=True)
class DataFd:
    """Relay: SET_DATAFD on a control connection; answered by Reply.

    `data` is the connection that stands for the descriptor. It is open at once; a vtpmd that does not take it says so
    by the Reply, and by Closed.
    """

    connection: int
    data: int


@dataclass(frozen=True)
class TpmRequest:
    """Relay: one TPM command; answered by one Response before the next one comes.

    Fields: locality, 0 to 4, where the client named one; data, the whole command, kept out of repr.
    """

    connection: int
    locality: int | None
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Note:
    """Relay: a line for the manager's log."""

    message: str


@dataclass(frozen=True)
class Ready:
    """Vtpmd: serves from now on. Answers Hello, whose session it repeats."""

    session: bytes


@dataclass(frozen=True)
class Reply:
    """Vtpmd: the whole reply to the control request of this connection."""

    connection: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class ReplyPart:
    """Vtpmd: the next part of a reply to GET_STATEBLOB, whose last part is a Reply."""

    connection: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Response:
    """Vtpmd: the whole response to the TPM command of this connection."""

    connection: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Power:
    """Vtpmd: what a successor must know of the TPM's power, before anything that the guest could tell it by is sent."""

    powered: bool


@dataclass(frozen=True)
class Closed:
    """Vtpmd: serves this connection no more, and says nothing more on it. Once for each, asked by Close or not."""

    connection: int


@dataclass(frozen=True)
class Ended:
    """Vtpmd: the last message; the virtual machine powers off. `status` is what a process would have exited with."""

    status: int


ToVm = Hello | Open | Close | Control | DataFd | TpmRequest | Note
ToRelay = Ready | Reply | ReplyPart | Response | Power | Closed | Ended
Message = ToVm | ToRelay


def _read_request(data: bytes) -> tuple[Request, int]:
    decoder = ControlDecoder()
    items = decoder.feed(data)
    if len(items) != 1 or decoder.buffered_bytes or isinstance(items[0], Malformed):
        raise ProtocolError(f"{len(data)} bytes are not one whole control request")
    request = items[0]
    if _write_request(request) != data:
        raise ProtocolError(f"a {request.command.name} is written in another way than this one")
    return request, len(data)


def _write_request(request: Request) -> bytes:
    is_long = isinstance(request, SetStateBlob) and len(request.data) > MAX_PIECE_BYTES
    if is_long or request.command is Command.SET_DATAFD:
        raise ProtocolError(f"{request.command.name} does not go over the guest port as it is")
    return encode_request(request)


def _whole(header: type[CommandHeader] | type[ResponseHeader]) -> Field:
    """A TPM command or response, of whose header the size alone is looked at."""

    def check(value: bytes) -> bytes:
        if header.parse(value).size_bytes != len(value):
            raise ProtocolError(f"{len(value)} bytes are not one whole TPM command or response")
        return value

    return Field(check, lambda b: (check(b), len(b)))


_VERSION = choice("B", {TpmVersion.V1_2: 12, TpmVersion.V2_0: 20})
_ROLE = choice("B", {Role.FIRST: 1, Role.SUCCESSOR: 2})
_KIND = choice("B", {kind: int(kind) for kind in ConnectionKind})
_BOOL = choice("B", {False: 0, True: 1})
_LOCALITY = number("B", most=MAX_LOCALITY)
_CLIENTS_LOCALITY = choice("B", {None: _NO_LOCALITY, **{value: value for value in range(MAX_LOCALITY + 1)}})
_CONNECTION = number("I", least=1)
_U32 = number("I")
_SESSION = fixed(SESSION_BYTES)

_LAYOUTS: Mapping[type[Any], Layout] = {
    Hello: Layout(
        0x01,
        Direction.TO_VM,
        {
            "session": _SESSION,
            "tpm_version": _VERSION,
            "role": _ROLE,
            "powered": _BOOL,
            "locality": _LOCALITY,
            "control": _U32,
            "data": _U32,
            "uid": _U32,
        },
    ),
    Open: Layout(0x02, Direction.TO_VM, {"kind": _KIND, "uid": _U32}),
    Close: Layout(0x03, Direction.TO_VM, {}),
    Control: Layout(0x04, Direction.TO_VM, {"request": Field(_write_request, _read_request)}),
    DataFd: Layout(0x05, Direction.TO_VM, {"data": _CONNECTION}),
    TpmRequest: Layout(
        0x06,
        Direction.TO_VM,
        {"locality": _CLIENTS_LOCALITY, "data": _whole(CommandHeader)},
    ),
    Note: Layout(0x07, Direction.TO_VM, {"message": text(MAX_NOTE_BYTES)}),
    Ready: Layout(0x81, Direction.TO_RELAY, {"session": _SESSION}),
    Reply: Layout(0x82, Direction.TO_RELAY, {"data": rest(MAX_REPLY_BYTES, least=_LEAST_REPLY_BYTES)}),
    Response: Layout(0x83, Direction.TO_RELAY, {"data": _whole(ResponseHeader)}),
    Power: Layout(0x84, Direction.TO_RELAY, {"powered": _BOOL}),
    Closed: Layout(0x85, Direction.TO_RELAY, {}),
    Ended: Layout(0x86, Direction.TO_RELAY, {"status": number("B")}),
    ReplyPart: Layout(0x87, Direction.TO_RELAY, {"data": rest(MAX_PIECE_BYTES, least=1)}),
}
_CODEC = MessageCodec[Message](
    "a message of the guest port", PORT_VERSION, MAX_BODY_BYTES, Numbered("connection", "connection"), _LAYOUTS
)


def encode_message(message: Message) -> bytes:
    """Return the body of a message. Raises ProtocolError: a field is out of its bounds."""
    return _CODEC.encode(message)


def decode_message(body: bytes, direction: Direction) -> Message:
    """Read the body of a message that came from one direction.

    Raises:
        ProtocolError: it is not exactly a message of that direction with all its fields within bounds.
    """
    return _CODEC.decode(body, direction)


def reply_messages(connection: int, reply: bytes) -> Iterator[ReplyPart | Reply]:
    """Cut a whole control reply into messages: one Reply, and before it what is more than that holds."""
    while len(reply) > MAX_REPLY_BYTES:
        # What is left is a Reply of the least length or more.
        size = min(MAX_PIECE_BYTES, len(reply) - _LEAST_REPLY_BYTES)
        yield ReplyPart(connection, reply[:size])
        reply = reply[size:]
    yield Reply(connection, reply)
