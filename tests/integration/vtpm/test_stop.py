"""A vTPM that a virtual machine uses is not taken away by mistake."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.host import Host
from vtpm.errors import ConflictError
from vtpm.wire.emulator import Command, Plain, encode_request


def test_stop_is_refused_when_an_emulator_is_attached_and_forced_when_told_so() -> None:
    with Host() as host, host.client() as client:
        client.create("web1")
        control = Path(client.start("web1").control_socket)
        ours, theirs = socket.socketpair()
        with ours, theirs, socket.socket(socket.AF_UNIX) as emulator:
            emulator.settimeout(10)
            emulator.connect(str(control))
            socket.send_fds(emulator, [encode_request(Plain(Command.SET_DATAFD))], [theirs.fileno()])
            assert emulator.recv(64) == bytes(4)
            with pytest.raises(ConflictError, match="in use by a virtual machine"):
                client.stop("web1")
            assert client.show("web1").state == "running"
            assert client.stop("web1", force=True).state == "stopped"
            assert emulator.recv(64) == b""
