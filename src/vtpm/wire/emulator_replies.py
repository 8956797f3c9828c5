"""Replies of the control protocol, both ways; `emulator` hands all of it out. Pure.

Each reply is one `bytes`, to be sent in one write: cloud-hypervisor takes a reply in one read. The fields of a reply
have the names that LAYOUTS gives them. An error has all its command's fixed fields, zero: QEMU 7.2 reads them whatever
the result, and waits for ever where swtpm sends a result alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vtpm.errors import ProtocolError
from vtpm.wire.emulator_messages import (
    LAYOUTS,
    RESULT_BYTES,
    U32_END,
    Command,
    Layout,
    check_below,
    check_size,
    command_of,
)

_SUCCESS = bytes(RESULT_BYTES)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that came.

    Fields: command that it answers; result, u32; fields, by name, empty when the request failed; data of GET_STATEBLOB
    and GET_INFO.
    """

    command: Command
    result: int = 0
    fields: Mapping[str, int] = field(default_factory=dict)
    data: bytes = field(default=b"", repr=False)


def encode_reply(command: Command, result: int = 0, *, data: bytes = b"", **fields: int) -> bytes:
    """Return a whole reply.

    Args:
        result: u32; when it is not 0 there are neither fields nor data.
        data: of GET_STATEBLOB (to MAX_STATE_BYTES bytes) and GET_INFO (to MAX_INFO_BYTES).
        fields: as LAYOUTS names them: `capabilities` (GET_CAPABILITY); `established` (GET_TPMESTABLISHED, 0 or 1);
            `flags` and `total` (GET_STATEBLOB: from the offset on); `flags` (GET_CONFIG); `size`, `min_size` and
            `max_size` (SET_BUFFERSIZE); `total` (GET_INFO: of the whole text with a zero byte at its end, as swtpm's).
    Raises:
        ProtocolError: other fields, a number too large, too much data, or fields beside a result that is not 0.
    """
    layout = LAYOUTS[command]
    names = () if result else layout.reply_fields
    if set(fields) != set(names) or (data and result):
        raise ProtocolError(f"the reply to {command.name} with result {result} has other fields than {list(fields)}")
    if not 0 <= result < U32_END or any(not 0 <= value < U32_END for value in fields.values()):
        raise ProtocolError(f"the reply to {command.name} has a number outside 32 bits")
    if result:
        return result.to_bytes(RESULT_BYTES, "big") + bytes(layout.reply.size)
    check_size(f"the reply to {command.name}", data, min(layout.max_reply_data, fields.get("total", 0)))
    values = [fields[name] for name in names]
    if command is Command.GET_TPMESTABLISHED:
        values = [int(value != 0) for value in values]
    if layout.max_reply_data:
        values.append(len(data))
    return _SUCCESS + layout.reply.pack(*values) + data


def error_reply(request: Command | bytes | None, result: int) -> bytes:
    """Return the whole reply with which a request fails.

    Args:
        request: its command, its first bytes (see `command_of`), or None when it is unknown.
        result: u32, not zero.
    Raises:
        ProtocolError: the result is zero or no u32.
    """
    command = command_of(request) if isinstance(request, bytes) else request
    check_below("error result less 1", result - 1, U32_END - 1)
    return encode_reply(command, result) if command else result.to_bytes(RESULT_BYTES, "big")


def decode_reply(command: Command, data: bytes) -> Reply:
    """Read the whole reply to a request.

    A failure may be 4 bytes or have its reply's fixed fields, which then say nothing: swtpm sends now this, now that.

    Raises:
        ProtocolError: it is too short or too long, or has more data than its total.
    """
    size = _reply_bytes(command, data)
    if size is None or len(data) != size:
        raise ProtocolError(f"the reply to {command.name} has {len(data)} bytes, which is not what its fields say")
    result = int.from_bytes(data[:RESULT_BYTES], "big")
    if result:
        return Reply(command, result)
    layout = LAYOUTS[command]
    # A length of data, where there is one, comes last and has no name.
    fields = dict(zip(layout.reply_fields, layout.reply.unpack_from(data, RESULT_BYTES), strict=False))
    rest = data[_fixed_bytes(layout) :]
    check_size(f"the reply to {command.name}", rest, fields.get("total", 0))
    return Reply(command, result, fields, rest)


def is_whole_reply(command: Command, data: bytes) -> bool:
    """Whether all of a reply has come; for clients that read a stream. With too much it has; decode_reply refuses that.

    Raises:
        ProtocolError: it announces more data than a reply may have.
    """
    size = _reply_bytes(command, data)
    return size is not None and len(data) >= size


def _fixed_bytes(layout: Layout) -> int:
    return RESULT_BYTES + layout.reply.size


def _reply_bytes(command: Command, data: bytes) -> int | None:
    """Return the size of the reply that begins with these bytes; None when more must come first."""
    layout = LAYOUTS[command]
    fixed = _fixed_bytes(layout)
    if len(data) < RESULT_BYTES:
        return None
    if data[:RESULT_BYTES] != _SUCCESS:
        return fixed if len(data) > RESULT_BYTES else RESULT_BYTES
    if len(data) < fixed:
        return None
    if not layout.max_reply_data:
        return fixed
    length = int.from_bytes(data[fixed - 4 : fixed], "big")
    if length > layout.max_reply_data:
        raise ProtocolError(f"the reply to {command.name} announces {length} bytes, more than {layout.max_reply_data}")
    return fixed + length
