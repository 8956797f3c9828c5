"""The manager link's codec takes exactly its own messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.unit.wire.link_examples import LINK_EXAMPLES
from vtpm.errors import ProtocolError
from vtpm.tpm.types import MAX_STATE_BYTES, Startup, StateKind
from vtpm.wire import manager_link as ml
from vtpm.wire.manager_link import Direction, decode_message, encode_message


def direction_of(message: Any) -> Direction:
    return Direction.TO_MANAGER if encode_message(message)[1] & 0x80 else Direction.TO_INSTANCE


def other(direction: Direction) -> Direction:
    return Direction.TO_MANAGER if direction is Direction.TO_INSTANCE else Direction.TO_INSTANCE


@pytest.mark.parametrize("message", LINK_EXAMPLES.values(), ids=LINK_EXAMPLES)
class TestEveryMessage:
    def test_comes_back_when_decoded_from_its_own_side_alone(self, message: Any) -> None:
        body, direction = encode_message(message), direction_of(message)
        assert decode_message(body, direction) == message
        with pytest.raises(ProtocolError, match="unknown from"):
            decode_message(body, other(direction))

    def test_is_refused_when_shorter_or_longer(self, message: Any) -> None:
        body, direction = encode_message(message), direction_of(message)
        data = getattr(message, "data", b"")
        for length in range(len(body) - len(data) + (1 if data else 0)):
            with pytest.raises(ProtocolError):
                decode_message(body[:length], direction)
        if not data:
            with pytest.raises(ProtocolError, match="1 bytes too many"):
                decode_message(body + b"\0", direction)

    def test_is_refused_when_the_header_differs(self, message: Any) -> None:
        body, direction = encode_message(message), direction_of(message)
        for at, value, why in ((0, 2, "version 2"), (1, 0x7F, "0x7f"), (2, 1, "reserved"), (3, 1, "reserved")):
            bad = bytearray(body)
            bad[at] = value
            with pytest.raises(ProtocolError, match=why):
                decode_message(bytes(bad), direction)
        has_seq = hasattr(message, "seq")
        with pytest.raises(ProtocolError, match="sequence number"):
            decode_message(body[:4] + (b"\0\0\0\0" if has_seq else b"\0\0\0\1") + body[8:], direction)

    def test_no_secret_shows_when_printed(self, message: Any) -> None:
        for name in ("data", "permit_id"):
            if hasattr(message, name):
                assert repr(getattr(message, name)) not in repr(message)


def test_all_types_have_an_example_when_counted() -> None:
    assert {encode_message(message)[1] for message in LINK_EXAMPLES.values()} == {*range(1, 16), *range(0x81, 0x8F)}


BAD_VALUES = [
    ("hello", {"session": b"short"}),
    ("power_on", {"seq": 0}),
    ("power_on", {"seq": 2**32}),
    ("power_on", {"startup": "later"}),
    ("state_chunk", {"data": b""}),
    ("state_chunk", {"data": bytes(ml.MAX_CHUNK_BYTES + 1)}),
    ("state_chunk", {"total": MAX_STATE_BYTES + 1}),
    ("state_chunk", {"offset": -1}),
    ("state_end", {"digest": bytes(31)}),
    ("permit", {"permit_id": bytes(17)}),
    ("save_begin", {"kind": 4}),
    ("client_changed", {"pid": 2**32}),
    ("lockout_changed", {"locked": 2}),
    ("lockout_changed", {"since": ml.MAX_UNIX_TIME_S + 1}),
]


@pytest.mark.parametrize(("name", "changes"), BAD_VALUES)
def test_message_is_not_sent_when_out_of_bounds(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        encode_message(dataclasses.replace(LINK_EXAMPLES[name], **changes))


BAD_BODIES = {
    "empty": b"",
    "unknown startup": encode_message(ml.PowerOn(1, Startup.NONE))[:-1] + b"\3",
    "total too large": encode_message(ml.SaveBegin(1, StateKind.PERMANENT, 0, bytes(16), bytes(32)))[:9]
    + (MAX_STATE_BYTES + 1).to_bytes(4, "big")
    + bytes(48),
    "locked neither yes nor no": encode_message(ml.LockoutChanged(True, 0, 0, 0, 0))[:8] + b"\2" + bytes(20),
    "locked since a time that no date has": encode_message(ml.LockoutChanged(True, 0, 0, 0, 0))[:-8] + b"\xff" * 8,
    "no data": encode_message(ml.SaveChunk(1, 0, b"x"))[:-1],
    "too much data": encode_message(ml.SaveChunk(1, 0, b"x")) + bytes(ml.MAX_CHUNK_BYTES),
    "body too large": encode_message(ml.SaveChunk(1, 0, b"x")) + bytes(ml.MAX_BODY_BYTES),
    "text not UTF-8": encode_message(ml.Note("ab"))[:-2] + b"\xff\xfe",
    "text with a line end": encode_message(ml.Note("ab"))[:-2] + b"a\n",
    "text with an escape": encode_message(ml.Note("ab"))[:-2] + b"\x1b[",
    "text too long": encode_message(ml.Note(""))[:-2] + (513).to_bytes(2, "big") + b"a" * 513,
    "text cut": encode_message(ml.Note(""))[:-2] + b"\0\2a",
    "text without its length": encode_message(ml.Note(""))[:-1],
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_body_is_refused_when_out_of_bounds(body: bytes) -> None:
    for direction in Direction:
        with pytest.raises(ProtocolError):
            decode_message(body, direction)


def test_text_is_made_to_fit_when_sent() -> None:
    sent = ml.Note("two\nlines \x1b[31m \ud800" + "é" * 600)
    received = decode_message(encode_message(sent), Direction.TO_MANAGER)
    assert isinstance(received, ml.Note)
    assert received.message.startswith("two?lines ?[31m ?é")
    assert 511 <= len(received.message.encode()) <= 512


def test_largest_body_fits_when_all_fields_are_at_their_limits() -> None:
    chunk = ml.StateChunk(ml.MAX_SEQ, StateKind.SAVESTATE, MAX_STATE_BYTES, 0, bytes(ml.MAX_CHUNK_BYTES))
    assert len(encode_message(chunk)) <= ml.MAX_BODY_BYTES
