"""JSON into the dataclasses of wire/api.py, strictly. Pure; for the client alone.

Every field must be there and of its type. Fields that are not known are passed over, so that an older client reads a
newer manager.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from typing import Any, TypeVar
from uuid import UUID

from vtpm.errors import ProtocolError

T = TypeVar("T")


def decode(kind: type[T], value: object, where: str) -> T:
    """Return `value`, as json.loads gives it, as a `kind`.

    Args:
        kind: a dataclass, str, int, bool, UUID, StrEnum, Any, or T | None, list[T], dict[str, T] of these.
        where: what the value is, for messages.
    Raises:
        ProtocolError: a missing field, or a value of another type.
        TypeError: an annotation that is none of the above.
    """
    result: T = _decode(kind, value, where)
    return result


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union) and type(None) in args:
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is list:
        items = _expect(list, value, where)
        return [_decode(args[0], item, f"{where}[{index}]") for index, item in enumerate(items)]
    if origin is dict:
        members = _expect(dict, value, where)
        return {key: _decode(args[1], member, f"{where}.{key}") for key, member in members.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind in (str, int, bool):
        return _expect(kind, value, where)
    if issubclass(kind, UUID | enum.StrEnum):
        text = _expect(str, value, where)
        try:
            return kind(text)
        except ValueError:
            raise ProtocolError(f"{where} is {text[:80]!r}, which is no {kind.__name__}") from None
    raise TypeError(f"{kind} cannot be decoded")


def _decode_dataclass(kind: Any, value: object, where: str) -> object:
    members = _expect(dict, value, where)
    return kind(**{name: _member(members, name, hint, where) for name, hint in _hints(kind).items()})


def _member(members: dict[str, Any], name: str, hint: Any, where: str) -> Any:
    if name not in members:
        raise ProtocolError(f"{where} lacks the field {name!r}")
    return _decode(hint, members[name], f"{where}.{name}")


def _expect(kind: type[T], value: object, where: str) -> T:
    # The exact type, since True is an int.
    if type(value) is not kind:
        raise ProtocolError(f"{where} is of type {type(value).__name__}, not {kind.__name__}")
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
