"""What the data channel does when there is nothing to read, and when the peer is slow to read."""

from __future__ import annotations

import os
import socket
import threading

from vtpm.guest_link.data_link import DataLink, EmulatorDataLink
from vtpm.guest_link.journal import Journal, LinkState
from vtpm.launcher.slot import create_journal
from vtpm.wire.tpm_stream import TpmCommand

COMMAND = bytes.fromhex("8001 0000000c 0000017b 0010")


def test_no_turn_begins_in_the_journal_when_nothing_has_come() -> None:
    memfd = create_journal()
    ours, theirs = socket.socketpair()
    with theirs:
        journal = Journal(memfd)
        link = EmulatorDataLink(ours, journal)
        assert list(link.receive()) == []
        assert link.alive
        assert journal.state is LinkState.IDLE
        theirs.send(COMMAND[:5])
        assert list(link.receive()) == []
        assert journal.state is LinkState.BUSY
        link.close()
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
