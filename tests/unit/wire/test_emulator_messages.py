"""Requests and replies of the control protocol: what exists is valid, and says nothing secret."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.wire.emulator_examples import ONE_BYTE_BODIES, REQUESTS, VECTORS
from vtpm.errors import ProtocolError
from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind
from vtpm.wire.emulator import (
    MAX_HASH_BYTES,
    MAX_INFO_BYTES,
    PLAIN_COMMANDS,
    Capability,
    Command,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Plain,
    Reply,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    command_of,
    decode_reply,
    encode_reply,
    encode_request,
    error_reply,
    is_whole_reply,
)

U32_END = 1 << 32
FIXED_REPLY_BYTES = {
    Command.GET_CAPABILITY: 8,
    Command.GET_TPMESTABLISHED: 8,
    Command.GET_STATEBLOB: 16,
    Command.GET_CONFIG: 8,
    Command.SET_BUFFERSIZE: 16,
    Command.GET_INFO: 12,
}
"""sizeof(resp) in tpm_ioctl.h, without data; 4 for all others."""

BAD_REQUESTS: dict[str, Callable[[], Request]] = {
    "plain command with a body": lambda: Plain(Command.INIT),
    "INIT flags": lambda: Init(U32_END),
    "negative INIT flags": lambda: Init(-1),
    "locality": lambda: SetLocality(5),
    "negative locality": lambda: SetLocality(-1),
    "locality of the reset": lambda: ResetEstablished(5),
    "data to hash": lambda: HashData(bytes(MAX_HASH_BYTES + 1)),
    "flags of a blob to get": lambda: GetStateBlob(U32_END, StateKind.PERMANENT, 0),
    "offset of a blob": lambda: GetStateBlob(0, StateKind.PERMANENT, U32_END),
    "flags of a blob to set": lambda: SetStateBlob(U32_END, StateKind.PERMANENT, b""),
    "blob": lambda: SetStateBlob(0, StateKind.PERMANENT, bytes(MAX_STATE_BYTES + 1)),
    "buffer size": lambda: SetBufferSize(U32_END),
    "flags of info": lambda: GetInfo(1 << 64, 0),
    "offset of info": lambda: GetInfo(0, U32_END),
    "retries": lambda: LockStorage(U32_END),
}

BAD_REPLIES: dict[str, Callable[[], bytes]] = {
    "field is missing": lambda: encode_reply(Command.GET_CAPABILITY),
    "field is another command's": lambda: encode_reply(Command.GET_CONFIG, capabilities=1),
    "field is one too many": lambda: encode_reply(Command.STOP, flags=1),
    "failure has a field": lambda: encode_reply(Command.GET_CONFIG, 9, flags=1),
    "failure has data": lambda: encode_reply(Command.GET_INFO, 9, data=b"x"),
    "result is too large": lambda: encode_reply(Command.STOP, U32_END),
    "result is negative": lambda: encode_reply(Command.STOP, -1),
    "field is too large": lambda: encode_reply(Command.GET_CONFIG, flags=U32_END),
    "field is negative": lambda: encode_reply(Command.GET_CONFIG, flags=-1),
    "data where none belongs": lambda: encode_reply(Command.STOP, data=b"x"),
    "data is more than the total": lambda: encode_reply(Command.GET_STATEBLOB, flags=0, total=1, data=b"xx"),
    "blob is too large": lambda: encode_reply(
        Command.GET_STATEBLOB, flags=0, total=U32_END - 1, data=bytes(MAX_STATE_BYTES + 1)
    ),
    "info is too large": lambda: encode_reply(
        Command.GET_INFO, total=MAX_INFO_BYTES + 1, data=bytes(MAX_INFO_BYTES + 1)
    ),
    "error of an unknown command is none": lambda: error_reply(None, 0),
    "error is none": lambda: error_reply(Command.STOP, 0),
    "error is too large": lambda: error_reply(None, U32_END),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_request_is_refused_when_made_out_of_bounds(what: str) -> None:
    with pytest.raises(ProtocolError):
        BAD_REQUESTS[what]()


def test_largest_requests_are_made_when_at_their_bounds() -> None:
    assert len(encode_request(HashData(bytes(MAX_HASH_BYTES)))) == 8 + MAX_HASH_BYTES
    assert len(encode_request(SetStateBlob(0, StateKind.VOLATILE, bytes(MAX_STATE_BYTES)))) == 16 + MAX_STATE_BYTES


@pytest.mark.parametrize("name", REQUESTS)
def test_padding_follows_only_bodies_of_one_byte_when_asked_for(name: str) -> None:
    request, frozen = REQUESTS[name]
    expected = b"abc" if request.command in ONE_BYTE_BODIES else b""
    assert encode_request(request, padding=b"abc") == frozen + expected


@pytest.mark.parametrize("request_", [HashData(b"secret"), SetStateBlob(0, StateKind.PERMANENT, b"secret")])
def test_data_stays_out_of_repr_when_request_is_printed(request_: Request) -> None:
    assert "secret" not in repr(request_)


def test_data_stays_out_of_repr_when_reply_is_printed() -> None:
    assert "secret" not in repr(Reply(Command.GET_STATEBLOB, data=b"secret"))


def test_capabilities_are_those_of_tpm_ioctl_h_when_numbered() -> None:
    # Looked up in QEMU 7.2's header, in its order.
    names = """
        INIT SHUTDOWN GET_TPMESTABLISHED SET_LOCALITY HASHING CANCEL_TPM_CMD STORE_VOLATILE RESET_TPMESTABLISHED
        GET_STATEBLOB SET_STATEBLOB STOP GET_CONFIG SET_DATAFD SET_BUFFERSIZE GET_INFO SEND_COMMAND_HEADER LOCK_STORAGE
    """
    assert [(bit.name, bit.value) for bit in Capability] == [(name, 1 << i) for i, name in enumerate(names.split())]


def test_plain_commands_are_those_without_body_when_listed() -> None:
    assert {Command[vector[0]] for vector in VECTORS["requests"].values() if not vector[1]} == PLAIN_COMMANDS


@pytest.mark.parametrize("command", Command)
def test_failure_is_as_long_as_qemu_reads_when_encoded(command: Command) -> None:
    reply = encode_reply(command, Rc12.TPM_FAIL)
    assert reply == b"\0\0\0\x09" + bytes(FIXED_REPLY_BYTES.get(command, 4) - 4)
    assert reply == error_reply(command, Rc12.TPM_FAIL)
    assert reply == error_reply(command.to_bytes(4, "big"), Rc12.TPM_FAIL)


@pytest.mark.parametrize("head", [None, b"", b"\0\0\0", b"\0\0\0\x14", b"\0\0\1\1", bytes(64)])
def test_failure_is_a_result_alone_when_command_is_unknown(head: bytes | None) -> None:
    assert error_reply(head, Rc12.TPM_BAD_ORDINAL) == b"\0\0\0\x0a"


@pytest.mark.parametrize("what", BAD_REPLIES)
def test_reply_is_refused_when_encoded_out_of_bounds(what: str) -> None:
    with pytest.raises(ProtocolError):
        BAD_REPLIES[what]()


@pytest.mark.parametrize("established", [True, 1, 255])
def test_bit_is_one_when_established_is_any_truth(established: int) -> None:
    assert encode_reply(Command.GET_TPMESTABLISHED, established=established) == b"\0\0\0\0\1\0\0\0"


@pytest.mark.parametrize("command", Command)
def test_failure_is_read_when_it_is_short_or_long(command: Command) -> None:
    for reply in (b"\0\0\0\x0a", error_reply(command, 0x0A)):
        assert decode_reply(command, reply) == Reply(command, 0x0A)
        assert is_whole_reply(command, reply)


@pytest.mark.parametrize("name", VECTORS["replies"])
def test_reply_is_refused_when_cut_or_too_long(name: str) -> None:
    command, frozen = Command[VECTORS["replies"][name][0]], bytes.fromhex(VECTORS["replies"][name][4])
    for cut in range(len(frozen)):
        if cut == 4 and any(frozen[:4]):
            continue  # a failure may be a result alone
        assert not is_whole_reply(command, frozen[:cut])
        with pytest.raises(ProtocolError):
            decode_reply(command, frozen[:cut])
    assert is_whole_reply(command, frozen + b"x")
    with pytest.raises(ProtocolError):
        decode_reply(command, frozen + b"x")


@pytest.mark.parametrize("command", [Command.GET_STATEBLOB, Command.GET_INFO])
def test_reply_is_refused_when_it_announces_too_much_data(command: Command) -> None:
    head = bytes(FIXED_REPLY_BYTES[command] - 4) + b"\xff" * 4
    with pytest.raises(ProtocolError):
        is_whole_reply(command, head)
    with pytest.raises(ProtocolError):
        decode_reply(command, head)


def test_reply_is_refused_when_it_has_more_data_than_its_total() -> None:
    with pytest.raises(ProtocolError):
        decode_reply(Command.GET_INFO, bytes.fromhex("00000000 00000001 00000002 7b7d"))


@pytest.mark.parametrize("name", REQUESTS)
def test_command_is_told_when_head_of_a_request_is_known(name: str) -> None:
    request, frozen = REQUESTS[name]
    for stop in range(4, len(frozen) + 1):
        assert command_of(frozen[:stop]) is request.command
    assert all(command_of(frozen[:stop]) is None for stop in range(4))


@pytest.mark.parametrize("padding", [b"\0", b"\0\0", b"\0\0\0", b"\1", b"\1\2", b"\1\2\3"])
def test_command_is_told_when_padding_stands_in_front(padding: bytes) -> None:
    assert command_of(padding + b"\0\0\0\x0e") is Command.STOP


@pytest.mark.parametrize("head", [b"\0\0\0\x14", b"\xff\xff\xff\xff", bytes(8), b"\1\0\0\1"])
def test_no_command_is_told_when_head_is_of_none(head: bytes) -> None:
    assert command_of(head) is None
