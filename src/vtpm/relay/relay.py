"""The relay: carries whole requests of the guest link to the vtpmd in a virtual machine, and its answers back.

It stands on the host in the vtpmd's place: listeners, journals and hold are its, and it does with them what a vtpmd in
a process does (decision records 1 and 21). Both sides of it may be hostile. Clients' streams are cut into requests by
the codecs that a vtpmd uses, and what is none is refused here. Of what the virtual machine says only the one whole
answer that is due reaches a client; the rest is refused, counted and, past an allowance, the end of both. One thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from vtpm.errors import ProtocolError
from vtpm.guest_link.data_link import DataLink, EmulatorDataLink
from vtpm.guest_link.journal import JournaledPower
from vtpm.guest_link.refusals import Client, Complaints, Refusals
from vtpm.guest_link.unpowered import Refusal, refuse
from vtpm.relay.control_side import ControlSide
from vtpm.relay.data_side import DataSide
from vtpm.relay.ends import RelayEnds
from vtpm.tpm.return_codes import Rc12
from vtpm.wire.allowance import Allowance
from vtpm.wire.emulator import Command, encode_reply
from vtpm.wire.framing import BadFrame
from vtpm.wire.guest_port import (
    MAX_BODY_BYTES,
    MAX_CONNECTION,
    SESSION_BYTES,
    Close,
    Closed,
    ConnectionKind,
    Direction,
    Ended,
    Hello,
    Note,
    Open,
    Power,
    Ready,
    Reply,
    ReplyPart,
    Response,
    ToRelay,
    ToVm,
    decode_message,
    encode_message,
)
from vtpm.wire.hold import ParkedKind
from vtpm.wire.instance_spec import InstanceArgs, RelayExit, Role
from vtpm.wire.port_stream import PortStream

READY_TIMEOUT_S = 60.0
"""A virtual machine without hardware acceleration takes seconds to boot, and a busy host makes that more."""
REFUSALS_AT_ONCE = 64
REFUSALS_PER_SECOND = 1.0
"""How much a virtual machine may say that no vtpmd says. A frame cut by a crash is one; nobody's fault is more."""

_Interest = tuple[int, int, Callable[[], None]]


class Relay:
    """See the module.

    Args:
        args: what the vtpmd is to be told of itself.
        ends: what the relay is connected to.
        ready_timeout_s: how long the vtpmd may take to become ready.
    """

    def __init__(self, args: InstanceArgs, ends: RelayEnds, ready_timeout_s: float = READY_TIMEOUT_S) -> None:
        self._args = args
        self._ends = ends
        self._port = PortStream(ends.port_fd, MAX_BODY_BYTES)
        self._session = os.urandom(SESSION_BYTES)
        self._ready = False
        self._ready_by_s = time.monotonic() + ready_timeout_s
        self._status: int | None = None
        self._last_connection = 0
        self._control: ControlSide | None = None
        self._closing_control = 0
        """Connection of the last control client, while the vtpmd may still be at work for it; 0: none."""
        self._data: DataSide | None = None
        self._emulator_attached = False
        self._fails_itself = args.role is Role.SUCCESSOR and ends.control_journal.power is JournaledPower.ON
        """Whether the guest's TPM failed with a predecessor, so that its commands have an answer before READY."""
        self._watched: dict[socket.socket, Callable[[], None]] = {}
        self._complaints = Complaints(self._note)
        self._refusals = Refusals(self, self._complaints)
        self._refused = Complaints(self._log)
        self._tolerance = Allowance(REFUSALS_AT_ONCE, REFUSALS_PER_SECOND)

    def run(self) -> int:
        """Serve until the virtual machine or the launcher is gone; return the exit status.

        The journals then say what a successor must know, so nothing is closed in order.
        """
        self._take_over()
        while self._status is None:
            self._serve_once()
        return self._status

    # -- the loop ---------------------------------------------------------------------------------------------------
    def _serve_once(self) -> None:
        poller = select.poll()
        calls: dict[int, Callable[[], None]] = {}
        for fd, events, call in self._interests():
            poller.register(fd, events)
            calls[fd] = call
        ready = poller.poll(self._timeout_ms())
        if not self._ready and time.monotonic() >= self._ready_by_s:
            self._end(RelayExit.NOT_READY, "the vtpmd in the virtual machine did not become ready in time")
        for fd, _ in ready:
            if self._status is not None:
                return
            calls[fd]()
            self._reap()
        for side in self._sides():
            if side.waiting.left_s == 0:
                self._read(side)
        self._reap()

    def _interests(self) -> Iterator[_Interest]:
        yield self._ends.hold.fileno(), select.POLLIN, self._on_hold
        yield self._port.fileno(), select.POLLIN | (select.POLLOUT if self._port.want_write else 0), self._on_port
        # Before the listeners, so that who has gone is not in the way of who comes.
        for side in self._sides():
            if side.waiting.left_s is None:
                yield side.link.fileno(), select.POLLIN, partial(self._read, side)
        if not self._takes_clients():
            return
        if not self._closing_control:
            yield self._ends.control_listener.fileno(), select.POLLIN, self._on_control_connect
        yield self._ends.data_listener.fileno(), select.POLLIN, self._on_data_connect
        for connection, call in self._watched.items():
            yield connection.fileno(), select.POLLIN, call

    def _takes_clients(self) -> bool:
        # To a virtual machine that does not read, nothing more is said.
        return self._ready and not self._port.congested

    def _sides(self) -> list[ControlSide | DataSide]:
        """Clients that may be read from: all of them, or who has an answer here before the vtpmd is ready."""
        sides = [self._control, self._data] if self._takes_clients() else [self._data] if self._fails_itself else []
        return [side for side in sides if side is not None and side.wants_input]

    def _read(self, side: ControlSide | DataSide) -> None:
        if not side.wants_input:
            # Another call of the same round has ended it.
            return
        if isinstance(side, DataSide) and not self._ready:
            side.on_readable(Refusal.FAILED)
        else:
            side.on_readable()

    def _timeout_ms(self) -> float | None:
        """How long to wait at most, in milliseconds; None: without limit."""
        waits = [left for side in self._sides() if (left := side.waiting.left_s) is not None]
        if not self._ready:
            waits.append(max(0.0, self._ready_by_s - time.monotonic()))
        return 1000 * min(waits) + 1 if waits else None

    def watch(self, connection: socket.socket, call: Callable[[], None]) -> None:
        """See Watcher, of Refusals."""
        self._watched[connection] = call

    def unwatch(self, connection: socket.socket) -> None:
        """See Watcher, of Refusals."""
        del self._watched[connection]

    # -- taking a guest over ----------------------------------------------------------------------------------------
    def _take_over(self) -> None:
        ends = self._ends
        if ends.data is not None:
            link = EmulatorDataLink(ends.data, ends.data_journal)
            self._data = self._new_data(link)
            self._emulator_attached = True
            # Nobody can know what a request did that a predecessor had taken; it failed.
            try:
                link.settle(refuse(self._args.tpm_version, Refusal.FAILED))
            except OSError:
                self._data.over = True
        if ends.control is not None:
            self._control = self._new_control(ends.control)
        self.send(
            Hello(
                self._session,
                self._args.tpm_version,
                self._args.role,
                ends.control_journal.power is JournaledPower.ON,
                ends.control_journal.locality,
                self._control.connection if self._control else 0,
                self._data.connection if self._data else 0,
                self._control.uid if self._control else 0,
            )
        )
        if self._control is not None:
            self._control.settle()
        self._reap()

    # -- the virtual machine ----------------------------------------------------------------------------------------
    def send(self, message: ToVm) -> None:
        """See ControlHost."""
        try:
            self._port.send(encode_message(message))
        except OSError:
            self._end(RelayExit.VM_GONE, "the virtual machine has ended")

    def _on_port(self) -> None:
        try:
            self._port.flush()
            bodies = self._port.receive()
        except OSError:
            bodies = None
        if bodies is None:
            self._end(RelayExit.VM_GONE, "the virtual machine has ended")
            return
        for body in bodies:
            if self._status is not None:
                return
            if isinstance(body, BadFrame):
                self._refuse(f"a frame was skipped: {body.damage.value}")
                continue
            try:
                self._receive(decode_message(body, Direction.TO_RELAY))
            except ProtocolError as error:
                self._refuse(error.message)

    def _receive(self, message: ToRelay | ToVm) -> None:
        """Follow one message. Raises ProtocolError: it is not due."""
        if isinstance(message, Ready):
            if self._ready or message.session != self._session:
                raise ProtocolError("a second READY, or that of another session")
            self._ready = True
            self._fails_itself = False
        elif isinstance(message, Ended):
            self._end(message.status, f"the vtpmd ended with status {message.status}")
        elif not self._ready:
            raise ProtocolError(f"a {type(message).__name__} before READY")
        elif isinstance(message, Power):
            self._ends.control_journal.power = JournaledPower.ON if message.powered else JournaledPower.OFF
        elif isinstance(message, Reply | ReplyPart | Response | Closed):
            self._follow(message)

    def _follow(self, message: Reply | ReplyPart | Response | Closed) -> None:
        if message.connection > self._last_connection:
            raise ProtocolError(f"a {type(message).__name__} on connection {message.connection}, which there never was")
        control, data = self._control, self._data
        if message.connection == self._closing_control:
            if isinstance(message, Closed):
                self._closing_control = 0
        elif control is not None and message.connection == control.connection:
            if isinstance(message, Closed):
                control.over = control.closed = True
            elif isinstance(message, Response) or not _take_reply(control, message):
                raise ProtocolError(f"a {type(message).__name__} on the control connection is none that is due")
        elif data is not None and message.connection == data.connection:
            if isinstance(message, Closed):
                data.over = data.closed = True
            elif not (isinstance(message, Response) and data.on_response(message.data)):
                raise ProtocolError(f"a {type(message).__name__} on the data connection is none that is due")
        # Otherwise it crossed the client's end.

    def _refuse(self, why: str) -> None:
        self._refused.add(f"the virtual machine: {why}")
        if not self._tolerance.take():
            self._end(RelayExit.BROKEN, "the virtual machine says too much that no vtpmd says")

    # -- clients ----------------------------------------------------------------------------------------------------
    def _on_control_connect(self) -> None:
        if self._closing_control:
            # The one before has gone in this very round; the next one waits until the vtpmd has noticed.
            return
        client = self._ends.control_listener.accept()
        if client is None:
            return
        if self._control is not None:
            self._refusals.refuse(client, encode_reply(Command.GET_CAPABILITY, int(Rc12.TPM_RETRY)))
            return
        self._ends.control_journal.end()
        self._control = self._new_control(client)
        self.send(Open(self._control.connection, ConnectionKind.CONTROL, client.uid))

    def _on_data_connect(self) -> None:
        client = self._ends.data_listener.accept()
        if client is None:
            return
        if self._emulator_attached or self._has_data_client():
            self._refusals.refuse(client, refuse(self._args.tpm_version, Refusal.IN_USE))
            return
        self._drop_data()
        self._data = self._new_data(DataLink(client.sock))
        self.send(Open(self._data.connection, ConnectionKind.DATA, client.uid))

    def _has_data_client(self) -> bool:
        data = self._data
        return data is not None and not data.over and not data.link.peer_gone()

    def _new_control(self, client: Client) -> ControlSide:
        return ControlSide(client, self._new_connection(), self._ends.control_journal, self)

    def _new_data(self, link: DataLink) -> DataSide:
        return DataSide(link, self._new_connection(), self._args.tpm_version, self.send)

    def _new_connection(self) -> int:
        if self._last_connection >= MAX_CONNECTION:
            raise ProtocolError(
                "the numbers of this relay's connections are used up", next_step="Stop and start the vTPM"
            )
        self._last_connection += 1
        return self._last_connection

    def offer_data(self, fd: int | None) -> DataSide | int:
        """See ControlHost."""
        if fd is None:
            return int(Rc12.TPM_FAIL)
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            return int(Rc12.TPM_FAIL)
        is_stream = sock.family is socket.AF_UNIX and sock.type is socket.SOCK_STREAM
        if not is_stream or self._emulator_attached or self._has_data_client():
            sock.close()
            self._complaints.add(
                "an emulator was refused its data channel: another client uses the TPM, or it is no stream socket"
            )
            return int(Rc12.TPM_RETRY)
        self._drop_data()
        return self._new_data(EmulatorDataLink(sock, self._ends.data_journal))

    def attach(self, data: DataSide) -> None:
        """See ControlHost."""
        assert self._control is not None
        self._ends.hold.park(ParkedKind.DATA, data.link.fileno())
        self._ends.hold.park(ParkedKind.CONTROL, self._control.link.fileno())
        self._ends.data_journal.reset()
        self._emulator_attached = True
        self._data = data

    def withdraw(self, data: DataSide) -> None:
        """See ControlHost."""
        data.close()
        self.send(Close(data.connection))

    def _reap(self) -> None:
        """Let go of clients that are over. With an emulator's control connection goes its data connection."""
        if self._status is not None:
            # The journals and what is parked are the successor's.
            return
        if self._control is not None and self._control.over:
            control, self._control = self._control, None
            control.close()
            if not control.closed:
                self._closing_control = control.connection
                self.send(Close(control.connection))
            if self._emulator_attached:
                self._emulator_attached = False
                self._ends.control_journal.locality = 0
                self._drop_data()
                self._let_go()
        if self._data is not None and self._data.over:
            self._drop_data()

    def _drop_data(self) -> None:
        if self._data is not None:
            data, self._data = self._data, None
            data.close()
            if not data.closed:
                self.send(Close(data.connection))

    def _let_go(self) -> None:
        try:
            self._ends.hold.drop(ParkedKind.CONTROL)
            self._ends.hold.drop(ParkedKind.DATA)
        except OSError:
            self._on_hold()

    # -- the end, and what is said ----------------------------------------------------------------------------------
    def _on_hold(self) -> None:
        self._end(RelayExit.LAUNCHER_GONE, "the launcher has gone")

    def _end(self, status: int, why: str) -> None:
        if self._status is None:
            self._status = int(status)
            self._log(why)

    def _note(self, text: str) -> None:
        self._log(text)
        self.send(Note(text))

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _take_reply(control: ControlSide, message: Reply | ReplyPart) -> bool:
    return control.on_reply(message.data) if isinstance(message, Reply) else control.on_part(message.data)
