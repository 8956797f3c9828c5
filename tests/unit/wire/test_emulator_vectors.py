"""The control protocol is spoken as it always has been, and as QEMU 7.2 speaks it."""

from __future__ import annotations

import json

import pytest

from tests.unit.wire.emulator_examples import REQUESTS, VECTOR_DIR, VECTORS
from vtpm.tpm.types import StateKind
from vtpm.wire.emulator import (
    Command,
    ControlDecoder,
    GetStateBlob,
    Init,
    Malformed,
    Plain,
    Request,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    decode_reply,
    encode_reply,
    encode_request,
    is_whole_reply,
)
from vtpm.wire.tpm_stream import BadCommand, CommandFramer

SESSIONS = json.loads((VECTOR_DIR / "qemu_7_2_v1.json").read_text())["sessions"]


def _start_up(size: int) -> list[Request]:
    # Realizing the device, then resetting it: QEMU asks for the size, stops, sets it, powers on.
    return [
        Plain(Command.STOP),
        SetBufferSize(0),
        Plain(Command.STOP),
        SetBufferSize(size),
        Init(0),
    ]


def _boot_reset_save(size: int, resets: int) -> list[Request]:
    return [
        Plain(Command.SET_DATAFD),
        Plain(Command.GET_CAPABILITY),
        *_start_up(size),
        Plain(Command.GET_TPMESTABLISHED),
        SetLocality(0),
        *(_start_up(size) * resets),
        *(GetStateBlob(1, kind, 0) for kind in StateKind),
        Plain(Command.SHUTDOWN),
    ]


EXPECTED: dict[str, list[Request]] = {
    "tis_2_0_boot_reset_save": _boot_reset_save(4096, resets=2),
    # Not satisfied with empty answers, the firmware resets the machine once more.
    "tis_1_2_boot_reset_save": _boot_reset_save(4096, resets=3),
    "crb_2_0_boot_reset_save": _boot_reset_save(3968, resets=2),
    "tis_2_0_incoming": [
        Plain(Command.SET_DATAFD),
        Plain(Command.GET_CAPABILITY),
        *_start_up(4096)[:-1],
        Plain(Command.STOP),
        *(SetStateBlob(0, kind, b"abc") for kind in StateKind),
        Init(1),
    ],
}


def _reads(session: str, channel: str) -> list[bytes]:
    return [bytes.fromhex(read) for name, read in SESSIONS[session] if name == channel]


@pytest.mark.parametrize("name", REQUESTS)
def test_request_is_the_frozen_one_when_encoded_and_decoded(name: str) -> None:
    request, frozen = REQUESTS[name]
    assert encode_request(request) == frozen
    assert ControlDecoder().feed(frozen) == [request]


@pytest.mark.parametrize("name", VECTORS["replies"])
def test_reply_is_the_frozen_one_when_encoded_and_decoded(name: str) -> None:
    command_name, result, fields, data, frozen_hex = VECTORS["replies"][name]
    command, frozen = Command[command_name], bytes.fromhex(frozen_hex)
    assert encode_reply(command, result, data=bytes.fromhex(data), **fields) == frozen
    reply = decode_reply(command, frozen)
    assert (reply.command, reply.result, reply.fields, reply.data) == (command, result, fields, bytes.fromhex(data))
    assert is_whole_reply(command, frozen)


@pytest.mark.parametrize("section", ["requests", "replies"])
def test_vectors_cover_every_command_when_counted(section: str) -> None:
    assert {Command[vector[0]] for vector in VECTORS[section].values()} == set(Command)


@pytest.mark.parametrize("session", SESSIONS)
def test_requests_are_understood_when_qemu_sends_them(session: str) -> None:
    decoder = ControlDecoder()
    found: list[Request | Malformed] = []
    for read in _reads(session, "control"):
        items = decoder.feed(read)
        assert len(items) == 1, "QEMU sends one request at a time, in one write each or in a header and its data"
        found += items
        decoder.replied()
    assert found == EXPECTED[session]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 1 << 20])
@pytest.mark.parametrize("session", SESSIONS)
def test_requests_are_understood_when_qemus_bytes_are_cut_anywhere(session: str, piece_bytes: int) -> None:
    stream = b"".join(_reads(session, "control"))
    decoder = ControlDecoder()
    found = []
    for at in range(0, len(stream), piece_bytes):
        for item in decoder.feed(stream[at : at + piece_bytes]):
            found.append(item)
            decoder.replied()
    assert found == EXPECTED[session]


@pytest.mark.parametrize("session", SESSIONS)
def test_commands_come_whole_when_qemu_sends_them(session: str) -> None:
    framer = CommandFramer(4096)
    for read in _reads(session, "data"):
        (item,) = framer.feed(read)
        assert not isinstance(item, BadCommand)
        assert (item.data, item.locality, item.prefixed) == (read, None, False)
