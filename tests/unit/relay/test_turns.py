"""What a relay carries, for whom, and in which order."""

from __future__ import annotations

import array
import socket

import pytest

from tests.support.relay import LoneRelay, journal_bytes
from tests.support.vtpmd import TIMEOUT_S
from tests.unit.wire.port_examples import tpm_command, tpm_response
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    GetStateBlob,
    Init,
    Plain,
    SetLocality,
    SetStateBlob,
    decode_reply,
    encode_reply,
    encode_request,
)
from vtpm.wire.guest_port import (
    Close,
    Closed,
    ConnectionKind,
    Control,
    DataFd,
    Ended,
    Hello,
    Note,
    Open,
    Power,
    Ready,
    Reply,
    Response,
    TpmRequest,
    reply_messages,
)
from vtpm.wire.instance_spec import RelayExit, Role

COMMAND = tpm_command(b"\0\x08")
RESPONSE = tpm_response(b"answer")
FAIL, BAD_ORDINAL, RETRY = 9, 10, 0x800
OK = encode_reply(Command.SET_DATAFD)


def data_client(relay: LoneRelay) -> tuple[socket.socket, int]:
    sock = relay.connect("data")
    opened = relay.port.receive(Open)
    assert opened.kind is ConnectionKind.DATA
    return sock, opened.connection


def control_client(relay: LoneRelay) -> tuple[socket.socket, int]:
    sock = relay.connect("control")
    opened = relay.port.receive(Open)
    assert opened.kind is ConnectionKind.CONTROL
    return sock, opened.connection


def offer(control: socket.socket) -> socket.socket:
    """Send SET_DATAFD and return the emulator's end."""
    data, theirs = socket.socketpair()
    data.settimeout(TIMEOUT_S)
    with theirs:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
        control.sendmsg([encode_request(Plain(Command.SET_DATAFD))], rights)
    return data


def emulator(relay: LoneRelay) -> tuple[socket.socket, socket.socket, DataFd]:
    control, _ = control_client(relay)
    data = offer(control)
    asked = relay.port.receive(DataFd)
    relay.port.send(Reply(asked.connection, OK))
    assert control.recv(64) == OK
    return control, data, asked


def test_nobody_is_accepted_when_the_vtpmd_is_not_ready() -> None:
    with LoneRelay() as relay:
        hello = relay.port.receive(Hello)
        assert (hello.tpm_version, hello.role, hello.powered) == (TpmVersion.V2_0, Role.FIRST, False)
        assert (hello.control, hello.data) == (0, 0)
        with relay.connect("data") as client:
            client.sendall(COMMAND)
            assert relay.port.is_silent()
            relay.port.send(Ready(hello.session))
            assert relay.port.receive(Open).kind is ConnectionKind.DATA


def test_commands_go_one_at_a_time_when_a_client_sends_ahead(relay: LoneRelay) -> None:
    client, connection = data_client(relay)
    with client:
        client.sendall(COMMAND + COMMAND + COMMAND[:5])
        for _ in range(2):
            assert relay.port.receive(TpmRequest) == TpmRequest(connection, None, COMMAND)
            assert relay.port.is_silent()
            relay.port.send(Response(connection, RESPONSE))
            assert client.recv(4096) == RESPONSE
        client.sendall(COMMAND[5:])
        assert relay.port.receive(TpmRequest).data == COMMAND


def test_prefix_is_taken_off_and_put_on_when_a_client_names_a_locality(relay: LoneRelay) -> None:
    client, connection = data_client(relay)
    with client:
        client.sendall(b"\0\0\0\x08\3" + len(COMMAND).to_bytes(4, "big") + COMMAND)
        assert relay.port.receive(TpmRequest) == TpmRequest(connection, 3, COMMAND)
        relay.port.send(Response(connection, RESPONSE))
        assert client.recv(4096) == len(RESPONSE).to_bytes(4, "big") + RESPONSE + bytes(4)


@pytest.mark.parametrize(
    ("bad", "code"), [(b"\x80\x01\0\0\x10\x01\0\0\0\0", 0x142), (b"\0\0\0\x08\5", 0x907)], ids=["size", "locality"]
)
def test_command_is_refused_by_the_relay_when_it_cannot_be_followed(relay: LoneRelay, bad: bytes, code: int) -> None:
    client, connection = data_client(relay)
    with client:
        client.sendall(bad)
        assert code.to_bytes(4, "big") in client.recv(64)
        assert client.recv(64) == b""
    assert relay.port.receive(Close).connection == connection


def test_request_is_refused_by_the_relay_when_it_does_not_go_over_the_port(relay: LoneRelay) -> None:
    control, _ = control_client(relay)
    with control:
        control.sendall(encode_request(Plain(Command.SET_DATAFD)))
        assert decode_reply(Command.SET_DATAFD, control.recv(64)).result == FAIL
        control.sendall(b"\0\0\0\xff")
        assert control.recv(64) == BAD_ORDINAL.to_bytes(4, "big")
        assert relay.port.is_silent()


def test_control_requests_go_one_at_a_time_when_a_client_sends_ahead(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control:
        control.sendall(encode_request(Init(1)) + encode_request(GetInfo(0, 3)))
        assert relay.port.receive(Control) == Control(connection, Init(1))
        assert relay.port.is_silent()
        relay.port.send(Reply(connection, encode_reply(Command.INIT)))
        assert control.recv(64) == bytes(4)
        assert relay.port.receive(Control).request == GetInfo(0, 3)
        reply = encode_reply(Command.GET_INFO, total=9, data=b"{}")
        relay.port.send(Reply(connection, reply))
        assert control.recv(64) == reply


def test_emulator_is_parked_when_the_vtpmd_has_taken_it_and_not_before(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control, offer(control) as data:
        asked = relay.port.receive(DataFd)
        assert asked.connection == connection
        assert relay.parked() == set()
        relay.port.send(Reply(connection, OK))
        assert control.recv(64) == OK
        assert relay.parked() == {"CONTROL", "DATA"}
        data.sendall(COMMAND)
        assert relay.port.receive(TpmRequest).connection == asked.data
        relay.port.send(Response(asked.data, RESPONSE))
        assert data.recv(64) == RESPONSE
    assert {relay.port.receive(Close).connection for _ in range(2)} == {connection, asked.data}
    relay.port.send(Closed(asked.data), Closed(connection))
    control_client(relay)[0].close()
    assert relay.parked() == set()


def test_emulator_is_not_attached_when_the_vtpmd_refuses_it(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control, offer(control) as data:
        asked = relay.port.receive(DataFd)
        relay.port.send(Closed(asked.data), Reply(connection, encode_reply(Command.SET_DATAFD, FAIL)))
        assert decode_reply(Command.SET_DATAFD, control.recv(64)).result == FAIL
        assert data.recv(64) == b""
        assert relay.port.receive(Close).connection == asked.data
        assert relay.parked() == set()


def test_second_clients_are_refused_when_one_uses_the_tpm(relay: LoneRelay) -> None:
    control, data, asked = emulator(relay)
    with control, data:
        with relay.connect("control") as second:
            second.sendall(encode_request(Plain(Command.GET_CAPABILITY)))
            assert decode_reply(Command.GET_CAPABILITY, second.recv(64)).result == RETRY
        with relay.connect("data") as second:
            second.sendall(COMMAND)
            assert second.recv(64).endswith(b"\x09\x22")
        assert {type(relay.port.receive(Note)) for _ in range(2)} == {Note}
        data.sendall(COMMAND)
        assert relay.port.receive(TpmRequest).connection == asked.data


def test_next_control_client_waits_when_the_vtpmd_still_works_for_the_last_one(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control:
        control.sendall(encode_request(Init(0)))
        relay.port.receive(Control)
        control.shutdown(socket.SHUT_RDWR)
    relay.port.send(Reply(connection, encode_reply(Command.INIT)))
    assert relay.port.receive(Close).connection == connection
    with relay.connect("control") as following:
        following.sendall(encode_request(Plain(Command.GET_CONFIG)))
        assert relay.port.is_silent()
        relay.port.send(Closed(connection))
        assert relay.port.receive(Open).kind is ConnectionKind.CONTROL
        assert relay.port.receive(Control).request == Plain(Command.GET_CONFIG)


def test_what_a_successor_must_know_is_in_the_journal_when_it_has_changed(relay: LoneRelay) -> None:
    control, data, asked = emulator(relay)
    with control, data:
        relay.port.send(Power(True))
        control.sendall(encode_request(SetLocality(3)))
        relay.port.receive(Control)
        relay.port.send(Reply(asked.connection, encode_reply(Command.SET_LOCALITY)))
        assert control.recv(64) == bytes(4)
        assert journal_bytes(relay.journals[0], 3)[1:] == b"\1\3"
        control.sendall(encode_request(SetLocality(4)))
        relay.port.receive(Control)
        relay.port.send(Reply(asked.connection, encode_reply(Command.SET_LOCALITY, FAIL)))
        assert decode_reply(Command.SET_LOCALITY, control.recv(64)).result == FAIL
        assert journal_bytes(relay.journals[0], 3)[1:] == b"\1\3"


@pytest.mark.parametrize("status", [0, 70, 12])
def test_relay_ends_as_the_vtpmd_says_when_it_has_ended(relay: LoneRelay, status: int) -> None:
    relay.port.send(Ended(status))
    assert relay.exit_status() == status


def test_relay_ends_when_the_virtual_machine_or_the_launcher_is_gone() -> None:
    with LoneRelay() as relay:
        relay.port.receive(Hello)
        relay.port.sock.shutdown(socket.SHUT_RDWR)
        assert relay.exit_status() == RelayExit.VM_GONE
    with LoneRelay() as relay:
        relay.make_ready()
        relay.let_launcher_go()
        assert relay.exit_status() == RelayExit.LAUNCHER_GONE


def test_long_state_goes_over_in_pieces_when_a_client_brings_it(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    state = bytes(range(256)) * 200
    with control:
        control.sendall(encode_request(SetStateBlob(2, StateKind.PERMANENT, state)))
        came = b""
        while len(came) < len(state):
            request = relay.port.receive(Control).request
            assert isinstance(request, SetStateBlob)
            assert (request.flags, request.kind) == (2, StateKind.PERMANENT)
            came += request.data
            relay.port.send(Reply(connection, encode_reply(Command.SET_STATEBLOB)))
        assert came == state
        assert decode_reply(Command.SET_STATEBLOB, control.recv(64)).result == 0


def test_rest_of_a_long_state_stays_when_a_piece_is_refused(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control:
        control.sendall(encode_request(SetStateBlob(2, StateKind.PERMANENT, bytes(40_000))))
        relay.port.receive(Control)
        relay.port.send(Reply(connection, encode_reply(Command.SET_STATEBLOB, FAIL)))
        assert decode_reply(Command.SET_STATEBLOB, control.recv(64)).result == FAIL
        assert relay.port.is_silent()


def test_long_state_comes_whole_when_the_vtpmd_hands_it_out(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    reply = encode_reply(Command.GET_STATEBLOB, flags=2, total=50_000, data=bytes(50_000))
    with control:
        control.sendall(encode_request(GetStateBlob(1, StateKind.PERMANENT, 0)))
        relay.port.receive(Control)
        for message in reply_messages(connection, reply):
            relay.port.send(message)
        came = b""
        while len(came) < len(reply):
            came += control.recv(65536)
        assert came == reply
