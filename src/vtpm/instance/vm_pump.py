"""Inside a virtual machine: moves requests and answers between the guest port and the vtpmd's connections.

The relay on the host speaks on the port for all clients of the guest link, and is not trusted more than they are: one
request at a time on each connection, one connection of each kind, and what breaks this is refused and counted. A thread
of its own, so that the vtpmd's main loop is the same wherever it runs. Decision record 21.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections import deque
from collections.abc import Callable

from vtpm.errors import ProtocolError
from vtpm.guest_link.journal import Journal, JournaledPower
from vtpm.guest_link.refusals import Client
from vtpm.instance.ends import Ends
from vtpm.instance.vm_channels import Channel, HandedListener, whole_reply, whole_response
from vtpm.wire.emulator import Command, Plain, encode_request
from vtpm.wire.framing import BadFrame
from vtpm.wire.guest_port import (
    Close,
    Closed,
    ConnectionKind,
    Control,
    DataFd,
    Direction,
    Ended,
    Hello,
    Note,
    Open,
    Power,
    Response,
    ToRelay,
    ToVm,
    TpmRequest,
    decode_message,
    encode_message,
    reply_messages,
)
from vtpm.wire.hold import ParkedKind
from vtpm.wire.instance_spec import JOURNAL_BYTES
from vtpm.wire.port_stream import PortStream

END_TIMEOUT_S = 2.0
_PREFIX = struct.Struct(">IBI")
"""Before a TPM command in the prefixed form: 8, locality, size; see tpm_stream."""
_SEND_COMMAND = 8
_HUNG_UP = select.POLLHUP | select.POLLERR


class LocalHold:
    """Keeps nothing: when this vtpmd dies, its connections die with it, and the relay has parked what lies behind them.

    Readable once the relay is gone.
    """

    def __init__(self) -> None:
        self._gone = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """See HoldEnd."""
        return self._gone

    def park(self, kind: ParkedKind, fd: int) -> None:
        """See HoldEnd."""

    def drop(self, kind: ParkedKind) -> None:
        """See HoldEnd."""

    def end(self) -> None:
        """Nobody keeps anything any more."""
        os.eventfd_write(self._gone, 1)


class Pump:
    """See the module.

    Args:
        port: the guest port.
        hello: what came on it first.
    """

    def __init__(self, port: PortStream, hello: Hello) -> None:
        self._port = port
        self._hello = hello
        self._note: Callable[[str], None] = _nowhere
        self._complain: Callable[[str], None] = _nowhere
        self._hold = LocalHold()
        self._listeners = {kind: HandedListener() for kind in ConnectionKind}
        self._control = Channel(hello.control) if hello.control else None
        self._data = Channel(hello.data) if hello.data else None
        self._last_connection = max(hello.control, hello.data)
        self._came: list[bytes | BadFrame] = []
        self._told: deque[ToRelay] = deque()
        """From other threads; sent before what this thread sends next."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ending = threading.Event()
        self._gone = False
        self._thread = threading.Thread(target=self._run, name="port", daemon=True)

    # -- other threads ----------------------------------------------------------------------------------------------
    def ends(self, manager_fd: int) -> Ends:
        """Return what the vtpmd is to be connected to; call once."""
        journals = []
        for _ in ConnectionKind:
            fd = os.memfd_create("vtpm-link-journal", os.MFD_CLOEXEC)
            os.ftruncate(fd, JOURNAL_BYTES)
            journals.append(Journal(fd))
        control_journal, data_journal = journals
        control_journal.power = JournaledPower.ON if self._hello.powered else JournaledPower.OFF
        control_journal.locality = self._hello.locality
        return Ends(
            self._hold,
            manager_fd,
            self._listeners[ConnectionKind.CONTROL],
            self._listeners[ConnectionKind.DATA],
            control_journal,
            data_journal,
            control=Client(self._control.theirs, 0, self._hello.uid) if self._control else None,
            data=self._data.theirs if self._data else None,
            tell_power=self._tell_power,
        )

    def start(self, came: list[bytes | BadFrame], note: Callable[[str], None], complain: Callable[[str], None]) -> None:
        """Start the thread.

        Args:
            came: what came on the port behind HELLO.
            note: takes a line of the relay's for the manager's log; called in the pump's thread.
            complain: takes a line about what the relay does and may not; likewise.
        """
        self._came, self._note, self._complain = came, note, complain
        self._thread.start()

    def finish(self, status: int) -> None:
        """Send what the vtpmd has answered, and how it ended, as far as the relay takes it, and end the thread."""
        self._told.append(Ended(status))
        self._ending.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(END_TIMEOUT_S)

    def _tell_power(self, power: JournaledPower) -> None:
        self._told.append(Power(power is JournaledPower.ON))
        os.eventfd_write(self._wake, 1)

    # -- the thread -------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._follow_all(self._came)
            while not (self._gone or self._ending.is_set()):
                self._move()
            if not self._gone:
                self._drain()
        except OSError:
            # The port is hung up: the relay is gone, or all of the host's side.
            self._gone = True
        self._hold.end()

    def _move(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        # Answers wait for a relay that does not read, and so do requests.
        events = 0 if self._port.congested else select.POLLIN
        poller.register(self._port, events | (select.POLLOUT if self._port.want_write else 0))
        for channel in self._channels():
            poller.register(channel, select.POLLIN)
        ready = dict(poller.poll())
        if ready.get(self._port.fileno(), 0) & _HUNG_UP:
            # A hung up port says so all the time, and a serial one takes what is written as if it were only slow.
            self._gone = True
            return
        if self._wake in ready:
            os.eventfd_read(self._wake)
            self._send_told()
        for channel in self._channels():
            if channel.fileno() in ready:
                self._answer(channel)
        if self._port.fileno() in ready:
            self._port.flush()
            if not self._port.congested:
                self._take()

    def _drain(self) -> None:
        for channel in self._channels():
            self._answer(channel)
        self._send_told()
        poller = select.poll()
        poller.register(self._port, select.POLLOUT)
        while self._port.want_write:
            ready = poller.poll(END_TIMEOUT_S * 1000)
            if not ready or ready[0][1] & _HUNG_UP:
                return
            self._port.flush()

    def _channels(self) -> list[Channel]:
        return [channel for channel in (self._control, self._data) if channel is not None]

    # -- towards the relay ------------------------------------------------------------------------------------------
    def _answer(self, channel: Channel) -> None:
        try:
            answer = channel.take()
        except ProtocolError as error:
            self._complain(f"guest port: {error.message}")
            answer = None
        if answer is None:
            self._drop(channel)
        elif answer and not channel.leaving:
            is_reply = channel is self._control
            made = reply_messages(channel.connection, answer) if is_reply else [Response(channel.connection, answer)]
            for message in made:
                self._send(message)

    def _drop(self, channel: Channel) -> None:
        channel.close()
        if channel is self._control:
            self._control = None
        else:
            self._data = None
        self._send(Closed(channel.connection))

    def _send(self, message: ToRelay) -> None:
        # What the TPM thread has told since belongs before the answers that it has written since.
        self._send_told()
        self._port.send(encode_message(message))

    def _send_told(self) -> None:
        while self._told:
            self._port.send(encode_message(self._told.popleft()))

    # -- from the relay ---------------------------------------------------------------------------------------------
    def _take(self) -> None:
        bodies = self._port.receive()
        if bodies is None:
            self._gone = True
            return
        self._follow_all(bodies)

    def _follow_all(self, bodies: list[bytes | BadFrame]) -> None:
        for body in bodies:
            if isinstance(body, BadFrame):
                self._complain(f"guest port: a frame was skipped: {body.damage.value}")
                continue
            try:
                self._follow(decode_message(body, Direction.TO_VM))
            except ProtocolError as error:
                self._complain(f"guest port: {error.message}")

    def _follow(self, message: ToVm | ToRelay) -> None:
        """Follow one message. Raises ProtocolError: it is not due."""
        match message:
            case Open(connection=connection, kind=kind, uid=uid):
                channel = self._open(connection, kind)
                self._listeners[kind].hand(Client(channel.theirs, 0, uid))
            case Close(connection=connection):
                self._close(connection)
            case Control(connection=connection, request=request):
                if (control := self._find(connection, self._control)) is not None:
                    control.put(encode_request(request), whole_reply(request.command))
            case DataFd(connection=connection, data=data):
                if (control := self._find(connection, self._control)) is not None:
                    control.check_turn()
                    theirs = self._open(data, ConnectionKind.DATA).theirs
                    control.put(encode_request(Plain(Command.SET_DATAFD)), whole_reply(Command.SET_DATAFD), theirs)
            case TpmRequest(connection=connection, locality=locality, data=command):
                if (data_channel := self._find(connection, self._data)) is not None:
                    prefixed = locality is not None
                    prefix = _PREFIX.pack(_SEND_COMMAND, locality, len(command)) if prefixed else b""
                    data_channel.put(prefix + command, whole_response(prefixed=prefixed))
            case Note(message=text):
                self._note(text)
            case _:
                raise ProtocolError(f"a {type(message).__name__} is not due")

    def _open(self, connection: int, kind: ConnectionKind) -> Channel:
        is_open = self._control is not None if kind is ConnectionKind.CONTROL else self._data is not None
        if is_open or connection <= self._last_connection:
            raise ProtocolError(f"connection {connection} is opened, and is not new or not the only one of its kind")
        self._last_connection = connection
        channel = Channel(connection)
        if kind is ConnectionKind.CONTROL:
            self._control = channel
        else:
            self._data = channel
        return channel

    def _close(self, connection: int) -> None:
        control, data = self._find(connection, self._control), self._find(connection, self._data)
        if control is not None:
            # The next one may come only when the vtpmd has noticed, or it would refuse it as a second one.
            control.leave()
        if data is not None:
            self._drop(data)

    def _find(self, connection: int, channel: Channel | None) -> Channel | None:
        """Return the channel if it has this number; None if one of this number is closed, which the relay hears of.

        Raises:
            ProtocolError: there never was one.
        """
        if connection > self._last_connection:
            raise ProtocolError(f"connection {connection} was never opened")
        return channel if channel is not None and channel.connection == connection else None


def _nowhere(_: str) -> None:
    """Before the thread runs, nothing is said."""
