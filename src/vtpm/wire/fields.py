"""Fields of messages, which follow one another without gaps: how each is written and read, with its bounds. Pure.

For the codecs of the links. A message is a dataclass; its layout maps the names of its attributes to fields.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from vtpm.errors import ProtocolError


@dataclass(frozen=True)
class Field:
    """One field: gives the bytes of a value; reads a value, with the number of bytes it takes."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes], tuple[Any, int]]


def number(form: str, least: int = 0, most: int | None = None) -> Field:
    """A number of a struct format, within bounds."""
    packer = struct.Struct(">" + form)
    top = (1 << 8 * packer.size) - 1 if most is None else most

    def check(value: int) -> int:
        if not least <= value <= top:
            raise ProtocolError(f"the number {value} is not within {least} to {top}")
        return value

    return Field(lambda v: packer.pack(check(v)), lambda b: (check(packer.unpack_from(b)[0]), packer.size))


def choice(form: str, values: Mapping[Any, int]) -> Field:
    """One of several values, each with its number."""
    packer = struct.Struct(">" + form)
    by_code = {code: value for value, code in values.items()}

    def read(data: bytes) -> tuple[Any, int]:
        code = packer.unpack_from(data)[0]
        if code not in by_code:
            raise ProtocolError(f"{code} is not a known value")
        return by_code[code], packer.size

    def write(value: Any) -> bytes:
        if value not in values:
            raise ProtocolError(f"{value!r} is not a value that can be sent")
        return packer.pack(values[value])

    return Field(write, read)


def fixed(length: int) -> Field:
    """Bytes, as many as given."""

    def check(value: bytes) -> bytes:
        if len(value) != length:
            raise ProtocolError(f"a field of {length} bytes has {len(value)}")
        return value

    return Field(check, lambda b: (check(b[:length]), length))


def rest(most: int, least: int = 0) -> Field:
    """All bytes that are left; the last field alone."""

    def check(value: bytes) -> bytes:
        if not least <= len(value) <= most:
            raise ProtocolError(f"{len(value)} bytes of data, {least} to {most} are allowed")
        return value

    return Field(lambda v: check(bytes(v)), lambda b: (check(b), len(b)))


def sized(most: int, least: int = 0) -> Field:
    """Bytes with their length before them, u32."""

    def write(value: bytes) -> bytes:
        if not least <= len(value) <= most:
            raise ProtocolError(f"{len(value)} bytes of data, {least} to {most} are allowed")
        return len(value).to_bytes(4, "big") + value

    def read(data: bytes) -> tuple[bytes, int]:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 or not least <= length <= most or len(data) < 4 + length:
            raise ProtocolError(f"{length} bytes of data are cut off, or not {least} to {most}")
        return data[4 : 4 + length], 4 + length

    return Field(write, read)


def uuid() -> Field:
    """A UUID: 16 bytes in network order."""
    inner = fixed(16)
    return Field(lambda v: v.bytes, lambda b: (UUID(bytes=inner.read(b)[0]), 16))


def text(most: int) -> Field:
    """Printable text of at most so many bytes, made to fit when written, and harmless in a log or on a terminal."""

    def write(value: str) -> bytes:
        printable = "".join(char if char.isprintable() else "?" for char in value)
        encoded = printable.encode()[:most].decode(errors="ignore").encode()
        return len(encoded).to_bytes(2, "big") + encoded

    def read(data: bytes) -> tuple[str, int]:
        length = int.from_bytes(data[:2], "big")
        if len(data) < 2 or length > most or len(data) < 2 + length:
            raise ProtocolError(f"a text of {length} bytes is cut off or longer than {most}")
        try:
            value = data[2 : 2 + length].decode()
        except UnicodeDecodeError:
            raise ProtocolError("a text is not UTF-8") from None
        if not value.isprintable():
            raise ProtocolError("a text has characters that cannot be printed")
        return value, 2 + length

    return Field(write, read)


def write_fields(message: object, fields: Mapping[str, Field]) -> bytes:
    """Return the bytes of a message's fields. Raises ProtocolError: one is out of its bounds."""
    return b"".join(form.write(getattr(message, name)) for name, form in fields.items())


def read_fields(what: str, fields: Mapping[str, Field], data: bytes) -> dict[str, Any]:
    """Read the fields of a message, to the end of the data.

    Args:
        what: the message, for errors.
    Raises:
        ProtocolError: a field is cut off or out of its bounds, or there is more.
    """
    values: dict[str, Any] = {}
    at = 0
    for name, form in fields.items():
        try:
            values[name], used = form.read(data[at:])
        except (ProtocolError, struct.error) as error:
            raise ProtocolError(f"a {what}'s field {name} is wrong: {error}") from None
        at += used
    if at != len(data):
        raise ProtocolError(f"a {what} has {len(data) - at} bytes too many")
    return values
