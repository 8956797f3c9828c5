"""What the data channel does when there is nothing to read, and when the peer is slow to read."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from vtpm.guest_link.data_link import DataLink, EmulatorDataLink
from vtpm.guest_link.journal import Journal, LinkState
from vtpm.launcher.slot import create_journal
from vtpm.wire.tpm_stream import TpmCommand

COMMAND = bytes.fromhex("8001 0000000c 0000017b 0010")


def test_no_turn_begins_in_the_journal_when_no_whole_command_has_come() -> None:
    memfd = create_journal()
    ours, theirs = socket.socketpair()
    with theirs:
        journal = Journal(memfd)
        link = EmulatorDataLink(ours, journal)
        assert list(link.receive()) == []
        assert (link.alive, link.waits_for_rest) == (True, False)
        theirs.send(COMMAND[:5])
        assert list(link.receive()) == []
        assert (link.alive, link.waits_for_rest) == (True, True)
        assert journal.state is LinkState.IDLE
        theirs.send(COMMAND[5:])
        assert list(link.receive()) == [TpmCommand(COMMAND, None, False)]
        assert (link.alive, link.waits_for_rest) == (True, False)
        assert journal.state is LinkState.BUSY
        link.close()
    os.close(memfd)


@pytest.mark.parametrize("came", [b"", COMMAND[:5]], ids=["nothing", "half a command"])
def test_link_is_dead_when_the_peer_hung_up_before_the_rest(came: bytes) -> None:
    memfd = create_journal()
    ours, theirs = socket.socketpair()
    link = EmulatorDataLink(ours, Journal(memfd))
    with theirs:
        theirs.send(came)
    assert list(link.receive()) == []
    assert (link.alive, link.waits_for_rest) == (False, False)
    link.close()
    os.close(memfd)


PREFIXED = bytes.fromhex("00000008 02 0000000c") + COMMAND


@pytest.mark.parametrize("form", [COMMAND, PREFIXED], ids=["plain", "prefixed"])
def test_one_answer_comes_when_a_command_is_cut_at_any_byte_and_the_process_is_another(form: bytes) -> None:
    memfd = create_journal()
    ours, theirs = socket.socketpair()
    whole = TpmCommand(COMMAND, None, False) if form is COMMAND else TpmCommand(COMMAND, 2, True)
    with ours, theirs:
        for cut in range(1, len(form)):
            theirs.sendall(form[:cut])
            assert list(EmulatorDataLink(ours, Journal(memfd)).receive()) == []
            successor = EmulatorDataLink(ours, Journal(memfd))
            successor.settle(b"failure")
            theirs.sendall(form[cut:])
            assert list(successor.receive()) == [whole]
            successor.respond(b"response", whole)
            response = b"response" if form is COMMAND else bytes.fromhex("00000008") + b"response" + bytes(4)
            assert theirs.recv(100) == response
    os.close(memfd)


def test_a_reply_arrives_whole_when_the_peer_is_slow_to_read() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reply = os.urandom(400_000)
    taken = bytearray()

    def read() -> None:
        while len(taken) < len(reply):
            taken.extend(theirs.recv(65536))

    with theirs:
        theirs.settimeout(10)
        link = DataLink(ours)
        reader = threading.Thread(target=read)
        reader.start()
        link.respond(reply, TpmCommand(COMMAND, None, False))
        reader.join(10)
        assert bytes(taken) == reply
        assert list(link.receive()) == []
        link.close()
