"""The control channel of QEMU's TPM emulator backend: decoder of its request stream, and all else of the protocol.

Words and requests are made in `emulator_messages`, replies in `emulator_replies`, and both are had from here. Pure; may
be imported by everyone.

The bodies of SET_LOCALITY and RESET_TPMESTABLISHED are one byte long, and swtpm's own clients and tpm2-tss send one;
QEMU sends four, the last three being what its union holds: zeros or, for RESET_TPMESTABLISHED, whatever was on its
stack. Nothing on the wire says which it is. What helps: every command's number is below 256, so a request begins with
three zero bytes and a fourth that is not zero. After such a body the decoder looks at the next four bytes. If 1 to 3
bytes of padding come before the next request, the fourth byte is one of that request's three zeros; without padding it
is not zero. So it drops one byte at a time, three at most, while the fourth byte is zero. This holds for every cut of
the stream, for clients that wait for replies and for ones that do not, and without knowing how much padding is left.
The request itself is given out at its first byte of body: nobody waits for padding that may not come.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import MAX_LOCALITY, StateKind
from vtpm.wire.emulator_messages import (
    HEAD_BYTES,
    LAYOUTS,
    MAX_HASH_BYTES,
    MAX_INFO_BYTES,
    PLAIN_COMMANDS,
    Capability,
    Command,
    ConfigFlags,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    InitFlags,
    LockStorage,
    Plain,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    StateFlags,
    command_of,
    encode_request,
    known_command,
)
from vtpm.wire.emulator_replies import Reply, decode_reply, encode_reply, error_reply, is_whole_reply

__all__ = [
    "PLAIN_COMMANDS",
    "LAYOUTS",
    "MAX_HASH_BYTES",
    "MAX_INFO_BYTES",
    "Plain",
    "Capability",
    "Command",
    "ConfigFlags",
    "ControlDecoder",
    "GetInfo",
    "GetStateBlob",
    "HashData",
    "Init",
    "InitFlags",
    "LockStorage",
    "Malformed",
    "Reply",
    "Request",
    "ResetEstablished",
    "SetBufferSize",
    "SetLocality",
    "SetStateBlob",
    "StateFlags",
    "command_of",
    "decode_reply",
    "encode_reply",
    "encode_request",
    "error_reply",
    "is_whole_reply",
]

_PADDING_BYTES = 3
_KINDS = {int(kind): kind for kind in StateKind}


@dataclass(frozen=True, slots=True)
class Malformed:
    """A request that cannot be followed; answer `reply`.

    Fields: command_code (u32 as it came), result to answer, in_step, message (for logs: numbers, none of the peer's
    data). When not in step (an unknown command, whose body has no known end) the decoder drops all that comes until
    `replied`: the server answers and closes the connection.
    """

    command_code: int
    result: Rc12
    in_step: bool
    message: str

    @property
    def command(self) -> Command | None:
        """The command, if it is known."""
        return known_command(self.command_code)

    @property
    def reply(self) -> bytes:
        """The whole reply, as long as the client expects it."""
        return error_reply(self.command, self.result)


class ControlDecoder:
    """Turns the bytes of one control connection into requests. Never raises.

    Between calls it keeps less than one request, so less than MAX_STATE_BYTES + 16 bytes. What a request announces
    beyond its bound is dropped as it comes, and answered at once.

    Args:
        after: the last command that a predecessor took from this stream, if it did: its padding may still come.
    """

    def __init__(self, *, after: Command | None = None) -> None:
        self._buffer = bytearray()
        self._padding_due = _padding_after(after)
        self._drop_bytes = 0
        self._lost = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes kept that have not become a request."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Request | Malformed]:
        """Take the next bytes of the stream, in time linear in their number; return what is whole by them, in order."""
        found: list[Request | Malformed] = []
        if self._lost:
            return found
        dropped = min(self._drop_bytes, len(data))
        self._drop_bytes -= dropped
        self._buffer += memoryview(data)[dropped:]
        while (item := self._next()) is not None:
            found.append(item)
        return found

    def completes(self, data: bytes) -> bool:
        """Whether feeding these bytes would give a request, or its refusal. Changes nothing."""
        return bool(copy.deepcopy(self).feed(data))

    def replied(self) -> None:
        """Say that a reply has been sent. Only after an unknown command does it matter: see Malformed."""
        self._lost = False

    def _next(self) -> Request | Malformed | None:
        buffer = self._buffer
        while self._padding_due and len(buffer) >= HEAD_BYTES:
            if buffer[HEAD_BYTES - 1] != 0:
                self._padding_due = 0
            else:
                del buffer[0]
                self._padding_due -= 1
        if len(buffer) < HEAD_BYTES:
            return None
        code = int.from_bytes(buffer[:HEAD_BYTES], "big")
        command = known_command(code)
        if command is None:
            self._lost = True
            buffer.clear()
            return Malformed(code, Rc12.TPM_BAD_ORDINAL, False, f"control command {code} is not known")
        layout = LAYOUTS[command]
        fixed_bytes = HEAD_BYTES + layout.request.size
        if len(buffer) < fixed_bytes:
            return None
        fields = layout.request.unpack_from(buffer, HEAD_BYTES)
        data_bytes = fields[-1] if layout.max_request_data else 0
        if data_bytes > layout.max_request_data:
            return self._refuse_data(command, fixed_bytes, data_bytes)
        if len(buffer) < fixed_bytes + data_bytes:
            return None
        data = bytes(memoryview(buffer)[fixed_bytes : fixed_bytes + data_bytes])
        del buffer[: fixed_bytes + data_bytes]
        self._padding_due = _padding_after(command)
        return _request(command, fields, data)

    def _refuse_data(self, command: Command, fixed_bytes: int, data_bytes: int) -> Malformed:
        here = min(data_bytes, len(self._buffer) - fixed_bytes)
        del self._buffer[: fixed_bytes + here]
        self._drop_bytes = data_bytes - here
        most = LAYOUTS[command].max_request_data
        return _malformed(command, Rc12.TPM_SIZE, f"announces {data_bytes} bytes of data; {most} are allowed")


def _padding_after(command: Command | None) -> int:
    return _PADDING_BYTES if command and LAYOUTS[command].is_padded else 0


def _malformed(command: Command, result: Rc12, what: str) -> Malformed:
    return Malformed(int(command), result, True, f"{command.name} {what}")


def _request(command: Command, fields: tuple[int, ...], data: bytes) -> Request | Malformed:
    match command, fields:
        case Command.SET_LOCALITY | Command.RESET_TPMESTABLISHED, (locality,):
            if locality > MAX_LOCALITY:
                return _malformed(command, Rc12.TPM_BAD_LOCALITY, f"names locality {locality}; 0 to 4 are allowed")
            return SetLocality(locality) if command is Command.SET_LOCALITY else ResetEstablished(locality)
        case Command.GET_STATEBLOB | Command.SET_STATEBLOB, (flags, number, offset_or_length):
            kind = _KINDS.get(number)
            if kind is None:
                return _malformed(command, Rc12.TPM_BAD_PARAMETER, f"names the unknown kind of state {number}")
            if command is Command.GET_STATEBLOB:
                return GetStateBlob(flags, kind, offset_or_length)
            return SetStateBlob(flags, kind, data)
        case Command.INIT, (flags,):
            return Init(flags)
        case Command.HASH_DATA, _:
            return HashData(data)
        case Command.SET_BUFFERSIZE, (size,):
            return SetBufferSize(size)
        case Command.GET_INFO, (flags, offset, _):
            return GetInfo(flags, offset)
        case Command.LOCK_STORAGE, (retries,):
            return LockStorage(retries)
    return Plain(command)
