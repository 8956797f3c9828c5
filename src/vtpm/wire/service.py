"""Messages between host services (manager and keeper, manager and launcher): typed, bounded, one JSON object a packet.

An interface is declared as data: frozen dataclasses say what an operation takes and gives, and the strict codec is made
from their annotations. Descriptors travel beside a packet (see packet_socket). Pure; may be imported by every service.

Annotations: str, bytes (as base64) and tuple[T, ...] with `Annotated[…, MaxLength(n)]`, int with `Annotated[int,
Range(a, b)]`, bool, UUID, StrEnum, NewTypes of these, T | None, frozen dataclasses of these. Every field must be there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

from vtpm.errors import ProtocolError, VtpmError
from vtpm.wire.service_codec import MaxLength, Range, codec_of, expect_fields

__all__ = [
    "MAX_PACKET_BYTES",
    "Event",
    "Interface",
    "MaxLength",
    "Operation",
    "Range",
    "Reply",
    "Request",
    "RequestError",
    "decode_from_service",
    "decode_request",
    "decode_result",
    "encode_error",
    "encode_event",
    "encode_request",
    "encode_result",
]

MAX_PACKET_BYTES = 64 * 1024
MAX_DEPTH = 12

_MAX_INT_CHARACTERS = 20
_MAX_ERROR_CHARACTERS = 2000
# The closing quote is optional so that a text without an end is passed over once, not once per quote in it.
_JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_JSON_BRACKET = re.compile(r"[\[\]{}]")


@dataclass(frozen=True)
class Operation:
    """What one operation takes and gives: two frozen dataclasses.

    Raises:
        TypeError: an annotation that the codec does not know.
    """

    args: type
    result: type

    def __post_init__(self) -> None:
        codec_of(self.args)
        codec_of(self.result)


@dataclass(frozen=True)
class Interface:
    """All that a service answers and tells.

    Args:
        name: the program's name, for messages.
        operations: by name.
        events: classes of the events' arguments, by name.
    """

    name: str
    operations: Mapping[str, Operation]
    events: Mapping[str, type] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for event in self.events.values():
            codec_of(event)


@dataclass(frozen=True)
class Request:
    """A request whose arguments are of the operation's class."""

    id: int
    op: str
    args: Any


@dataclass(frozen=True)
class Reply:
    """A reply whose result is still JSON: only the caller knows which operation the id stands for."""

    id: int
    ok: Any = field(repr=False)
    error: VtpmError | None


@dataclass(frozen=True)
class Event:
    """An event whose arguments are of the event's class."""

    event: str
    args: Any


class RequestError(ProtocolError):
    """A malformed request; `request_id` is None when not even that could be read."""

    def __init__(self, message: str, request_id: int | None) -> None:
        super().__init__(message)
        self.request_id = request_id


def encode_request(interface: Interface, request_id: int, op: str, args: object) -> bytes:
    """Return the packet for a request.

    Raises:
        ProtocolError: unknown operation, arguments not as declared, or too large.
    """
    members = codec_of(_operation(interface, op).args).encode(args)
    return _packet({"id": _ID.encode(request_id), "op": op, "args": members})


def decode_request(interface: Interface, packet: bytes) -> Request:
    """Read a request.

    Raises:
        RequestError: anything that encode_request does not write.
    """
    request_id = None
    try:
        members = _object(packet)
        # Read first, so that the peer learns which of its requests was refused.
        request_id = _ID.decode(members.get("id"))
        expect_fields(members, {"id", "op", "args"}, "a request")
        op = _NAME.decode(members["op"])
        return Request(request_id, op, codec_of(_operation(interface, op).args).decode(members["args"]))
    except ProtocolError as error:
        raise RequestError(error.message, request_id) from None


def encode_result(interface: Interface, request_id: int, op: str, result: object) -> bytes:
    """Return the packet for a good reply.

    Raises:
        ProtocolError: the result is not as declared, or too large.
    """
    return _packet({"id": request_id, "ok": codec_of(_operation(interface, op).result).encode(result)})


def encode_error(request_id: int, error: VtpmError) -> bytes:
    """Return the packet for a reply that says why not; long texts are cut."""
    texts = {"message": error.message, "next_step": error.next_step}
    return _packet({"id": request_id, "error": {"code": error.code} | {key: _cut(text) for key, text in texts.items()}})


def decode_result(interface: Interface, op: str, ok: object) -> Any:
    """Return the result of a good reply, of the operation's class.

    Raises:
        ProtocolError: it is not as declared.
    """
    return codec_of(_operation(interface, op).result).decode(ok)


def encode_event(interface: Interface, event: str, args: object) -> bytes:
    """Return the packet for an event.

    Raises:
        ProtocolError: unknown event, arguments not as declared, or too large.
    """
    return _packet({"event": event, "args": codec_of(_event(interface, event)).encode(args)})


def decode_from_service(interface: Interface, packet: bytes) -> Reply | Event:
    """Read what a service sends: a reply or an event.

    Raises:
        ProtocolError: anything that the service's side does not write.
    """
    members = _object(packet)
    if "event" in members:
        expect_fields(members, {"event", "args"}, "an event")
        event = _NAME.decode(members["event"])
        return Event(event, codec_of(_event(interface, event)).decode(members["args"]))
    if "error" in members:
        expect_fields(members, {"id", "error"}, "a reply")
        return Reply(_ID.decode(members["id"]), None, _decode_error(members["error"]))
    expect_fields(members, {"id", "ok"}, "a reply")
    return Reply(_ID.decode(members["id"]), members["ok"], None)


@dataclass(frozen=True)
class _ErrorMembers:
    code: Annotated[str, MaxLength(64)]
    message: Annotated[str, MaxLength(_MAX_ERROR_CHARACTERS)]
    next_step: Annotated[str, MaxLength(_MAX_ERROR_CHARACTERS)]


def _decode_error(members: object) -> VtpmError:
    read = codec_of(_ErrorMembers).decode(members)
    return error_of(read.code, read.message, read.next_step)


def error_of(code: str, message: str, next_step: str) -> VtpmError:
    """Return the error that a peer reports; of a code that is not known here, a VtpmError."""
    error_class = dict(_error_classes(VtpmError)).get(code, VtpmError)
    # A subclass may take other arguments; what came over the wire is what every error has.
    error = error_class.__new__(error_class)
    VtpmError.__init__(error, message, next_step=next_step)
    return error


def _error_classes(root: type[VtpmError]) -> Iterator[tuple[str, type[VtpmError]]]:
    """Yield the class that introduces each code."""
    if "code" in vars(root):
        yield root.code, root
    for subclass in root.__subclasses__():
        yield from _error_classes(subclass)


def _operation(interface: Interface, op: str) -> Operation:
    operation = interface.operations.get(op)
    if operation is None:
        raise ProtocolError(f"{interface.name} has no operation {op[:64]!r}")
    return operation


def _event(interface: Interface, event: str) -> type:
    event_class = interface.events.get(event)
    if event_class is None:
        raise ProtocolError(f"{interface.name} has no event {event[:64]!r}")
    return event_class


def _packet(members: Mapping[str, Any]) -> bytes:
    packet = json.dumps(members, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(packet) > MAX_PACKET_BYTES:
        raise ProtocolError(f"a message of {len(packet)} bytes is larger than {MAX_PACKET_BYTES}")
    return packet


def _object(packet: bytes) -> dict[str, Any]:
    """Parse a packet into one JSON object, with every bound checked before the parser sees it."""
    if len(packet) > MAX_PACKET_BYTES:
        raise ProtocolError(f"a message of {len(packet)} bytes is larger than {MAX_PACKET_BYTES}")
    try:
        text = packet.decode()
    except UnicodeDecodeError:
        raise ProtocolError("a message is not UTF-8") from None
    depth = 0
    for bracket in _JSON_BRACKET.findall(_JSON_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ProtocolError(f"a message is nested more than {MAX_DEPTH} deep")
    try:
        members = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_float,
            parse_float=_no_float,
            parse_int=_bounded_int,
        )
    except json.JSONDecodeError as error:
        raise ProtocolError(f"a message is not JSON: {error.msg} at character {error.pos}") from None
    if type(members) is not dict:
        raise ProtocolError("a message is not a JSON object")
    return members


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ProtocolError("a message has a member twice")
    return members


def _no_float(_text: str) -> NoReturn:
    raise ProtocolError("a message has a number that is no integer")


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_INT_CHARACTERS:
        raise ProtocolError("a message has an integer that is too large")
    return int(text)


def _cut(text: str) -> str:
    return text[:_MAX_ERROR_CHARACTERS].encode(errors="replace").decode()


_ID = codec_of(int)
_NAME = codec_of(Annotated[str, MaxLength(64)])
