"""A vTPM that a virtual machine uses is not taken away by mistake."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import Host
from vtpm.errors import ConflictError
from vtpm.wire.emulator import Command, Plain, encode_request


@contextlib.contextmanager
def attached(control: Path) -> Iterator[socket.socket]:
    """Connect as an emulator does, with a data channel."""
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as emulator:
        emulator.settimeout(10)
        emulator.connect(str(control))
        socket.send_fds(emulator, [encode_request(Plain(Command.SET_DATAFD))], [theirs.fileno()])
        assert emulator.recv(64) == bytes(4)
        yield emulator


def test_stop_is_refused_when_an_emulator_is_attached_and_forced_when_told_so() -> None:
    with Host() as host, host.client() as client:
        client.create("web1")
        with attached(Path(client.start("web1").control_socket)) as emulator:
            with pytest.raises(ConflictError, match="in use by a virtual machine"):
                client.stop("web1")
            assert client.show("web1").state == "running"
            assert client.stop("web1", force=True).state == "stopped"
            assert emulator.recv(64) == b""


def test_stop_waits_for_an_emulator_when_it_is_about_to_end() -> None:
    with Host() as host, host.client() as client, concurrent.futures.ThreadPoolExecutor(1) as other:
        client.create("web1")
        with attached(Path(client.start("web1").control_socket)):
            stopped = other.submit(client.stop, "web1")
            with pytest.raises(TimeoutError):
                stopped.result(0.5)
        assert stopped.result(10).state == "stopped"
