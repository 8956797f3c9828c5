"""The manager link speaks version 1 as it always has: a manager and an instance may be of different releases."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

from tests.unit.wire.link_examples import LINK_EXAMPLES
from vtpm.wire.framing import Deframer, encode_frame
from vtpm.wire.manager_link import MAX_BODY_BYTES, Direction, decode_message, encode_message

FOLDER = Path(__file__).parents[2] / "vectors" / "wire"
# Version 1 as it began, then what was added to it.
NAMES = ("manager_link_v1.json", "manager_link_v1_lockout.json", "manager_link_v1_moves.json")
FILES = [json.loads((FOLDER / name).read_text()) for name in NAMES]
VECTORS = {part: {name: value for file in FILES for name, value in file[part].items()} for part in ("bodies", "frames")}


@pytest.mark.parametrize("name", VECTORS["bodies"])
def test_body_is_the_frozen_one_when_encoded_and_decoded(name: str) -> None:
    body = bytes.fromhex(VECTORS["bodies"][name])
    direction = Direction.TO_MANAGER if body[1] & 0x80 else Direction.TO_INSTANCE
    assert encode_message(LINK_EXAMPLES[name]) == body
    assert decode_message(body, direction) == LINK_EXAMPLES[name]


@pytest.mark.parametrize("name", VECTORS["frames"])
def test_frame_is_the_frozen_one_when_encoded_and_found(name: str) -> None:
    frame, body = bytes.fromhex(VECTORS["frames"][name]), bytes.fromhex(VECTORS["bodies"][name])
    assert encode_frame(body) == frame
    assert Deframer(MAX_BODY_BYTES).feed(frame) == [body]


def test_vectors_cover_every_message_when_counted() -> None:
    assert set(VECTORS["bodies"]) == set(LINK_EXAMPLES)


def test_no_vector_stands_in_two_files_when_counted() -> None:
    for part in ("bodies", "frames"):
        assert sum(len(file[part]) for file in FILES) == len(VECTORS[part])


def test_vector_follows_the_documented_table_when_built_by_hand() -> None:
    # docs/protocols.md, StateChunk and frames, without any code of the project.
    body = struct.pack(">BBHI BII", 1, 0x04, 0, 3, 2, 1000, 500) + b"\xc0\xdb\xdc\xdd"
    assert VECTORS["bodies"]["state_chunk"] == body.hex()
    escapes = {0xC0: b"\xdb\xdc", 0xDB: b"\xdb\xdd"}
    checked = body + struct.pack(">I", zlib.crc32(body))
    escaped = b"".join(escapes.get(byte, bytes((byte,))) for byte in checked)
    assert VECTORS["frames"]["state_chunk"] == (b"\xc0" + escaped + b"\xc0").hex()
