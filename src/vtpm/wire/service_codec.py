"""Strict codecs of JSON values from dataclass annotations. Pure; for `service`, which lists the annotations."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

from vtpm.errors import ProtocolError

MAX_INT = 2**63 - 1
DEFAULT_MAX_LENGTH = 4096
"""Bound on text (characters), bytes and tuples (items) whose annotation names none."""


@dataclass(frozen=True)
class MaxLength:
    """Bound on a text (characters), bytes or a tuple (items)."""

    limit: int


@dataclass(frozen=True)
class Range:
    """Bounds of an integer, both inside."""

    low: int
    high: int


@dataclass(frozen=True)
class Codec:
    """How values of one annotation become JSON and come back; both raise ProtocolError at anything else."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def expect_fields(members: Mapping[str, Any], fields: set[str], what: str) -> None:
    """Refuse members other than exactly these.

    Raises:
        ProtocolError: one is missing or one too many; they are named.
    """
    if members.keys() != fields:
        differing = ", ".join(sorted(repr(name[:64]) for name in members.keys() ^ fields)[:8])
        raise ProtocolError(f"{what} lacks a field or has one too many: {differing}")


@functools.cache
def codec_of(annotation: Any) -> Codec:
    """Return the codec for an annotation.

    Raises:
        TypeError: it is none of those that `service` lists.
    """
    bounds: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *rest = typing.get_args(annotation)
        bounds = tuple(rest)
    while isinstance(annotation, typing.NewType):
        annotation = annotation.__supertype__
    max_length = next((bound.limit for bound in bounds if isinstance(bound, MaxLength)), DEFAULT_MAX_LENGTH)
    span = next((bound for bound in bounds if isinstance(bound, Range)), Range(0, MAX_INT))
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        if len(arguments) != 2 or arguments[1] is not types.NoneType:
            raise TypeError(f"{annotation}: only T | None is a union that can be sent")
        return _optional(codec_of(Annotated[(arguments[0], *bounds)] if bounds else arguments[0]))
    if typing.get_origin(annotation) is tuple:
        if len(arguments) != 2 or arguments[1] is not Ellipsis:
            raise TypeError(f"{annotation}: only tuple[T, ...] can be sent")
        return _sequence(codec_of(arguments[0]), max_length)
    if annotation is str:
        return _text(max_length)
    if annotation is bytes:
        return _octets(max_length)
    if annotation is int:
        return _checked(int, lambda value: span.low <= value <= span.high, f"an integer {span.low} to {span.high}")
    if annotation is bool:
        return _checked(bool, lambda _value: True, "true or false")
    if annotation is UUID:
        return _UUID
    if isinstance(annotation, type) and issubclass(annotation, enum.StrEnum):
        return _enumeration(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _record(annotation)
    raise TypeError(f"{annotation!r} cannot be sent between services")


def _checked(python_type: type, fits: Callable[[Any], bool], form: str) -> Codec:
    """Codec of a type that JSON has; compared exactly, for bool is a subclass of int."""

    def check(value: Any) -> Any:
        if type(value) is not python_type or not fits(value):
            raise ProtocolError(f"a value is not {form}")
        return value

    return Codec(check, check)


def _text(max_length: int) -> Codec:
    def fits(value: str) -> bool:
        # JSON can escape half of a surrogate pair, which is no text and cannot be written out again.
        return len(value) <= max_length and not any("\ud800" <= character <= "\udfff" for character in value)

    return _checked(str, fits, f"a text of at most {max_length} characters")


def _octets(max_length: int) -> Codec:
    form = f"base64 of at most {max_length} bytes"

    def encode(value: Any) -> str:
        if type(value) is not bytes or len(value) > max_length:
            raise ProtocolError(f"a value is not {form}")
        return base64.b64encode(value).decode()

    def decode(value: Any) -> bytes:
        try:
            octets = base64.b64decode(value, validate=True) if type(value) is str else None
        except (binascii.Error, ValueError):
            octets = None
        if octets is None or encode(octets) != value:
            raise ProtocolError(f"a value is not {form}")
        return octets

    return Codec(encode, decode)


def _optional(inner: Codec) -> Codec:
    return Codec(
        lambda value: None if value is None else inner.encode(value),
        lambda value: None if value is None else inner.decode(value),
    )


def _sequence(inner: Codec, max_length: int) -> Codec:
    form = f"a list of at most {max_length} items"

    def encode(value: Any) -> list[Any]:
        if type(value) is not tuple or len(value) > max_length:
            raise ProtocolError(f"a value is not {form}")
        return [inner.encode(item) for item in value]

    def decode(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > max_length:
            raise ProtocolError(f"a value is not {form}")
        return tuple(inner.decode(item) for item in value)

    return Codec(encode, decode)


def _enumeration(members: type[enum.StrEnum]) -> Codec:
    by_value = {member.value: member for member in members}

    def encode(value: Any) -> str:
        if type(value) is not members:
            raise ProtocolError(f"a value is not a {members.__name__}")
        return str(value.value)

    def decode(value: Any) -> enum.StrEnum:
        if type(value) is not str or value not in by_value:
            raise ProtocolError(f"a value is not a {members.__name__}")
        return by_value[value]

    return Codec(encode, decode)


def _record(record: type) -> Codec:
    hints = typing.get_type_hints(record, include_extras=True)
    codecs = {item.name: codec_of(hints[item.name]) for item in dataclasses.fields(record)}

    def encode(value: Any) -> dict[str, Any]:
        if type(value) is not record:
            raise ProtocolError(f"a {type(value).__name__} is not a {record.__name__}")
        return {name: _within(name, codec.encode, getattr(value, name)) for name, codec in codecs.items()}

    def decode(value: Any) -> Any:
        if type(value) is not dict:
            raise ProtocolError(f"a value is not a {record.__name__}")
        expect_fields(value, set(codecs), f"a {record.__name__}")
        return record(**{name: _within(name, codec.decode, value[name]) for name, codec in codecs.items()})

    return Codec(encode, decode)


def _within(name: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except ProtocolError as error:
        raise ProtocolError(f"{name}: {error.message}") from None


def _encode_uuid(value: Any) -> str:
    if type(value) is not UUID:
        raise ProtocolError("a value is not a uuid")
    return str(value)


def _decode_uuid(value: Any) -> UUID:
    # Compared with the canonical form: UUID also takes braces, urn: and other places for the hyphens.
    try:
        uuid = UUID(value) if type(value) is str else None
    except ValueError:
        uuid = None
    if uuid is None or str(uuid) != value:
        raise ProtocolError("a value is not a uuid in its canonical form")
    return uuid


_UUID = Codec(_encode_uuid, _decode_uuid)
