"""A journal tells a successor exactly what its predecessor had left to do, at whatever byte it was cut off."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from vtpm.guest_link.control_link import ControlLink
from vtpm.guest_link.data_link import EmulatorDataLink
from vtpm.guest_link.journal import (
    REPLY_AT,
    REPLY_BYTES,
    Journal,
    JournaledPower,
    LinkState,
)
from vtpm.launcher.slot import create_journal
from vtpm.wire.instance_spec import JOURNAL_BYTES

FAILURE = bytes.fromhex("80010000000a00000101")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = create_journal()
    yield fd
    os.close(fd)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


def _left_replying(journal: Journal, fd: int, reply: bytes, sent: int) -> None:
    """Leave the journal as an instance does that was killed after `sent` bytes of its reply."""
    journal.begin(b"request")
    peer, _peer = socket.socketpair()
    with peer, _peer:
        journal.reply(peer, reply, 1)
    os.lseek(fd, REPLY_AT + sent, os.SEEK_SET)
    os.pwrite(fd, bytes((LinkState.REPLYING,)), 0)


def test_facts_outlive_the_instance_that_wrote_them(memfd: int) -> None:
    first = Journal(memfd)
    first.power = JournaledPower.ON
    first.locality = 3
    first.begin(b"\0\0\0\x02rest")
    successor = Journal(memfd)
    assert (successor.power, successor.locality) == (JournaledPower.ON, 3)
    assert (successor.state, successor.request) == (LinkState.BUSY, b"\0\0\0\x02rest")


@pytest.mark.parametrize("sent", [0, 1, 9, 499, 500])
def test_successor_sends_exactly_the_rest_when_cut_off_in_a_reply(
    memfd: int, ends: tuple[socket.socket, socket.socket], sent: int
) -> None:
    reply = bytes(range(250)) * 2
    _left_replying(Journal(memfd), memfd, reply, sent)
    ours, theirs = ends
    link = EmulatorDataLink(ours, Journal(memfd))
    link.settle(FAILURE)
    ours.shutdown(socket.SHUT_WR)
    received = b"".join(iter(lambda: theirs.recv(4096), b""))
    assert received == reply[sent:]
    assert Journal(memfd).state is LinkState.IDLE


def test_successor_answers_failure_when_a_request_was_taken(
    memfd: int, ends: tuple[socket.socket, socket.socket]
) -> None:
    Journal(memfd).begin(b"")
    ours, theirs = ends
    EmulatorDataLink(ours, Journal(memfd)).settle(FAILURE)
    assert theirs.recv(100) == FAILURE
    assert Journal(memfd).state is LinkState.IDLE


def test_successor_answers_nothing_when_the_request_was_not_taken(
    memfd: int, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    theirs.send(bytes.fromhex("80010000000c0000017b0008"))
    Journal(memfd).begin(b"")
    link = EmulatorDataLink(ours, Journal(memfd))
    link.settle(FAILURE)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(100)
    assert len(link.receive()) == 1


def test_a_reply_is_whole_when_the_peer_reads_slowly(memfd: int, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours.setblocking(False)
    filler = 0
    with pytest.raises(BlockingIOError):
        while True:
            filler += ours.send(b"f" * 512)
    journal = Journal(memfd)
    journal.begin(b"")
    with pytest.raises(TimeoutError):
        journal.reply(ours, b"r" * REPLY_BYTES, 0.05)
    assert journal.state is LinkState.REPLYING
    left = journal.reply_left
    assert 0 < left <= REPLY_BYTES
    received = 0
    theirs.setblocking(False)
    while journal.state is LinkState.REPLYING:
        received += len(theirs.recv(65536))
        try:
            journal.send_rest(ours, 0.05)
        except TimeoutError:
            continue
    while received < filler + REPLY_BYTES:
        received += len(theirs.recv(65536))
    assert received == filler + REPLY_BYTES


def test_successor_gives_up_when_the_journal_was_cut_short_within_the_reply(
    memfd: int, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    _left_replying(Journal(memfd), memfd, b"r" * 300, 100)
    journal = Journal(memfd)
    os.ftruncate(memfd, REPLY_AT + 150)
    with pytest.raises(BrokenPipeError):
        journal.send_rest(ours, 1)
    assert theirs.recv(1000) == b"r" * 50


def test_a_reply_goes_on_when_the_peer_makes_room_for_it(memfd: int, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.setblocking(False)
    filler = 0
    with pytest.raises(BlockingIOError):
        while True:
            filler += ours.send(b"f" * 65536)
    received = bytearray()

    def read() -> None:
        while len(received) < filler + REPLY_BYTES:
            received.extend(theirs.recv(65536))

    reader = threading.Timer(0.05, read)
    reader.start()
    Journal(memfd).reply(ours, b"r" * REPLY_BYTES, 5)
    reader.join(5)
    assert received.endswith(b"r" * REPLY_BYTES)
    assert Journal(memfd).state is LinkState.IDLE


def test_nothing_is_left_of_a_turn_when_its_peer_is_gone(memfd: int) -> None:
    journal = Journal(memfd)
    journal.begin(b"request")
    journal.end()
    assert (journal.state, journal.request) == (LinkState.IDLE, b"request")
    journal.power = JournaledPower.ON
    journal.reset()
    assert (journal.state, journal.request, journal.power) == (LinkState.IDLE, b"", JournaledPower.OFF)


@pytest.mark.parametrize("content", [b"\xff" * JOURNAL_BYTES, os.urandom(JOURNAL_BYTES), bytes(JOURNAL_BYTES)])
def test_nothing_breaks_when_a_predecessor_wrote_rubbish(
    memfd: int, ends: tuple[socket.socket, socket.socket], content: bytes
) -> None:
    os.pwrite(memfd, content, 0)
    os.lseek(memfd, REPLY_AT + 17, os.SEEK_SET)
    journal = Journal(memfd)
    assert 0 <= journal.reply_left <= REPLY_BYTES
    assert 0 <= journal.locality <= 4
    assert len(journal.request) <= 64
    assert journal.state in set(LinkState)
    assert journal.power in set(JournaledPower)


def test_a_reply_too_long_is_refused_before_anything_is_sent(
    memfd: int, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    with pytest.raises(ValueError, match="does not fit"):
        Journal(memfd).reply(ours, bytes(REPLY_BYTES + 1), 1)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def test_long_reply_is_sent_whole_and_ends_its_turn(memfd: int, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    journal, reply = Journal(memfd), os.urandom(300_000)
    came = bytearray()

    def read() -> None:
        while len(came) < len(reply):
            came.extend(theirs.recv(65536))

    reader = threading.Thread(target=read)
    reader.start()
    journal.begin(b"request")
    journal.reply_unkept(ours, reply)
    reader.join(5)
    assert came == reply
    assert journal.state is LinkState.IDLE
    assert not journal.reply_is_lost


def test_successor_hangs_up_when_its_predecessor_died_within_a_long_reply(
    memfd: int, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, _theirs = ends
    predecessor = Journal(memfd)
    predecessor.begin(b"\0\0\0\x0c")
    ours.settimeout(0.05)
    with pytest.raises(TimeoutError):
        predecessor.reply_unkept(ours, bytes(4 << 20))
    journal = Journal(memfd)
    assert journal.reply_is_lost
    with pytest.raises(BrokenPipeError, match="too long to keep"):
        ControlLink(ours, journal).unfinished()


def test_reply_is_not_lost_when_it_is_kept(memfd: int) -> None:
    journal = Journal(memfd)
    _left_replying(journal, memfd, bytes(100), sent=10)
    assert journal.state is LinkState.REPLYING
    assert not journal.reply_is_lost
