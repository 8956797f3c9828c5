"""A relay alone: its own program, with the virtual machine behind it, its guest and its launcher played by the test."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from typing import Any, TypeVar

from tests.support.relayed import MANAGER_LINK_AT
from tests.support.vtpmd import TIMEOUT_S, Vtpmd
from vtpm.wire.framing import Deframer, encode_frame
from vtpm.wire.guest_port import MAX_BODY_BYTES, Direction, Hello, Ready, ToRelay, ToVm, decode_message, encode_message
from vtpm.wire.instance_spec import InstanceArgs

M = TypeVar("M", bound=ToVm)


class Port:
    """One end of a guest port, played by the test."""

    def __init__(self, sock: socket.socket, theirs: Direction) -> None:
        sock.settimeout(TIMEOUT_S)
        self.sock = sock
        self._theirs = theirs
        self._deframer = Deframer(MAX_BODY_BYTES)
        self._came: list[Any] = []

    def send(self, *messages: ToRelay | ToVm) -> None:
        """Send messages in one write."""
        self.sock.sendall(b"".join(encode_frame(encode_message(message)) for message in messages))

    def receive(self, kind: type[Any]) -> Any:
        """Return the next message, which is of this class."""
        while not self._came:
            data = self.sock.recv(65536)
            assert data, "the port was closed"
            for body in self._deframer.feed(data):
                assert isinstance(body, bytes), body
                self._came.append(decode_message(body, self._theirs))
        message = self._came.pop(0)
        assert isinstance(message, kind), message
        return message

    def await_one(self, kind: type[Any]) -> Any:
        """Return the next message of this class, and drop those before it."""
        while True:
            message = self.receive(object)
            if isinstance(message, kind):
                return message

    def is_silent(self, for_s: float = 0.05) -> bool:
        """Whether nothing comes for a while."""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return not self._came and not poller.poll(for_s * 1000)


class LoneRelay(Vtpmd):
    """See the module. `port` is the virtual machine's end."""

    port: Port
    hello: Hello

    def _start(self, args: InstanceArgs, fds: list[int]) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        self.port = Port(theirs, Direction.TO_VM)
        with ours:
            relay_fds = [*fds]
            relay_fds[MANAGER_LINK_AT] = ours.fileno()
            return self._run("tests.support.relayed", json.dumps(args.to_json()), relay_fds)

    def make_ready(self) -> Hello:
        """Take HELLO and answer READY."""
        hello: Hello = self.port.receive(Hello)
        self.port.send(Ready(hello.session))
        return hello

    def kill(self) -> None:
        """End it, and its port."""
        super().kill()
        self.port.sock.close()

    def let_launcher_go(self) -> None:
        """Close the launcher's end of the hold, as its death does."""
        self._hold.shutdown(socket.SHUT_RDWR)

    def parked(self) -> set[str]:
        """Names of what it has had kept so far."""
        return {kind.name for kind in self._take_parked()}


def journal_bytes(fd: int, count: int) -> bytes:
    """First bytes of a link journal."""
    return os.pread(fd, count, 0)
