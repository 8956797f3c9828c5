"""A journal written by an instance that was taken over: its successor stays within bounds, whatever it holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from vtpm.guest_link.control_link import ControlLink
from vtpm.guest_link.data_link import EmulatorDataLink
from vtpm.guest_link.journal import REPLY_AT, REPLY_BYTES, REQUEST_BYTES, Journal, JournaledPower, LinkState
from vtpm.launcher.slot import create_journal
from vtpm.wire.emulator import Command
from vtpm.wire.instance_spec import JOURNAL_BYTES

FAILURE = bytes.fromhex("80010000000a00000101")
LIMIT_S = 5.0

_u32 = st.one_of(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 4, REQUEST_BYTES + 1, REPLY_BYTES, REPLY_BYTES + 1, 2**32 - 1])
)
_byte = st.one_of(st.sampled_from(range(8)), st.integers(0, 255))
headers = st.builds(
    lambda state, power, locality, pad, request, reply: (
        bytes((state, power, locality, pad)) + request.to_bytes(4, "big") + reply.to_bytes(4, "big")
    ),
    *(_byte, _byte, _byte, _byte, _u32, _u32),
)
requests = st.one_of(
    st.binary(max_size=REQUEST_BYTES), st.sampled_from(Command).map(lambda one: one.to_bytes(4, "big"))
)
offsets = st.one_of(st.integers(0, JOURNAL_BYTES + 10), st.sampled_from([0, REPLY_AT, REPLY_AT + 17, 2**40]))


@contextmanager
def _left(header: bytes, request: bytes, offset: int) -> Iterator[tuple[int, socket.socket, socket.socket]]:
    """A journal as it was left, with a file offset, and the two ends of the link."""
    memfd = create_journal()
    ours, theirs = socket.socketpair()
    os.pwrite(memfd, bytes(range(1, 129)) * 96, 0)
    os.pwrite(memfd, header.ljust(64, b"\xee") + request, 0)
    os.lseek(memfd, offset, os.SEEK_SET)
    theirs.settimeout(LIMIT_S)
    with ours, theirs:
        yield memfd, ours, theirs
    os.close(memfd)


@effort.codec
@given(headers, requests, offsets)
def test_reader_stays_within_bounds_when_a_predecessor_wrote_anything(
    header: bytes, request: bytes, offset: int
) -> None:
    with _left(header, request, offset) as (memfd, _, _):
        journal = Journal(memfd)
        assert journal.state in set(LinkState)
        assert journal.power in set(JournaledPower)
        assert 0 <= journal.locality <= 4
        assert len(journal.request) <= REQUEST_BYTES
        assert journal.request[: len(request)] == request[: len(journal.request)]
        left = journal.reply_left
        assert 0 <= left <= REPLY_BYTES
        if left:
            assert REPLY_AT <= offset < REPLY_AT + REPLY_BYTES
        journal.power, journal.locality = JournaledPower.ON, 3
        assert (journal.power, journal.locality) == (JournaledPower.ON, 3)
        journal.reset()
        assert (journal.state, journal.request, journal.reply_left) == (LinkState.IDLE, b"", 0)


@effort.codec
@given(headers, requests, offsets, st.booleans())
def test_successor_answers_once_at_most_when_a_predecessor_wrote_anything(
    header: bytes, request: bytes, offset: int, sent_more: bool
) -> None:
    with _left(header, request, offset) as (memfd, ours, theirs):
        if sent_more:
            theirs.send(b"\x80\x01")
        journal = Journal(memfd)
        state, left = journal.state, journal.reply_left
        EmulatorDataLink(ours, journal).settle(FAILURE)
        assert journal.state is LinkState.IDLE
        ours.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: theirs.recv(65536), b""))
        if state is LinkState.REPLYING:
            assert received == (bytes(range(1, 129)) * 96)[offset : offset + left]
        else:
            assert received == (FAILURE if state is LinkState.BUSY and not sent_more else b"")


@effort.codec
@given(headers, requests, offsets)
def test_control_successor_ends_the_turn_when_a_predecessor_wrote_anything(
    header: bytes, request: bytes, offset: int
) -> None:
    with _left(header, request, offset) as (memfd, ours, theirs):
        journal = Journal(memfd)
        state, left = journal.state, journal.reply_left
        link = ControlLink(ours, journal)
        if journal.reply_is_lost:
            with pytest.raises(BrokenPipeError):
                link.unfinished()
            return
        command = link.unfinished()
        if command is not None:
            assert state is LinkState.BUSY
            link.fail_unfinished(9)
        assert journal.state is LinkState.IDLE
        ours.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: theirs.recv(65536), b""))
        if state is LinkState.REPLYING:
            assert len(received) == left
        else:
            assert bool(received) is (command is not None)
            assert received[:4] in (b"", b"\0\0\0\x09")


@effort.codec
@given(st.binary(max_size=300), st.binary(max_size=REPLY_BYTES), st.integers(0, REPLY_BYTES))
def test_rest_of_a_reply_is_sent_when_its_sender_was_cut_off_anywhere(request: bytes, reply: bytes, sent: int) -> None:
    with _left(bytes(12), b"", 0) as (memfd, ours, theirs):
        journal = Journal(memfd)
        journal.begin(request)
        assert journal.request == request[:REQUEST_BYTES]
        journal.reply(ours, reply, LIMIT_S)
        assert journal.state is LinkState.IDLE
        os.lseek(memfd, REPLY_AT + sent, os.SEEK_SET)
        os.pwrite(memfd, bytes((LinkState.REPLYING,)), 0)
        Journal(memfd).send_rest(ours, LIMIT_S)
        assert journal.state is LinkState.IDLE
        ours.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: theirs.recv(65536), b"")) == reply + reply[sent:]


@effort.codec
@given(st.integers(1, 5000))
def test_reply_is_refused_when_it_does_not_fit(too_many: int) -> None:
    with _left(bytes(12), b"", 0) as (memfd, ours, _), pytest.raises(ValueError, match="does not fit"):
        Journal(memfd).reply(ours, bytes(REPLY_BYTES + too_many), LIMIT_S)
