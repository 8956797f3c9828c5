"""What a host answers to one message of a peer: further messages, or an error; bytes in and out. Pure.

u8 0, then each message as u32 length and body; or u8 1, then code, message and next step of an error, each u16 length
and UTF-8. Big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vtpm.errors import ProtocolError, VtpmError
from vtpm.wire.service import error_of

MAX_MESSAGE_BYTES = 1024 * 1024 + 64 * 1024
MAX_MESSAGES = 8
MAX_ANSWER_BYTES = 2 * MAX_MESSAGE_BYTES
_MESSAGES, _ERROR = b"\x00", b"\x01"
_SIZE = struct.Struct(">I")
_TEXT = struct.Struct(">H")
_MAX_TEXT_BYTES = 2000
_TEXTS = 3


def encode_messages(messages: Sequence[bytes]) -> bytes:
    """Return an answer. Raises ProtocolError: there are too many, or one is out of bounds."""
    if len(messages) > MAX_MESSAGES or not all(0 < len(message) <= MAX_MESSAGE_BYTES for message in messages):
        raise ProtocolError("an answer has too many messages, or one out of bounds")
    answer = _MESSAGES + b"".join(_SIZE.pack(len(message)) + message for message in messages)
    if len(answer) > MAX_ANSWER_BYTES:
        raise ProtocolError(f"an answer has {len(answer)} bytes, at most {MAX_ANSWER_BYTES} go")
    return answer


def encode_error(error: VtpmError) -> bytes:
    """Return an answer that reports an error; long texts are cut."""
    texts = (error.code, error.message, error.next_step)
    parts = (text.encode(errors="replace")[:_MAX_TEXT_BYTES].decode(errors="ignore").encode() for text in texts)
    return _ERROR + b"".join(_TEXT.pack(len(part)) + part for part in parts)


def decode_answer(answer: bytes) -> list[bytes]:
    """Return the messages of an answer.

    Raises:
        VtpmError: the error that it reports, by its code.
        ProtocolError: it is neither, exactly.
    """
    if len(answer) > MAX_ANSWER_BYTES:
        raise ProtocolError(f"an answer has {len(answer)} bytes, at most {MAX_ANSWER_BYTES} go")
    if answer[:1] == _ERROR:
        raise _reported(answer)
    if answer[:1] != _MESSAGES:
        raise ProtocolError("an answer is neither messages nor an error")
    messages: list[bytes] = []
    at = 1
    while at < len(answer):
        size = int.from_bytes(answer[at : at + _SIZE.size], "big")
        message = answer[at + _SIZE.size : at + _SIZE.size + size]
        if not 0 < size <= MAX_MESSAGE_BYTES or len(message) != size or len(messages) == MAX_MESSAGES:
            raise ProtocolError("an answer's messages are cut off, too many or out of bounds")
        messages.append(message)
        at += _SIZE.size + size
    return messages


def _printable(text: str) -> str:
    """Return a text that does nothing to a terminal or a log."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _reported(answer: bytes) -> VtpmError:
    texts, at = [], 1
    for _ in range(_TEXTS):
        size = int.from_bytes(answer[at : at + _TEXT.size], "big")
        part = answer[at + _TEXT.size : at + _TEXT.size + size]
        if size > _MAX_TEXT_BYTES or len(answer) < at + _TEXT.size + size:
            raise ProtocolError("an error that a peer reports is cut off or too long")
        try:
            texts.append(_printable(part.decode()))
        except UnicodeDecodeError:
            raise ProtocolError("an error that a peer reports is not UTF-8") from None
        at += _TEXT.size + size
    if at != len(answer):
        raise ProtocolError("an error that a peer reports is followed by something else")
    code, message, next_step = texts
    return error_of(code, message, next_step)
