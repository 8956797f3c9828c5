"""The control protocol as this project reads it is the one that Debian's swtpm speaks."""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.control_driver import QEMU_PADDING, SEQUENCES, ControlClient, ask_all, debian_swtpm, differences
from vtpm.tpm.types import StateKind
from vtpm.wire.emulator import (
    LAYOUTS,
    Command,
    ControlDecoder,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Malformed,
    Plain,
    Reply,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    decode_reply,
)


@pytest.fixture
def swtpm() -> Iterator[Path]:
    with debian_swtpm() as path:
        yield path


@pytest.mark.parametrize("padding", [b"", QEMU_PADDING], ids=["as swtpm_ioctl sends", "as qemu sends"])
def test_every_answer_has_the_shape_of_the_table_when_swtpm_gives_it(swtpm: Path, padding: bytes) -> None:
    worked, failed = set(), set()
    for exchange in (one for answers in ask_all(swtpm, padding).values() for one in answers):
        layout, reply = LAYOUTS[exchange.request.command], exchange.reply
        fixed_bytes = 4 + layout.reply.size
        if reply.result == 0:
            worked.add(reply.command)
            assert tuple(reply.fields) == layout.reply_fields
            assert len(exchange.raw) == fixed_bytes + len(reply.data)
        else:
            failed.add(reply.command)
            # A bare result, or the fixed part of the reply.
            assert len(exchange.raw) in (4, fixed_bytes)
        assert exchange.reads == 1
    # 0.7.1 does not know LOCK_STORAGE; SET_DATAFD and SHUTDOWN are tested below.
    assert set(Command) - worked == {Command.LOCK_STORAGE, Command.SET_DATAFD, Command.SHUTDOWN}
    assert failed >= {Command.GET_TPMESTABLISHED, Command.GET_STATEBLOB, Command.SET_BUFFERSIZE, Command.GET_INFO}


def test_sequences_have_every_command_when_counted() -> None:
    asked = {request.command for requests in SEQUENCES.values() for request in requests}
    assert set(Command) - asked == {Command.SHUTDOWN}


def test_data_channel_is_taken_and_the_end_comes_when_asked_for(swtpm: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ControlClient(swtpm) as client:
        assert client.ask(Plain(Command.SET_DATAFD), descriptors=[theirs.fileno()]).reply.result == 0
        assert client.ask(Init(0)).reply.result == 0
        ours.settimeout(10)
        ours.sendall(bytes.fromhex("8001 0000000c 00000144 0000"))
        assert ours.recv(4096) == bytes.fromhex("8001 0000000a 00000000")
        assert client.ask(Plain(Command.SHUTDOWN)).raw == bytes(4)


MALFORMED = {
    "unknown command": (struct.pack(">I", 99), None, 0x00A),
    "locality above four": (struct.pack(">IB", 5, 5), Command.SET_LOCALITY, 0x03D),
    "locality above four, reset": (struct.pack(">IB", 11, 255), Command.RESET_TPMESTABLISHED, 0x03D),
}


@pytest.mark.parametrize(("data", "command", "result"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_has_swtpms_result_when_decoded_here(
    swtpm: Path, data: bytes, command: Command | None, result: int
) -> None:
    with ControlClient(swtpm) as client:
        client.ask(Init(0))
        theirs = client.ask_raw(data, 4)
    (ours,) = ControlDecoder().feed(data)
    assert isinstance(ours, Malformed)
    assert (ours.command, int(ours.result)) == (command, result)
    assert theirs == result.to_bytes(4, "big")
    assert decode_reply(command or Command.INIT, theirs).result == result


def test_nothing_differs_when_two_servers_are_the_same(swtpm: Path) -> None:
    with debian_swtpm() as other:
        assert differences(ask_all(swtpm), ask_all(other, QEMU_PADDING)) == []


def test_difference_is_told_when_one_answer_differs(swtpm: Path) -> None:
    theirs = ask_all(swtpm)
    ours = {name: list(exchanges) for name, exchanges in theirs.items()}
    failed = dataclasses.replace(ours["while it runs"][3], reply=Reply(Command.GET_CONFIG, 9))
    ours["while it runs"][3] = failed
    (line,) = differences(ours, theirs)
    assert "GET_CONFIG" in line
    assert "0x009" in line


_u32 = st.one_of(st.integers(0, 10), st.integers(0, 2**32 - 1))
_kind = st.sampled_from(StateKind)
_requests: st.SearchStrategy[Request] = st.one_of(
    # What ends swtpm, or needs a descriptor, is tested above.
    st.builds(Plain, st.sampled_from([c for c in Command if not LAYOUTS[c].request.size and c not in (3, 16)])),
    st.builds(Init, st.sampled_from([0, 1])),
    st.builds(SetLocality, st.integers(0, 4)),
    st.builds(ResetEstablished, st.integers(0, 4)),
    st.builds(HashData, st.binary(max_size=100)),
    st.builds(GetStateBlob, st.just(1), _kind, _u32),
    st.builds(SetStateBlob, st.just(0), _kind, st.binary(max_size=100)),
    st.builds(SetBufferSize, _u32),
    st.builds(GetInfo, st.integers(0, 7), _u32),
    st.builds(LockStorage, _u32),
)


@pytest.fixture(scope="module")
def shared_swtpm() -> Iterator[Path]:
    with debian_swtpm() as path:
        yield path


@effort.codec
@given(st.lists(_requests, min_size=1, max_size=10), st.sampled_from([b"", QEMU_PADDING]))
def test_every_answer_is_understood_when_requests_come_in_any_order(
    shared_swtpm: Path, requests: list[Request], padding: bytes
) -> None:
    with ControlClient(shared_swtpm) as client:
        for request in requests:
            exchange = client.ask(request, padding)
            assert exchange.reply.command is request.command
            assert exchange.reads == 1 or len(exchange.raw) > 4096
