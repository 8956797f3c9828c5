"""The guest port's codec takes exactly its own messages, and whole requests and answers in them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from tests.unit.wire.port_examples import PORT_EXAMPLES, SESSION, tpm_command, tpm_response
from vtpm.errors import ProtocolError
from vtpm.tpm.types import StateKind
from vtpm.wire import guest_port as gp
from vtpm.wire.emulator import Command, Plain, SetStateBlob
from vtpm.wire.guest_port import Direction, decode_message, encode_message

HEAD = gp.HEADER.size


def direction_of(message: Any) -> Direction:
    return Direction.TO_RELAY if encode_message(message)[1] & 0x80 else Direction.TO_VM


@pytest.mark.parametrize("message", PORT_EXAMPLES.values(), ids=PORT_EXAMPLES)
class TestEveryMessage:
    def test_comes_back_when_decoded_from_its_own_side_alone(self, message: Any) -> None:
        body, direction = encode_message(message), direction_of(message)
        assert len(body) <= gp.MAX_BODY_BYTES
        assert decode_message(body, direction) == message
        (other,) = set(Direction) - {direction}
        with pytest.raises(ProtocolError, match="unknown from"):
            decode_message(body, other)

    def test_is_refused_when_the_header_differs(self, message: Any) -> None:
        body, direction = encode_message(message), direction_of(message)
        for at, value, why in ((0, 2, "version 2"), (1, 0x7F, "0x7f"), (2, 1, "reserved"), (3, 1, "reserved")):
            bad = bytearray(body)
            bad[at] = value
            with pytest.raises(ProtocolError, match=why):
                decode_message(bytes(bad), direction)
        has_connection = hasattr(message, "connection")
        with pytest.raises(ProtocolError, match="a connection where it must not"):
            decode_message(body[:4] + (b"\0\0\0\0" if has_connection else b"\0\0\0\1") + body[8:], direction)

    def test_is_refused_when_shorter_or_longer(self, message: Any) -> None:
        body, direction = encode_message(message), direction_of(message)
        # A reply alone has no length of its own: the relay knows what was asked.
        if isinstance(message, gp.Reply | gp.ReplyPart):
            return
        for bad in (*(body[:length] for length in range(HEAD + 40)[: len(body)]), body[:-1], body + b"\0"):
            with pytest.raises(ProtocolError):
                decode_message(bad, direction)

    def test_no_command_shows_when_printed(self, message: Any) -> None:
        if hasattr(message, "data") and isinstance(message.data, bytes):
            assert repr(message.data) not in repr(message)


def test_all_types_have_an_example_when_counted() -> None:
    assert {encode_message(message)[1] for message in PORT_EXAMPLES.values()} == {*range(1, 8), *range(0x81, 0x88)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hello", {"session": b"short"}),
        ("hello", {"locality": 5}),
        ("open", {"connection": 0}),
        ("close", {"connection": gp.MAX_CONNECTION + 1}),
        ("control", {"request": Plain(Command.SET_DATAFD)}),
        ("control", {"request": SetStateBlob(2, StateKind.PERMANENT, bytes(gp.MAX_PIECE_BYTES + 1))}),
        ("datafd", {"data": 0}),
        ("command", {"data": tpm_command(b"cut")[:-1]}),
        ("command", {"data": tpm_command() + b"\0"}),
        ("command", {"locality": 5}),
        ("reply", {"data": bytes(3)}),
        ("reply", {"data": bytes(gp.MAX_REPLY_BYTES + 1)}),
        ("reply_part", {"data": b""}),
        ("reply_part", {"data": bytes(gp.MAX_PIECE_BYTES + 1)}),
        ("response", {"data": tpm_response(b"cut")[:-1]}),
        ("response", {"data": b""}),
        ("ended", {"status": 256}),
    ],
)
def test_message_is_not_sent_when_out_of_bounds(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        encode_message(dataclasses.replace(PORT_EXAMPLES[name], **changes))


CONTROL = gp.HEADER.pack(gp.PORT_VERSION, 0x04, 0, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(gp.MAX_BODY_BYTES + 1),
        CONTROL + b"\0\0\0\1\0\0\0\1",
        CONTROL + b"\0\0\0\1\0\0",
        CONTROL + b"\0\0\0\xff",
        CONTROL + b"\0\0\0\5\5",
        CONTROL + b"\0\0\0\x10",
        CONTROL + b"\0\0\0\x0d" + bytes(4) + b"\0\0\0\1" + b"\0\0\0\2x",
        CONTROL + b"\0\0\0\x12" + bytes(12) + b"\0\0\0\1",
    ],
    ids=["empty", "too large", "two requests", "one and a half", "unknown", "locality 5", "SET_DATAFD", "half a state",
         "GET_INFO with its zero set"],
)  # fmt: skip
def test_body_is_refused_when_it_is_not_one_whole_request(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(body, Direction.TO_VM)


def test_reply_is_refused_when_too_large() -> None:
    body = encode_message(gp.Reply(1, bytes(4))) + bytes(gp.MAX_REPLY_BYTES)
    with pytest.raises(ProtocolError):
        decode_message(body, Direction.TO_RELAY)


def test_session_comes_back_when_ready() -> None:
    assert decode_message(encode_message(gp.Ready(SESSION)), Direction.TO_RELAY) == gp.Ready(SESSION)


@pytest.mark.parametrize(
    "size", [4, gp.MAX_REPLY_BYTES, gp.MAX_REPLY_BYTES + 1, gp.MAX_PIECE_BYTES + 3, 3 * gp.MAX_PIECE_BYTES]
)
def test_reply_is_cut_into_messages_that_can_be_sent_when_it_is_long(size: int) -> None:
    reply = os.urandom(size)
    messages = list(gp.reply_messages(4, reply))
    assert b"".join(one.data for one in messages) == reply
    assert [type(one) for one in messages] == [gp.ReplyPart] * (len(messages) - 1) + [gp.Reply]
    for one in messages:
        encode_message(one)
