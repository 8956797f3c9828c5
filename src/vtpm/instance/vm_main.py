"""Entry of vtpmd as the first process of a virtual machine: the same vtpmd, its links coming through two serial ports.

Its arguments come with the relay's HELLO, not with the kernel's command line: that is measured, and one measurement
must stand for every vTPM of an image. The manager link has the other port, and goes past the relay.
"""

from __future__ import annotations

import os
import select
import sys
import time
from typing import NoReturn, Protocol

from vtpm.engine import library
from vtpm.engine.engine import Engine
from vtpm.errors import DomainError, ProtocolError, UnavailableError, VtpmError
from vtpm.guest_link.refusals import Complaints
from vtpm.instance.server import InstanceServer
from vtpm.instance.tpm_engine import MakeEngine
from vtpm.instance.vm_pump import Pump
from vtpm.wire.framing import BadFrame
from vtpm.wire.guest_port import (
    GUEST_PORT,
    MANAGER_PORT,
    MAX_BODY_BYTES,
    Direction,
    Ended,
    Hello,
    Ready,
    decode_message,
    encode_message,
)
from vtpm.wire.instance_spec import InstanceArgs
from vtpm.wire.port_stream import PortStream

# At import, so that an image's builder sees what it takes.
library.load()

CONNECT_TIMEOUT_S = 30.0
PORT_RETRY_S = 0.005


class Boot(Protocol):
    """What the first process of a virtual machine does beside serving: the module `vm_boot`."""

    def mount_file_systems(self) -> None:
        """Mount what Python and the ports need."""
        ...

    def load_modules(self) -> None:
        """Load the kernel's modules for the ports."""
        ...

    def find_port(self, name: str) -> str:
        """Return the path of the virtio-serial port of this name. Raises DomainError: it is not there."""
        ...

    def power_off(self) -> NoReturn:
        """Power the virtual machine off."""
        ...


def main() -> None:
    """Be the first process of a virtual machine."""
    from vtpm.instance import vm_boot

    run(vm_boot)


def run(boot: Boot, make_engine: MakeEngine = Engine) -> None:
    """Boot, serve, and power the virtual machine off, however serving ended.

    Args:
        make_engine: makes what carries the TPM out; called once the machine is booted.
    """
    try:
        boot.mount_file_systems()
        boot.load_modules()
        manager_fd, guest_fd = _open_port(boot, MANAGER_PORT), _open_port(boot, GUEST_PORT)
        for fd in (manager_fd, guest_fd):
            wait_connected(fd)
        serve(guest_fd, manager_fd, make_engine)
    except (VtpmError, OSError) as error:
        # Said before the power goes; the relay sees the port hang up.
        sys.stderr.write(f"vtpmd: {error}\n")
    finally:
        boot.power_off()


def _open_port(boot: Boot, name: str) -> int:
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return os.open(boot.find_port(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except DomainError:
            # The device tells the kernel of a port, and then of its name, a moment after its module was loaded.
            if time.monotonic() > deadline_s:
                raise
            time.sleep(PORT_RETRY_S)


def wait_connected(fd: int, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
    """Wait until the host's end of a port is open, which the kernel hears of a moment after the port is there.

    Raises:
        ProtocolError: it was not opened in time.
    """
    with select.epoll() as poller:
        # Edge-triggered: a port that is hung up says so all the time, and once more when that changes.
        poller.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        while events := poller.poll(timeout_s):
            if not events[0][1] & select.EPOLLHUP:
                return
    raise ProtocolError("the host's end of a port was not opened in time")


def serve(guest_fd: int, manager_fd: int, make_engine: MakeEngine = Engine) -> int:
    """Serve as the relay says until the end; return the exit status, which the relay has been told.

    Args:
        guest_fd, manager_fd: the ports; serial devices or stream sockets.
        make_engine: makes what carries the TPM out.
    Raises:
        OSError: the relay went before the vtpmd was ready.
    """
    port = PortStream(guest_fd, MAX_BODY_BYTES)
    try:
        hello, waiting = _wait_for_hello(port)
        pump = Pump(port, hello)
        server = InstanceServer(InstanceArgs(hello.tpm_version, hello.role), pump.ends(manager_fd), make_engine)
        server.start_threads()
        port.send(encode_message(Ready(hello.session)))
    except VtpmError as error:
        sys.stderr.write(f"vtpmd: {error}\n")
        port.send(encode_message(Ended(error.exit_status)))
        return error.exit_status
    pump.start(waiting, server.tell_note, Complaints(server.complain).add)
    status = server.run()
    pump.finish(status)
    return status


def _wait_for_hello(port: PortStream) -> tuple[Hello, list[bytes | BadFrame]]:
    """Return HELLO and what came behind it. Raises UnavailableError: the relay is gone."""
    poller = select.poll()
    poller.register(port, select.POLLIN)
    while True:
        poller.poll()
        bodies = port.receive()
        if bodies is None:
            raise UnavailableError("the host's end of the guest port is closed")
        for number, body in enumerate(bodies, 1):
            try:
                message = None if isinstance(body, BadFrame) else decode_message(body, Direction.TO_VM)
            except ProtocolError:
                message = None
            if isinstance(message, Hello):
                return message, bodies[number:]
