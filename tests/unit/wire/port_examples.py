"""One example and a Hypothesis strategy for every message of the guest port, for unit tests and fuzzing."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vtpm.tpm.headers import CommandHeader, ResponseHeader
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.wire import guest_port as gp
from vtpm.wire.emulator import (
    PLAIN_COMMANDS,
    Command,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Plain,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
)
from vtpm.wire.instance_spec import Role


def tpm_command(rest: bytes = b"") -> bytes:
    return CommandHeader(0x8001, 10 + len(rest), 0x17B).build() + rest


def tpm_response(rest: bytes = b"") -> bytes:
    return ResponseHeader(0x8001, 10 + len(rest), 0).build() + rest


SESSION = bytes(range(8))
PORT_EXAMPLES: dict[str, Any] = {
    "hello": gp.Hello(SESSION, TpmVersion.V1_2, Role.SUCCESSOR, True, 4, 1, 2, 2**32 - 1),
    "first": gp.Hello(SESSION, TpmVersion.V2_0, Role.FIRST),
    "open": gp.Open(3, gp.ConnectionKind.DATA, 1000),
    "close": gp.Close(gp.MAX_CONNECTION),
    "control": gp.Control(4, HashData(b"\xc0\xdb" * 2048)),
    "datafd": gp.DataFd(4, 5),
    "command": gp.TpmRequest(5, None, tpm_command(bytes(4086))),
    "prefixed": gp.TpmRequest(5, 3, tpm_command()),
    "note": gp.Note("a second client was refused"),
    "ready": gp.Ready(SESSION),
    "reply_part": gp.ReplyPart(4, bytes(gp.MAX_PIECE_BYTES)),
    "set_state": gp.Control(4, SetStateBlob(2, StateKind.PERMANENT, b"sealed")),
    "reply": gp.Reply(4, bytes(gp.MAX_REPLY_BYTES)),
    "response": gp.Response(5, tpm_response(bytes(4086))),
    "power": gp.Power(True),
    "closed": gp.Closed(5),
    "ended": gp.Ended(255),
}

_connection = st.integers(1, gp.MAX_CONNECTION)
_u32 = st.integers(0, 2**32 - 1)
_locality = st.integers(0, 4)
_session = st.binary(min_size=8, max_size=8)
_role = st.sampled_from(Role)
_payload = st.binary(max_size=200)
requests = st.one_of(
    st.sampled_from(sorted(PLAIN_COMMANDS - {Command.SET_DATAFD})).map(Plain),
    st.builds(Init, _u32),
    st.builds(SetLocality, _locality),
    st.builds(ResetEstablished, _locality),
    st.builds(HashData, _payload),
    st.builds(GetStateBlob, _u32, st.sampled_from(StateKind), _u32),
    st.builds(SetBufferSize, _u32),
    st.builds(GetInfo, st.integers(0, 2**64 - 1), _u32),
    st.builds(LockStorage, _u32),
)
to_vm = st.one_of(
    st.builds(
        gp.Hello,
        _session,
        st.sampled_from(TpmVersion),
        st.sampled_from(Role),
        st.booleans(),
        _locality,
        _u32,
        _u32,
        _u32,
    ),
    st.builds(gp.Open, _connection, st.sampled_from(gp.ConnectionKind), _u32),
    st.builds(gp.Close, _connection),
    st.builds(gp.Control, _connection, requests),
    st.builds(gp.DataFd, _connection, _connection),
    st.builds(gp.TpmRequest, _connection, st.one_of(st.none(), _locality), _payload.map(tpm_command)),
    st.builds(gp.Note, st.text(st.characters(exclude_categories=("C", "Z")), max_size=50)),
)
to_relay = st.one_of(
    st.builds(gp.Ready, _session),
    st.builds(gp.ReplyPart, _connection, st.binary(min_size=1, max_size=300)),
    st.builds(gp.Reply, _connection, st.binary(min_size=4, max_size=300)),
    st.builds(gp.Response, _connection, _payload.map(tpm_response)),
    st.builds(gp.Power, st.booleans()),
    st.builds(gp.Closed, _connection),
    st.builds(gp.Ended, st.integers(0, 255)),
)
