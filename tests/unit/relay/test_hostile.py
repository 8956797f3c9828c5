"""A virtual machine that was taken over, and hostile clients: the relay says nothing unasked, and stays small."""

from __future__ import annotations

import os
import random
import socket
import time

import pytest

from tests.support.relay import LoneRelay
from tests.unit.relay.test_turns import COMMAND, FAIL, RESPONSE, control_client, data_client, emulator
from tests.unit.wire.port_examples import PORT_EXAMPLES, tpm_response
from vtpm.relay.relay import REFUSALS_AT_ONCE
from vtpm.tpm.types import MAX_SEALED_BYTES, StateKind
from vtpm.wire.emulator import Command, GetStateBlob, Plain, decode_reply, encode_reply, encode_request
from vtpm.wire.framing import encode_frame
from vtpm.wire.guest_port import (
    MAX_PIECE_BYTES,
    Closed,
    Control,
    Ended,
    Hello,
    Open,
    Power,
    Ready,
    Reply,
    ReplyPart,
    Response,
    TpmRequest,
    encode_message,
)
from vtpm.wire.instance_spec import RelayExit

MOST_GROWTH = 8 << 20
FLOOD_BYTES = 64 << 20
MOST_ACCEPTED = 100_000


def _silent(*socks: socket.socket) -> bool:
    for sock in socks:
        sock.setblocking(False)
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        finally:
            sock.settimeout(20)
        return False
    return True


def _settled(relay: LoneRelay) -> None:
    """Return when the relay has followed all that was sent: it answers what only it can answer."""
    with relay.connect("data") as second:
        second.sendall(COMMAND)
        assert second.recv(64)


def test_guest_hears_nothing_when_it_has_asked_nothing(relay: LoneRelay) -> None:
    control, data, asked = emulator(relay)
    with control, data:
        for _ in range(3):
            relay.port.send(
                Reply(asked.connection, bytes(4)),
                Response(asked.data, RESPONSE),
                Response(asked.connection, RESPONSE),
                Reply(asked.data, bytes(4)),
                Closed(asked.data + 1),
                Response(2**32 - 1, RESPONSE),
            )
        _settled(relay)
        assert _silent(control, data)
        # It goes on, and the next answer is to the next question.
        data.sendall(COMMAND)
        relay.port.await_one(TpmRequest)
        control.sendall(encode_request(Plain(Command.GET_CONFIG)))
        relay.port.await_one(Control)
        relay.port.send(Response(asked.data, tpm_response(b"due")))
        assert data.recv(4096) == tpm_response(b"due")
        relay.port.send(Response(asked.data, tpm_response(b"twice")))
        relay.port.send(Reply(asked.connection, encode_reply(Command.GET_CONFIG, flags=3)))
        assert decode_reply(Command.GET_CONFIG, control.recv(4096)).fields == {"flags": 3}
        _settled(relay)
        assert _silent(control, data)


@pytest.mark.parametrize(
    "answer", [bytes(4), bytes(9), bytes(64), b"\0\0\0\1" + bytes(60)], ids=["short", "long", "very long", "error"]
)
def test_request_fails_once_when_its_answer_is_no_reply_to_it(relay: LoneRelay, answer: bytes) -> None:
    control, connection = control_client(relay)
    with control:
        control.sendall(encode_request(Plain(Command.GET_CONFIG)))
        relay.port.receive(Control)
        relay.port.send(Reply(connection, answer))
        reply = control.recv(4096)
        assert reply == encode_reply(Command.GET_CONFIG, FAIL)
        assert _silent(control)


def test_error_has_its_fields_when_the_vtpmd_sends_a_bare_one(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control:
        control.sendall(encode_request(Plain(Command.GET_CONFIG)))
        relay.port.receive(Control)
        relay.port.send(Reply(connection, b"\0\0\0\x0a"))
        assert control.recv(4096) == b"\0\0\0\x0a" + bytes(4)


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(b"noise"),
        b"\xc0broken\xc0",
        encode_frame(encode_message(Ready(bytes(8)))),
        encode_frame(encode_message(Response(1, RESPONSE))),
        encode_frame(encode_message(PORT_EXAMPLES["hello"])),
        encode_frame(encode_message(PORT_EXAMPLES["command"])),
    ],
    ids=["noise", "CRC", "second READY", "unasked", "HELLO back", "command back"],
)
def test_relay_ends_itself_alone_when_there_is_no_end_of_what_no_vtpmd_says(relay: LoneRelay, frame: bytes) -> None:
    control, data, _ = emulator(relay)
    with control, data:
        relay.port.sock.sendall(frame * (REFUSALS_AT_ONCE - 4))
        _settled(relay)
        assert relay.process.poll() is None
        relay.port.sock.sendall(frame * 20)
        assert relay.exit_status() == RelayExit.BROKEN
        assert _silent(control, data)
        assert len(relay.log_lines()) < 30
        assert relay.parked() == {"CONTROL", "DATA"}


def test_answers_are_refused_when_they_come_before_ready() -> None:
    with LoneRelay() as relay:
        hello = relay.port.receive(Hello)
        relay.port.send(Power(True), Ready(bytes(8)), Response(1, RESPONSE), Closed(1))
        assert os.pread(relay.journals[0], 2, 0) == b"\0\0"
        with relay.connect("data") as client:
            client.sendall(COMMAND)
            assert relay.port.is_silent()
            relay.port.send(Ready(hello.session))
            assert relay.port.receive(Open)
            assert relay.port.receive(TpmRequest)


def test_relay_stays_small_when_a_frame_has_no_end(relay: LoneRelay) -> None:
    before = relay.resident_bytes()
    for _ in range(FLOOD_BYTES >> 16):
        relay.port.sock.sendall(b"x" * 65536)
    client, connection = data_client(relay)
    client.close()
    assert relay.resident_bytes() - before < MOST_GROWTH
    relay.port.sock.sendall(b"\xc0" + encode_frame(encode_message(Closed(connection))))
    assert relay.process.poll() is None


def test_relay_stays_small_and_idle_when_the_virtual_machine_does_not_read(relay: LoneRelay) -> None:
    before = relay.resident_bytes()
    # Each leads to OPEN and CLOSE, until the port takes no more: then they wait, and their queue is the kernel's.
    accepted = refused_in_a_row = 0
    idle_s = 1.0
    while refused_in_a_row < 30:
        assert accepted < MOST_ACCEPTED
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(str(relay.folder / "data"))
                accepted, refused_in_a_row = accepted + 1, 0
            except BlockingIOError:
                refused_in_a_row += 1
                before_s = relay.processor_s()
                time.sleep(0.01)
                idle_s = relay.processor_s() - before_s
    assert idle_s == 0
    assert relay.resident_bytes() - before < MOST_GROWTH
    relay.port.send(Ended(0))
    assert relay.exit_status() == 0


def test_relay_survives_or_ends_itself_when_it_is_told_anything(relay: LoneRelay) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    frames = [
        encode_frame(encode_message(message)) for message in PORT_EXAMPLES.values() if not isinstance(message, Ended)
    ]
    control, data, _ = emulator(relay)
    with control, data:
        try:
            for _ in range(300):
                noise = generator.randbytes(generator.randrange(60))
                frame = bytearray(generator.choice(frames) if generator.random() < 0.7 else noise)
                if frame and generator.random() < 0.3:
                    frame[generator.randrange(len(frame))] = generator.randrange(256)
                relay.port.sock.sendall(frame[: generator.randrange(1, 5000)])
        except OSError:
            assert relay.exit_status() == RelayExit.BROKEN
        assert _silent(control, data)
        if relay.process.poll() is None:
            relay.port.sock.sendall(b"\xc0" + encode_frame(encode_message(Ended(0))))
            assert relay.exit_status() in (0, RelayExit.BROKEN)
        assert relay.process.returncode in (0, RelayExit.BROKEN), relay.log_lines()


def test_parts_of_a_reply_are_refused_when_none_are_due(relay: LoneRelay) -> None:
    control, data, asked = emulator(relay)
    with control, data:
        for _ in range(REFUSALS_AT_ONCE + 2):
            relay.port.send(ReplyPart(asked.connection, b"unasked"))
        assert relay.exit_status() == RelayExit.BROKEN


def test_parts_of_a_reply_are_refused_when_they_are_more_than_a_state(relay: LoneRelay) -> None:
    control, connection = control_client(relay)
    with control:
        control.sendall(encode_request(GetStateBlob(1, StateKind.PERMANENT, 0)))
        relay.port.receive(Control)
        for _ in range(MAX_SEALED_BYTES // MAX_PIECE_BYTES + REFUSALS_AT_ONCE + 2):
            relay.port.send(ReplyPart(connection, bytes(MAX_PIECE_BYTES)))
        assert relay.exit_status() == RelayExit.BROKEN
