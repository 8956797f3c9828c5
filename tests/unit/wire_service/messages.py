"""A service's interface with every kind of field, for the tests beside this module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from vtpm.tpm.types import TpmVersion, VtpmId
from vtpm.wire.service import Interface, MaxLength, Operation, Range


@dataclass(frozen=True)
class Inner:
    percent: Annotated[int, Range(-100, 100)]
    label: Annotated[str, MaxLength(8)]


@dataclass(frozen=True)
class Everything:
    flag: bool
    number: int
    text: str
    data: Annotated[bytes, MaxLength(64)]
    uuid: UUID
    vtpm_id: VtpmId
    version: TpmVersion
    inner: Inner
    inners: Annotated[tuple[Inner, ...], MaxLength(3)]
    maybe: Inner | None
    maybe_text: Annotated[str | None, MaxLength(4)]


@dataclass(frozen=True)
class Text:
    text: Annotated[str, MaxLength(60_000)]


@dataclass(frozen=True)
class Nothing:
    pass


SERVICE = Interface(
    "vtpm-test",
    {"everything": Operation(Everything, Everything), "say": Operation(Text, Text), "end": Operation(Nothing, Nothing)},
    {"said": Text},
)
