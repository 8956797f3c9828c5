"""The control protocol of QEMU's TPM emulator backend: its words, the layout of its commands, and its requests. Pure.

A request is u32 command and body, a reply u32 result and fields, all big-endian; docs/protocols.md has the tables.
Learned from QEMU 7.2 (backends/tpm/tpm_emulator.c, tpm_ioctl.h) and swtpm 0.7 to 0.10 (ctrlchannel.c, tpm_ioctl.h).
The decoder of the request stream is in `emulator`, replies are in `emulator_replies`. Import all of it from `emulator`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vtpm.errors import ProtocolError
from vtpm.tpm.types import MAX_LOCALITY, MAX_STATE_BYTES, StateKind

MAX_HASH_BYTES = 4096
"""Most data of one HASH_DATA; swtpm's ptm_hdata."""
MAX_INFO_BYTES = 3 * 1024
"""Most text of one GET_INFO reply; swtpm's PTM_GETINFO_SIZE, which is the buffer of its clients."""
HEAD_BYTES = 4
RESULT_BYTES = 4


class Command(enum.IntEnum):
    """CMD_* of tpm_ioctl.h."""

    GET_CAPABILITY = 1
    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    SET_LOCALITY = 5
    HASH_START = 6
    HASH_DATA = 7
    HASH_END = 8
    CANCEL_TPM_CMD = 9
    STORE_VOLATILE = 10
    RESET_TPMESTABLISHED = 11
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    GET_CONFIG = 15
    SET_DATAFD = 16
    SET_BUFFERSIZE = 17
    GET_INFO = 18
    LOCK_STORAGE = 19


class Capability(enum.IntFlag):
    """What a server can do: PTM_CAP_*."""

    INIT = 1 << 0
    SHUTDOWN = 1 << 1
    GET_TPMESTABLISHED = 1 << 2
    SET_LOCALITY = 1 << 3
    HASHING = 1 << 4
    CANCEL_TPM_CMD = 1 << 5
    STORE_VOLATILE = 1 << 6
    RESET_TPMESTABLISHED = 1 << 7
    GET_STATEBLOB = 1 << 8
    SET_STATEBLOB = 1 << 9
    STOP = 1 << 10
    GET_CONFIG = 1 << 11
    SET_DATAFD = 1 << 12
    SET_BUFFERSIZE = 1 << 13
    GET_INFO = 1 << 14
    SEND_COMMAND_HEADER = 1 << 15
    """The data channel takes the prefixed form (`tpm_stream`)."""
    LOCK_STORAGE = 1 << 16


class InitFlags(enum.IntFlag):
    """PTM_INIT_FLAG_*."""

    DELETE_VOLATILE = 1


class StateFlags(enum.IntFlag):
    """PTM_STATE_FLAG_*: DECRYPTED is asked for, ENCRYPTED is what a blob is."""

    DECRYPTED = 1
    ENCRYPTED = 2


class ConfigFlags(enum.IntFlag):
    """PTM_CONFIG_FLAG_*: which keys a server encrypts its files with."""

    FILE_KEY = 1
    MIGRATION_KEY = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """One command on the wire.

    Args:
        request: fixed part of the request's body; its last u32 is the length of data where data follows.
        reply: fixed part of the reply after the result; its last u32 is the length of data where data follows. An error
            has it too, all zeros.
        reply_fields: names of its numbers, without that length.
        max_request_data, max_reply_data: bound on the data, bytes; 0 where there is none.
        is_padded: QEMU sends 3 bytes after the body's one byte: they are the C union's, and not always zero.
    """

    request: struct.Struct
    reply: struct.Struct
    max_request_data: int = 0
    max_reply_data: int = 0
    reply_fields: tuple[str, ...] = ()
    is_padded: bool = False


def _layout(request: str = "", reply: str = "", **more: Any) -> Layout:
    return Layout(struct.Struct(">" + request), struct.Struct(">" + reply), **more)


LAYOUTS: Mapping[Command, Layout] = {
    Command.GET_CAPABILITY: _layout(reply="I", reply_fields=("capabilities",)),
    Command.INIT: _layout("I"),
    Command.SHUTDOWN: _layout(),
    Command.GET_TPMESTABLISHED: _layout(reply="B3x", reply_fields=("established",)),
    Command.SET_LOCALITY: _layout("B", is_padded=True),
    Command.HASH_START: _layout(),
    Command.HASH_DATA: _layout("I", max_request_data=MAX_HASH_BYTES),
    Command.HASH_END: _layout(),
    Command.CANCEL_TPM_CMD: _layout(),
    Command.STORE_VOLATILE: _layout(),
    Command.RESET_TPMESTABLISHED: _layout("B", is_padded=True),
    Command.GET_STATEBLOB: _layout("III", "III", max_reply_data=MAX_STATE_BYTES, reply_fields=("flags", "total")),
    Command.SET_STATEBLOB: _layout("III", max_request_data=MAX_STATE_BYTES),
    Command.STOP: _layout(),
    Command.GET_CONFIG: _layout(reply="I", reply_fields=("flags",)),
    Command.SET_DATAFD: _layout(),
    Command.SET_BUFFERSIZE: _layout("I", "III", reply_fields=("size", "min_size", "max_size")),
    Command.GET_INFO: _layout("QII", "II", max_reply_data=MAX_INFO_BYTES, reply_fields=("total",)),
    Command.LOCK_STORAGE: _layout("I"),
}
PLAIN_COMMANDS = frozenset(command for command, layout in LAYOUTS.items() if layout.request.size == 0)
"""Commands without a body."""

U32_END = 1 << 32
_COMMANDS = {int(command): command for command in Command}


def check_below(what: str, value: int, end: int) -> None:
    """Raise ProtocolError unless 0 <= value < end."""
    if not 0 <= value < end:
        raise ProtocolError(f"{what} is {value}; 0 to {end - 1} are allowed")


def check_size(what: str, data: bytes, most: int) -> None:
    """Raise ProtocolError when there is too much data."""
    if len(data) > most:
        raise ProtocolError(f"{what} has {len(data)} bytes of data; {most} are allowed")


@dataclass(frozen=True, slots=True)
class Plain:
    """A request without a body; `command` is one of PLAIN_COMMANDS."""

    command: Command

    def __post_init__(self) -> None:
        if self.command not in PLAIN_COMMANDS:
            raise ProtocolError(f"{self.command.name} has a body")


@dataclass(frozen=True, slots=True)
class Init:
    """Power the TPM on, off first if need be. Flags (u32): InitFlags, and bits that have no meaning yet."""

    command: ClassVar[Command] = Command.INIT
    flags: int

    def __post_init__(self) -> None:
        check_below("INIT flags", self.flags, U32_END)


@dataclass(frozen=True, slots=True)
class SetLocality:
    """Locality (0 to 4) of the plain commands that follow on the data channel."""

    command: ClassVar[Command] = Command.SET_LOCALITY
    locality: int

    def __post_init__(self) -> None:
        check_below("SET_LOCALITY locality", self.locality, MAX_LOCALITY + 1)


@dataclass(frozen=True, slots=True)
class ResetEstablished:
    """Clear the established bit, from a locality (0 to 4)."""

    command: ClassVar[Command] = Command.RESET_TPMESTABLISHED
    locality: int

    def __post_init__(self) -> None:
        check_below("RESET_TPMESTABLISHED locality", self.locality, MAX_LOCALITY + 1)


@dataclass(frozen=True, slots=True)
class HashData:
    """Bytes of the dynamic launch measurement, 0 to MAX_HASH_BYTES."""

    command: ClassVar[Command] = Command.HASH_DATA
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_size("HASH_DATA", self.data, MAX_HASH_BYTES)


@dataclass(frozen=True, slots=True)
class GetStateBlob:
    """Hand out one kind of state from an offset on. Flags (u32): StateFlags."""

    command: ClassVar[Command] = Command.GET_STATEBLOB
    flags: int
    kind: StateKind
    offset: int

    def __post_init__(self) -> None:
        check_below("GET_STATEBLOB flags", self.flags, U32_END)
        check_below("GET_STATEBLOB offset", self.offset, U32_END)


@dataclass(frozen=True, slots=True)
class SetStateBlob:
    """Take one kind of state, 0 to MAX_STATE_BYTES bytes. Flags (u32): StateFlags."""

    command: ClassVar[Command] = Command.SET_STATEBLOB
    flags: int
    kind: StateKind
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_below("SET_STATEBLOB flags", self.flags, U32_END)
        check_size("SET_STATEBLOB", self.data, MAX_STATE_BYTES)


@dataclass(frozen=True, slots=True)
class SetBufferSize:
    """Set the size of the TPM's command buffer, bytes; 0 only asks."""

    command: ClassVar[Command] = Command.SET_BUFFERSIZE
    size: int

    def __post_init__(self) -> None:
        check_below("SET_BUFFERSIZE size", self.size, U32_END)


@dataclass(frozen=True, slots=True)
class GetInfo:
    """Hand out JSON about the TPM from an offset on. Flags (u64): what about (TPMLIB_INFO_*)."""

    command: ClassVar[Command] = Command.GET_INFO
    flags: int
    offset: int

    def __post_init__(self) -> None:
        check_below("GET_INFO flags", self.flags, 1 << 64)
        check_below("GET_INFO offset", self.offset, U32_END)


@dataclass(frozen=True, slots=True)
class LockStorage:
    """Lock the storage again after a migration that failed; a retry every 10 ms."""

    command: ClassVar[Command] = Command.LOCK_STORAGE
    retries: int

    def __post_init__(self) -> None:
        check_below("LOCK_STORAGE retries", self.retries, U32_END)


Request = (
    Plain
    | Init
    | SetLocality
    | ResetEstablished
    | HashData
    | GetStateBlob
    | SetStateBlob
    | SetBufferSize
    | GetInfo
    | LockStorage
)


def encode_request(request: Request, *, padding: bytes = b"") -> bytes:
    """Return the bytes of a request.

    Args:
        padding: 3 bytes to send after a body of one byte, as QEMU does; ignored for other requests.
    """
    layout = LAYOUTS[request.command]
    match request:
        case Plain():
            body = b""
        case Init():
            body = layout.request.pack(request.flags)
        case SetLocality() | ResetEstablished():
            body = layout.request.pack(request.locality) + padding
        case HashData():
            body = layout.request.pack(len(request.data)) + request.data
        case GetStateBlob():
            body = layout.request.pack(request.flags, request.kind, request.offset)
        case SetStateBlob():
            body = layout.request.pack(request.flags, request.kind, len(request.data)) + request.data
        case SetBufferSize():
            body = layout.request.pack(request.size)
        case GetInfo():
            body = layout.request.pack(request.flags, request.offset, 0)
        case _:
            body = layout.request.pack(request.retries)
    return request.command.to_bytes(HEAD_BYTES, "big") + body


def known_command(number: int) -> Command | None:
    """Return the command with this number."""
    return _COMMANDS.get(number)


def command_of(head: bytes) -> Command | None:
    """Return the command of a request from its first bytes (7 are enough); None when it is unknown or too short.

    Up to 3 bytes of padding of the request before may stand in front: see `emulator`.
    """
    for at in range(len(head) - HEAD_BYTES + 1)[:4]:
        if head[at + 3] != 0:
            return known_command(int.from_bytes(head[at : at + HEAD_BYTES], "big"))
    return None
