"""The main thread of a vtpmd: waits on its descriptors and hands work to the TPM thread.

Its ends (see `ends`) are all it can reach: the hold, the manager link, two listeners of the guest link, and what
connects to those. One client at a time uses the TPM: an emulator (QEMU, by SET_DATAFD on the control channel) or
whoever connects to the data socket; a second one is refused. Control requests that need the TPM are carried out by the
TPM thread and answered when it is done; the others are answered at once, also while a long command runs.
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import socket
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

from vtpm.engine.engine import Engine
from vtpm.errors import VtpmError
from vtpm.guest_link.control_link import PARTIAL_RETRY_S, ControlLink
from vtpm.guest_link.data_link import DataLink, EmulatorDataLink
from vtpm.guest_link.journal import JournaledPower
from vtpm.guest_link.refusals import Client, Complaints, Refusals
from vtpm.guest_link.unpowered import Refusal, refuse
from vtpm.instance.control import ControlSession
from vtpm.instance.control_client import ControlClient
from vtpm.instance.ends import Ends
from vtpm.instance.lockout_watch import Seen
from vtpm.instance.manager_channel import ManagerChannel, Request
from vtpm.instance.tpm_engine import MakeEngine
from vtpm.instance.worker import Power, Worker
from vtpm.wire.emulator import Command, encode_reply
from vtpm.wire.hold import ParkedKind
from vtpm.wire.instance_spec import InstanceArgs, Role
from vtpm.wire.manager_link import (
    Activated,
    AskLockout,
    ClientChanged,
    ClientKind,
    Done,
    Hello,
    LinkPower,
    LockoutChanged,
    Note,
    PowerChanged,
    PowerOn,
    Ready,
    Shutdown,
    ShutdownMode,
    Wanted,
)

_POWER = {Power.OFF: LinkPower.OFF, Power.ON: LinkPower.ON, Power.FAILED: LinkPower.FAILED}
EXIT_SPENT = 70
"""Exit status of an instance that can serve no more and wants a successor."""


class Ending(enum.Enum):
    """Why the main loop ends."""

    SHUTDOWN = 0
    SPENT = EXIT_SPENT
    ABANDONED = 71


class InstanceServer:
    """See the module.

    Args:
        args: what this instance is told about itself.
        ends: what it is connected to.
        make_engine: makes what carries its TPM out.
    """

    def __init__(self, args: InstanceArgs, ends: Ends, make_engine: MakeEngine = Engine) -> None:
        self._args = args
        self._ends = ends
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._hold = ends.hold
        self._control_journal = ends.control_journal
        self._data_journal = ends.data_journal
        self._channel = ManagerChannel(ends.manager_fd, self._on_manager, self.post, Complaints(self.complain).add)
        failed = args.role is Role.SUCCESSOR and self._control_journal.power is JournaledPower.ON
        self._worker = Worker(
            args.tpm_version,
            self._channel,
            Power.FAILED if failed else Power.OFF,
            self._on_power,
            self._on_detached,
            self._on_lockout,
            self._on_wanted,
            make_engine,
        )
        self._session = ControlSession(self._worker, self._on_failed_move)
        self._control: ControlClient | None = None
        self._control_peer: Client | None = None
        self._emulator_attached = False
        self._data_client: DataLink | None = None
        self._client = ClientKind.NONE
        self._told: ClientChanged | None = None
        # Apart, so that no flood of refusals keeps a failure unsaid.
        self._complaints = Complaints(self._note)
        self._failures = Complaints(self._note)
        self._refusals = Refusals(self, self._complaints)
        self._ending: Ending | None = None
        self.watch(self._wake, self._on_wake)
        self.watch(self._hold, self._on_hold)
        self.watch(self._channel, self._on_channel)
        self.watch(ends.control_listener, self._on_control_connect)
        self.watch(ends.data_listener, self._on_data_connect)

    def start_threads(self) -> None:
        """Start the TPM thread; before the seccomp filter, which forbids it."""
        self._worker.start()

    def run(self) -> int:
        """Serve until told to end; return the exit status."""
        self._take_over()
        while self._ending is None:
            partial_control = self._control if self._control is not None and self._control.is_partial else None
            ready = self._selector.select(None if partial_control is None else PARTIAL_RETRY_S)
            if partial_control is not None:
                partial_control.look_for_rest()
            for key, _ in ready:
                key.data()
                if self._ending is not None:
                    break
        # What is left are the last words to the manager; a manager that does not read does not hear them.
        self._channel.flush()
        return self._ending.value

    # -- taking a guest over ----------------------------------------------------------------------------------------
    def _take_over(self) -> None:
        self._worker.locality = self._control_journal.locality
        if self._ends.data is not None:
            link = EmulatorDataLink(self._ends.data, self._data_journal)
            self._emulator_attached = True
            self._worker.submit(partial(self._worker.do_attach, link))
        if self._ends.control is not None:
            # Known before it is settled, for it may end in that.
            self._control = self._new_control(self._ends.control)
            self._control.settle()
        if self._args.role is Role.SUCCESSOR and not self._emulator_attached and self._worker.power is Power.OFF:
            self._serve_next()
        self._tell_client()

    # -- manager link -----------------------------------------------------------------------------------------------
    def _on_channel(self) -> None:
        if not self._channel.on_ready():
            self._end(Ending.ABANDONED, "the manager link ended")

    def _on_manager(self, message: Request) -> None:
        if isinstance(message, Hello):
            self._channel.forget_unsent()
            if self._worker.lockout.lockout.locked:
                # First, so that a manager that takes this instance for ready knows it.
                self._on_lockout(self._worker.lockout)
            self._channel.tell(
                Ready(
                    message.session,
                    self._args.tpm_version,
                    _POWER[self._worker.power],
                    self._client,
                    self._worker.engine_version,
                    self._channel.last_seq,
                )
            )
            self._told = None
            self._tell_client()
            self._channel.repeat()
            if self._worker.passage.waits:
                self._on_wanted(self._worker.passage.arrival)
        elif isinstance(message, Activated):
            self._worker.passage.activate(message.seq)
        elif isinstance(message, PowerOn):
            self._on_power_on(message)
        elif isinstance(message, AskLockout):
            self._worker.submit(self._worker.do_tell_lockout)
        else:
            self._on_shutdown(message)

    def _on_power_on(self, message: PowerOn) -> None:
        job = partial(self._worker.do_start, message.startup, has_guest=self._emulator_attached)
        self._worker.submit(partial(self._job, job, partial(self._done, message.seq)))

    def _on_shutdown(self, message: Shutdown) -> None:
        orderly = message.mode is ShutdownMode.ORDERLY
        if not orderly:
            self._worker.cancel()
        job = self._worker.do_orderly_power_off if orderly else self._worker.do_power_off

        def finished(error: VtpmError | None) -> None:
            self._done(message.seq, error)
            self._end(Ending.SHUTDOWN, "shut down" if error is None else error.message)

        self._worker.submit(partial(self._job, job, finished))

    def _done(self, seq: int, error: VtpmError | None) -> None:
        self._channel.tell(Done(seq, error.code if error else "", error.message if error else ""))

    # -- control channel --------------------------------------------------------------------------------------------
    def _on_control_connect(self) -> None:
        client = self._ends.control_listener.accept()
        if client is None:
            return
        if self._control is not None:
            self._refusals.refuse(client, encode_reply(Command.GET_CAPABILITY, ControlSession.IN_USE))
            return
        self._control_journal.end()
        self._control = self._new_control(client)

    def _new_control(self, client: Client) -> ControlClient:
        self._control_peer = client
        link = ControlLink(client.sock, self._control_journal)
        return ControlClient(link, self._control_journal, self._session, self._worker, self)

    def on_control_spent(self) -> None:
        """See ControlHost."""
        self._end(Ending.SPENT, "the engine failed; a successor powers the TPM on")

    def set_datafd(self, fd: int | None) -> bytes:
        """See ControlHost."""
        if fd is None or self._control is None:
            return encode_reply(Command.SET_DATAFD, ControlSession.FAIL)
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            return encode_reply(Command.SET_DATAFD, ControlSession.FAIL)
        is_stream = sock.family is socket.AF_UNIX and sock.type is socket.SOCK_STREAM
        if not is_stream or self._emulator_attached or self._has_data_client():
            sock.close()
            self._complaints.add(
                "an emulator was refused its data channel: another client uses the TPM, or it is no stream socket"
            )
            return encode_reply(Command.SET_DATAFD, ControlSession.IN_USE)
        self._hold.park(ParkedKind.DATA, sock.fileno())
        self._hold.park(ParkedKind.CONTROL, self._control.link.fileno())
        self._data_journal.reset()
        self._emulator_attached = True
        self._worker.submit(partial(self._worker.do_attach, EmulatorDataLink(sock, self._data_journal)))
        self._tell_client()
        return encode_reply(Command.SET_DATAFD)

    def on_control_ended(self) -> None:
        """See ControlHost. If it was an emulator, its power goes with it, and the next client may come."""
        self._control = None
        if not self._emulator_attached:
            return
        self._emulator_attached = False
        self._hold.drop(ParkedKind.CONTROL)
        self._hold.drop(ParkedKind.DATA)
        self._worker.submit(self._worker.do_detach)
        self._worker.locality = 0
        self._control_journal.locality = 0
        self._tell_client()
        if self._worker.spent:
            self._end_without_guest()
        else:
            self._serve_next()

    def _serve_next(self) -> None:
        self._worker.submit(partial(self._job, self._worker.do_serve_next, self._on_next))

    def _on_next(self, error: VtpmError | None) -> None:
        if error is None:
            return
        self._failures.add(f"the TPM is not ready for its next client: {error.message}")
        if self._worker.spent and not self._emulator_attached:
            self._end_without_guest()

    def _end_without_guest(self) -> None:
        # Nobody is left who could reset this TPM; a successor that starts powered off serves the next client.
        self._remember(JournaledPower.OFF)
        self._end(Ending.SPENT, "the engine failed and its guest is gone")

    def _remember(self, power: JournaledPower) -> None:
        self._control_journal.power = power
        self._ends.tell_power(power)

    # -- data socket ------------------------------------------------------------------------------------------------
    def _on_data_connect(self) -> None:
        client = self._ends.data_listener.accept()
        if client is None:
            return
        if self._emulator_attached or self._has_data_client():
            self._refusals.refuse(client, refuse(self._args.tpm_version, Refusal.IN_USE))
            return
        self._data_client = DataLink(client.sock)
        self._worker.submit(partial(self._worker.do_attach, self._data_client))
        self._tell_client(client)

    def _has_data_client(self) -> bool:
        # What this thread has accepted counts, not what the TPM thread has come to serve.
        link = self._data_client
        return link is not None and link.alive and not link.peer_gone()

    # -- what is told, and waking up --------------------------------------------------------------------------------
    def _tell_client(self, data_client: Client | None = None) -> None:
        if self._emulator_attached and self._control is not None:
            self._client, who = ClientKind.EMULATOR, self._control_peer
        elif data_client is not None:
            self._client, who = ClientKind.DATA, data_client
        else:
            self._client, who = ClientKind.NONE, None
        told = ClientChanged(self._client, who.pid if who else 0, who.uid if who else 0)
        if told != self._told:
            self._told = told
            self._channel.tell(told)

    def _on_power(self, power: Power, why: str) -> None:
        # In the TPM thread. The journal first: a successor must know before anyone sees it.
        self._remember(JournaledPower.OFF if power is Power.OFF else JournaledPower.ON)
        self._channel.tell(PowerChanged(_POWER[power], why))

    def _on_lockout(self, seen: Seen) -> None:
        # In either thread.
        lockout = seen.lockout
        self._channel.tell(
            LockoutChanged(lockout.locked, lockout.failed_tries, lockout.max_tries, lockout.interval_s, seen.since)
        )

    def _on_wanted(self, arrival: int) -> None:
        # In either thread.
        self._channel.tell(Wanted(arrival))

    def _on_failed_move(self, text: str) -> None:
        # In the TPM thread.
        self.post(partial(self._failures.add, text))

    def _on_detached(self) -> None:
        # In the TPM thread.
        self.post(self._tell_if_free)

    def _tell_if_free(self) -> None:
        if self._worker.link is None:
            self._tell_client()

    def _job(self, job: Callable[[], None], finished: Callable[[VtpmError | None], None]) -> None:
        """Run a job in the TPM thread and report its end in the main thread."""
        try:
            job()
        except VtpmError as error:
            self.post(partial(finished, error))
        else:
            self.post(partial(finished, None))

    def _note(self, text: str) -> None:
        self.complain(text)
        self.tell_note(text)

    def tell_note(self, text: str) -> None:
        """Tell the manager a line for its log; from any thread."""
        self._channel.tell(Note(text))

    def complain(self, text: str) -> None:
        """Write a line to the log."""
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def _on_hold(self) -> None:
        self._end(Ending.ABANDONED, "the launcher has gone")

    def _end(self, ending: Ending, why: str) -> None:
        if self._ending is None:
            self._ending = ending
            self.complain(why)

    def post(self, call: Callable[[], None]) -> None:
        """Have this run in the main thread; from any thread."""
        self._posted.append(call)
        self._poke()

    def _poke(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()

    def watch(self, what: selectors._HasFileno | int, call: Callable[[], None]) -> None:  # type: ignore[name-defined]
        """Call back whenever this is readable."""
        self._selector.register(what, selectors.EVENT_READ, call)

    def unwatch(self, what: selectors._HasFileno | int) -> None:  # type: ignore[name-defined]
        """Call back no more."""
        self._selector.unregister(what)
