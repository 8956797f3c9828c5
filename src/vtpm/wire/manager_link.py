"""Messages between a vtpmd (instance) and vtpm-managerd, each the body of one frame. Pure.

A body is u8 version, u8 type, u16 zero, u32 sequence number, payload; big-endian. Nothing in a message says which vTPM
it is about: that follows from the descriptor. docs/protocols.md has the tables. The state machines that put these
messages together are in `manager_link_peers`. May be imported by everyone.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vtpm.tpm.types import MAX_SEALED_BYTES, MAX_STATE_BYTES, Startup, StateKind, TpmVersion
from vtpm.wire.fields import choice, fixed, number, rest, text
from vtpm.wire.message_codec import MAX_NUMBER, Layout, MessageCodec, Numbered

LINK_VERSION = 1
MAX_CHUNK_BYTES = 48 * 1024
MAX_BODY_BYTES = MAX_CHUNK_BYTES + 64
MAX_SEQ = MAX_NUMBER
SESSION_BYTES = 16
PERMIT_BYTES = 16
DIGEST_BYTES = 32
MAX_CODE_BYTES = 32
MAX_TEXT_BYTES = 512
NO_PERMIT = bytes(PERMIT_BYTES)
MAX_UNIX_TIME_S = 253_402_300_799
"""The end of the year 9999: what a date can hold."""


class Direction(enum.Enum):
    """Who sent a message."""

    TO_INSTANCE = "manager to instance"
    TO_MANAGER = "instance to manager"


class LinkPower(enum.IntEnum):
    """Power of the TPM, as the instance reports it."""

    OFF = 0
    ON = 1
    FAILED = 2


class ShutdownMode(enum.IntEnum):
    """How an instance is to end its TPM."""

    ORDERLY = 0
    """TPM2_Shutdown first, unless the guest has sent it."""
    IMMEDIATE = 1


class ClientKind(enum.IntEnum):
    """Who uses the guest link."""

    NONE = 0
    EMULATOR = 1
    DATA = 2


class Retry(enum.IntEnum):
    """Whether asking again may help."""

    FINAL = 0
    LATER = 1


@dataclass(frozen=True)
class Hello:
    """Manager: a manager (perhaps a new one) is there. The instance answers Ready, then repeats what is open."""

    session: bytes


@dataclass(frozen=True)
class PowerOn:
    """Manager: power the TPM on, with state from a Load; answered by Done."""

    seq: int
    startup: Startup


@dataclass(frozen=True)
class Shutdown:
    """Manager: power the TPM off and end the process; answered by Done just before."""

    seq: int
    mode: ShutdownMode


@dataclass(frozen=True)
class StateChunk:
    """Manager: a part of one blob, in answer to Load `seq`; parts of a kind come in order."""

    seq: int
    kind: StateKind
    total: int
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class StateEnd:
    """Manager: that was all the state. `digest` is state_digest() over it."""

    seq: int
    digest: bytes


@dataclass(frozen=True)
class Permit:
    """Manager: there never was state; manufacture once, and save with this permit."""

    seq: int
    permit_id: bytes = field(repr=False)


@dataclass(frozen=True)
class LoadError:
    """Manager: there is state that cannot be given, or it cannot be read now."""

    seq: int
    retry: Retry
    code: str
    message: str


@dataclass(frozen=True)
class Saved:
    """Manager: save `seq` is durable."""

    seq: int


@dataclass(frozen=True)
class SaveError:
    """Manager: save `seq` is refused, or could not be made durable."""

    seq: int
    retry: Retry
    code: str
    message: str


@dataclass(frozen=True)
class AskLockout:
    """Manager: look again whether the TPM is locked; answered by LockoutChanged, changed or not."""


@dataclass(frozen=True)
class Departed:
    """Manager: the vTPM stands still here; its state follows in SealedParts, sealed for the host that it goes to."""

    seq: int
    total: int
    digest: bytes


@dataclass(frozen=True)
class SealedPart:
    """Manager: the next part of what Departed `seq` announced."""

    seq: int
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Returned:
    """Manager: the move of Return `seq` was taken back; the vTPM goes on here."""

    seq: int


@dataclass(frozen=True)
class MoveError:
    """Manager: Depart, Return or Arrive `seq` is refused, for good or for now."""

    seq: int
    retry: Retry
    code: str
    message: str


@dataclass(frozen=True)
class Activated:
    """Manager: the vTPM that came by Arrive `seq` may run here. May be said more than once."""

    seq: int


@dataclass(frozen=True)
class Ready:
    """Instance: answers Hello. `last_seq` is the highest sequence number it has used."""

    session: bytes
    tpm_version: TpmVersion
    power: LinkPower
    client: ClientKind
    engine_version: int
    last_seq: int


@dataclass(frozen=True)
class Load:
    """Instance: wants its state; answered by chunks and StateEnd, Permit or LoadError."""

    seq: int


@dataclass(frozen=True)
class SaveBegin:
    """Instance: a blob follows; 0 bytes means delete this kind. Complete when all bytes have come."""

    seq: int
    kind: StateKind
    total: int
    permit_id: bytes = field(repr=False)
    digest: bytes


@dataclass(frozen=True)
class SaveChunk:
    """Instance: the next part of the blob of save `seq`."""

    seq: int
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class PowerChanged:
    """Instance: the TPM's power changed; `why` is for people."""

    power: LinkPower
    why: str


@dataclass(frozen=True)
class ClientChanged:
    """Instance: who uses the guest link now; pid and uid as the kernel says, 0 if there is nobody."""

    client: ClientKind
    pid: int
    uid: int


@dataclass(frozen=True)
class Done:
    """Instance: answers PowerOn or Shutdown `seq`; an empty code means that it worked."""

    seq: int
    code: str
    message: str


@dataclass(frozen=True)
class Note:
    """Instance: something for the log, such as a refused second client."""

    message: str


@dataclass(frozen=True)
class LockoutChanged:
    """Instance: whether the TPM is in dictionary-attack lockout, and its numbers; see vtpm.tpm.lockout.

    `since` is the unix time, in seconds, at which the instance first saw it locked; 0 when it is not.
    """

    locked: bool
    failed_tries: int
    max_tries: int
    interval_s: int
    since: int


@dataclass(frozen=True)
class Depart:
    """Instance: QEMU wants the state for another host. The TPM stands still; its volatile state follows in MoveParts.

    Answered by Departed and SealedParts, or MoveError.
    """

    seq: int
    total: int
    digest: bytes


@dataclass(frozen=True)
class Return:
    """Instance: the guest goes on here after a Depart; answered by Returned or MoveError."""

    seq: int


@dataclass(frozen=True)
class Arrive:
    """Instance: QEMU has brought a sealed state, which follows in MoveParts; answered as Load, or by MoveError."""

    seq: int
    total: int
    digest: bytes


@dataclass(frozen=True)
class MovePart:
    """Instance: the next part of what Depart or Arrive `seq` announced."""

    seq: int
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Wanted:
    """Instance: the guest's first TPM command waits for the Activated of Arrive `seq`."""

    seq: int


MoveToInstance = Departed | SealedPart | Returned | MoveError | Activated
MoveToManager = Depart | Return | Arrive | MovePart | Wanted
ToInstance = (
    Hello
    | PowerOn
    | Shutdown
    | StateChunk
    | StateEnd
    | Permit
    | LoadError
    | Saved
    | SaveError
    | AskLockout
    | MoveToInstance
)
ToManager = (
    Ready | Load | SaveBegin | SaveChunk | PowerChanged | ClientChanged | Done | Note | LockoutChanged | MoveToManager
)
Message = ToInstance | ToManager


_KIND = choice("B", {kind: int(kind) for kind in StateKind})
_STARTUP = choice("B", {Startup.NONE: 0, Startup.CLEAR: 1, Startup.STATE: 2})
_VERSION = choice("B", {TpmVersion.V1_2: 12, TpmVersion.V2_0: 20})
_POWER = choice("B", {power: int(power) for power in LinkPower})
_CLIENT = choice("B", {client: int(client) for client in ClientKind})
_RETRY = choice("B", {retry: int(retry) for retry in Retry})
_MODE = choice("B", {mode: int(mode) for mode in ShutdownMode})
_SIZE = number("I", most=MAX_STATE_BYTES)
_SEALED_SIZE = number("I", most=MAX_SEALED_BYTES)
_U32 = number("I")
_BOOL = choice("B", {False: 0, True: 1})
_UNIX_TIME = number("Q", most=MAX_UNIX_TIME_S)
_CODE = text(MAX_CODE_BYTES)
_TEXT = text(MAX_TEXT_BYTES)
_DATA = rest(MAX_CHUNK_BYTES, least=1)

_LAYOUTS: Mapping[type[Any], Layout] = {
    Hello: Layout(0x01, Direction.TO_INSTANCE, {"session": fixed(SESSION_BYTES)}),
    PowerOn: Layout(0x02, Direction.TO_INSTANCE, {"startup": _STARTUP}),
    Shutdown: Layout(0x03, Direction.TO_INSTANCE, {"mode": _MODE}),
    StateChunk: Layout(
        0x04,
        Direction.TO_INSTANCE,
        {"kind": _KIND, "total": _SIZE, "offset": _SIZE, "data": _DATA},
    ),
    StateEnd: Layout(0x05, Direction.TO_INSTANCE, {"digest": fixed(DIGEST_BYTES)}),
    Permit: Layout(0x06, Direction.TO_INSTANCE, {"permit_id": fixed(PERMIT_BYTES)}),
    LoadError: Layout(0x07, Direction.TO_INSTANCE, {"retry": _RETRY, "code": _CODE, "message": _TEXT}),
    Saved: Layout(0x08, Direction.TO_INSTANCE, {}),
    SaveError: Layout(0x09, Direction.TO_INSTANCE, {"retry": _RETRY, "code": _CODE, "message": _TEXT}),
    AskLockout: Layout(0x0A, Direction.TO_INSTANCE, {}),
    Departed: Layout(0x0B, Direction.TO_INSTANCE, {"total": _SEALED_SIZE, "digest": fixed(DIGEST_BYTES)}),
    SealedPart: Layout(0x0C, Direction.TO_INSTANCE, {"offset": _SEALED_SIZE, "data": _DATA}),
    Returned: Layout(0x0D, Direction.TO_INSTANCE, {}),
    MoveError: Layout(0x0E, Direction.TO_INSTANCE, {"retry": _RETRY, "code": _CODE, "message": _TEXT}),
    Activated: Layout(0x0F, Direction.TO_INSTANCE, {}),
    Ready: Layout(
        0x81,
        Direction.TO_MANAGER,
        {
            "session": fixed(SESSION_BYTES),
            "tpm_version": _VERSION,
            "power": _POWER,
            "client": _CLIENT,
            "engine_version": _U32,
            "last_seq": _U32,
        },
    ),
    Load: Layout(0x82, Direction.TO_MANAGER, {}),
    SaveBegin: Layout(
        0x83,
        Direction.TO_MANAGER,
        {"kind": _KIND, "total": _SIZE, "permit_id": fixed(PERMIT_BYTES), "digest": fixed(DIGEST_BYTES)},
    ),
    SaveChunk: Layout(0x84, Direction.TO_MANAGER, {"offset": _SIZE, "data": _DATA}),
    PowerChanged: Layout(0x85, Direction.TO_MANAGER, {"power": _POWER, "why": _TEXT}),
    ClientChanged: Layout(0x86, Direction.TO_MANAGER, {"client": _CLIENT, "pid": _U32, "uid": _U32}),
    Done: Layout(0x87, Direction.TO_MANAGER, {"code": _CODE, "message": _TEXT}),
    Note: Layout(0x88, Direction.TO_MANAGER, {"message": _TEXT}),
    LockoutChanged: Layout(
        0x89,
        Direction.TO_MANAGER,
        {"locked": _BOOL, "failed_tries": _U32, "max_tries": _U32, "interval_s": _U32, "since": _UNIX_TIME},
    ),
    Depart: Layout(0x8A, Direction.TO_MANAGER, {"total": _SEALED_SIZE, "digest": fixed(DIGEST_BYTES)}),
    Return: Layout(0x8B, Direction.TO_MANAGER, {}),
    Arrive: Layout(0x8C, Direction.TO_MANAGER, {"total": _SEALED_SIZE, "digest": fixed(DIGEST_BYTES)}),
    MovePart: Layout(0x8D, Direction.TO_MANAGER, {"offset": _SEALED_SIZE, "data": _DATA}),
    Wanted: Layout(0x8E, Direction.TO_MANAGER, {}),
}
_CODEC = MessageCodec[Message](
    "a link message", LINK_VERSION, MAX_BODY_BYTES, Numbered("seq", "sequence number"), _LAYOUTS
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
