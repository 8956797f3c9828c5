"""Control requests of every kind, by name, and the frozen bytes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtpm.tpm.types import StateKind
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Plain,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
)

VECTOR_DIR = Path(__file__).parents[2] / "vectors" / "wire"
VECTORS = json.loads((VECTOR_DIR / "emulator_control_v1.json").read_text())
ONE_BYTE_BODIES = (Command.SET_LOCALITY, Command.RESET_TPMESTABLISHED)

_WITH_BODY = (
    Init,
    SetLocality,
    HashData,
    ResetEstablished,
    GetStateBlob,
    SetStateBlob,
    SetBufferSize,
    GetInfo,
    LockStorage,
)
_SHAPES: dict[Command, Any] = {shape.command: shape for shape in _WITH_BODY}
_READERS = {"data": bytes.fromhex, "kind": StateKind}


def _example(command: Command, fields: dict[str, Any]) -> Request:
    if command not in _SHAPES:
        return Plain(command)
    values = {name: _READERS.get(name, int)(value) for name, value in fields.items()}
    return _SHAPES[command](**values)  # type: ignore[no-any-return]


REQUESTS: dict[str, tuple[Request, bytes]] = {
    name: (_example(Command[command], fields), bytes.fromhex(frozen))
    for name, (command, fields, frozen) in VECTORS["requests"].items()
}
