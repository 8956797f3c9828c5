"""What clients cause is said, but not without end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import Mock

import pytest

from tests.support.vtpmd import Vtpmd
from vtpm.guest_link.refusals import Client, Complaints, Refusals
from vtpm.wire.allowance import Allowance
from vtpm.wire.manager_link import ClientChanged, ClientKind, Note

CLIENTS = 3000
MOST_LINES = 30
"""The burst, and what is filled up again while they come."""


def test_lines_are_counted_instead_of_said_when_the_allowance_is_used_up() -> None:
    now = 0.0
    said: list[str] = []
    complaints = Complaints(said.append, Allowance(burst=2, per_second=1.0, clock=lambda: now))
    for number in range(6):
        complaints.add(f"line {number}")
    assert said == ["line 0", "line 1"]
    now += 1
    complaints.add("line 6")
    now += 1
    complaints.add("line 7")
    assert said[2:] == ["line 6 (4 lines like this were dropped before it)", "line 7"]


@pytest.mark.parametrize(("pid", "who"), [(0, "(uid 1000)"), (12, "(pid 12, uid 1000)")])
def test_no_process_is_named_when_the_kernel_names_none(pid: int, who: str) -> None:
    said: list[str] = []
    ours, theirs = socket.socketpair()
    with theirs, ours:
        Refusals(Mock(), Complaints(said.append)).refuse(Client(ours, pid, 1000), b"no")
    assert len(said) == 1
    assert who in said[0]


class Round:
    """A main loop that goes on with what was readable when its round began."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def watch(self, _: socket.socket, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def unwatch(self, _: socket.socket) -> None:
        """The round has begun."""


def test_second_client_is_not_answered_when_a_newer_one_took_its_place_in_the_same_round() -> None:
    with ExitStack() as stack:
        loop = Round()
        refusals = Refusals(loop, Complaints(lambda _: None))
        pairs = [socket.socketpair() for _ in range(5)]
        for ours, theirs in pairs:
            stack.enter_context(ours)
            stack.enter_context(theirs).settimeout(5)
            theirs.sendall(b"first request")
            refusals.refuse(Client(ours, 0, 1000), b"no")
        for call in loop.calls:
            call()
        assert [theirs.recv(8) for _, theirs in pairs[1:]] == [b"no"] * 4


@pytest.mark.timeout(60)
def test_log_and_manager_hear_of_few_when_thousands_of_second_clients_come(vtpmd: Vtpmd) -> None:
    with vtpmd.connect("data"):
        vtpmd.manager.wait_for(ClientChanged, lambda told: told.client is ClientKind.DATA)
        for _ in range(CLIENTS):
            vtpmd.connect("data").close()
        with vtpmd.connect("data") as last:
            last.sendall(bytes.fromhex("8001 0000000c 0000017b 0008"))
            assert last.recv(64).hex() == "80010000000a00000922"
        vtpmd.manager.hello()
        notes = [note.message for note in vtpmd.manager.of(Note)]
        assert notes
        assert all("a second client (" in note for note in notes)
        assert len(notes) < MOST_LINES
        assert len(vtpmd.log_lines()) < MOST_LINES
