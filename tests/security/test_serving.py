"""The allow-list is complete: what a vtpmd needs works when all is locked down, with the real engine too."""

from __future__ import annotations

import socket

import pytest

from tests.security.harness import MODES, TIMEOUT_S, Probe, attempt, attempts
from tests.security.tpm_commands import COMMANDS_12, COMMANDS_20


def _guest(probe: Probe) -> None:
    """The other end of the links: hands a listening socket and a connected one over, and talks over both."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")  # an abstract name that the kernel picks
        listener.listen()
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        with ours, theirs:
            ours.sendall(b"hello")
            socket.send_fds(probe.link, [b"two"], [listener.fileno(), theirs.fileno()])
            theirs.close()
            received = b""
            while chunk := ours.recv(64):
                received += chunk
            assert received == b"answer...in parts"
            client.settimeout(TIMEOUT_S)
            client.connect(listener.getsockname())
            client.sendall(b"client")
            assert client.recv(16) == b"welcome"


def test_everything_a_vtpmd_does_works_when_locked_down() -> None:
    outcome = attempt("serve", meanwhile=_guest, limits={"file_bytes": 8192})
    assert outcome["failure"] is None and outcome["exit"] == 0, outcome
    assert outcome["answer"] == {
        "thread": True,
        "timed wait": True,
        "descriptors": ["two", 2],
        "poll": 1,
        "peek": "hello",
        "received": "hello",
        "journal": [9, 4105],
        "pread": "answer",
        "client": "client",
        "peer": 12,
        "socketpair": "wake",
        "clocks": [0, 0],
        "random": 32,
        "big block": 16 << 20,
        "file": "",
        "late import": "ModuleNotFoundError",
        "stop": True,
    }


@pytest.mark.parametrize("mode", MODES)
def test_tpm_2_works_when_locked_down(mode: str) -> None:
    (outcome,) = attempts(mode, [{"name": "2.0", "target": "engine_target:prepare"}])
    expected = dict.fromkeys(COMMANDS_20, 0) | {"permanent": True, "volatile": True, "again": 0}
    assert outcome["answer"] == expected, outcome


def test_tpm_1_2_works_when_locked_down() -> None:
    (outcome,) = attempts(MODES[0], [{"name": "1.2", "target": "engine_target:prepare"}])
    expected = dict.fromkeys(COMMANDS_12, 0) | {"permanent": True, "volatile": True, "again": 0}
    assert outcome["answer"] == expected, outcome
