"""Bodies of frames as messages: one codec for the links whose messages are tables of fields. Pure.

A body is u8 version, u8 type, u16 zero, u32 number, fields; big-endian. What the number counts is the link's to say; a
message has it where its class has the attribute, and zero stands for none. For the links' and ports' codecs and that
of migration.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vtpm.errors import ProtocolError
from vtpm.wire.fields import Field, read_fields, write_fields

M = TypeVar("M")
HEADER = struct.Struct(">BBHI")
MAX_NUMBER = 2**32 - 1


@dataclass(frozen=True)
class Layout:
    """One message: its type, from whom it may come, and its fields in order."""

    code: int
    direction: enum.Enum
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Numbered:
    """What the number in the header counts: the attribute of messages that have it, and the words for it in errors."""

    attribute: str
    noun: str


UNNUMBERED = Numbered("", "number")
"""No message has one."""


class MessageCodec(Generic[M]):
    """See the module.

    Args:
        what: a message of this link, for errors, such as "a link message".
        version: of the link.
        max_body_bytes: bound on one body.
        number: see Numbered.
        layouts: of all messages, by class.
    """

    def __init__(
        self, what: str, version: int, max_body_bytes: int, number: Numbered, layouts: Mapping[type[Any], Layout]
    ) -> None:
        self._what = what
        self._version = version
        self._max_body_bytes = max_body_bytes
        self._number = number
        self._layouts = layouts
        self._by_code = {layout.code: (cls, layout) for cls, layout in layouts.items()}

    def encode(self, message: M) -> bytes:
        """Return the body of a message. Raises ProtocolError: a field is out of its bounds."""
        layout = self._layouts[type(message)]
        value = getattr(message, self._number.attribute, None)
        if value is not None and not 1 <= value <= MAX_NUMBER:
            raise ProtocolError(f"the {self._number.noun} {value} is not within 1 to {MAX_NUMBER}")
        return HEADER.pack(self._version, layout.code, 0, value or 0) + write_fields(message, layout.fields)

    def decode(self, body: bytes, direction: enum.Enum) -> M:
        """Read the body of a message that came from one direction.

        Raises:
            ProtocolError: it is not exactly a message of that direction with all its fields within bounds.
        """
        if not HEADER.size <= len(body) <= self._max_body_bytes:
            raise ProtocolError(f"{self._what} has {len(body)} bytes")
        version, code, reserved, value = HEADER.unpack_from(body)
        if version != self._version:
            raise ProtocolError(f"{self._what} has version {version}, this is {self._version}")
        if code not in self._by_code or self._by_code[code][1].direction is not direction:
            raise ProtocolError(f"{self._what} has the type 0x{code:02x}, unknown from {direction.value}")
        cls, layout = self._by_code[code]
        has_number = self._number.attribute in cls.__dataclass_fields__
        if reserved or bool(value) is not has_number:
            raise ProtocolError(
                f"a {cls.__name__} has a reserved field set, or a {self._number.noun} where it must not"
            )
        values = read_fields(cls.__name__, layout.fields, body[HEADER.size :])
        if has_number:
            values[self._number.attribute] = value
        message: M = cls(**values)
        return message
