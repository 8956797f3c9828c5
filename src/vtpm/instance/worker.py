"""The TPM thread: owns the engine and the guest's data channel, one command at a time.

The main thread (server.py) hands it jobs; between jobs it waits for commands. Nothing else touches the engine, except
`cancel`, which libtpms allows from another thread. Standard library, engine and guest_link only.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from vtpm.engine.engine import Engine, Origin, Served, ServeEnd
from vtpm.errors import (
    ConflictError,
    EngineError,
    StateError,
    StoreError,
    UnavailableError,
    VtpmError,
)
from vtpm.guest_link.data_link import DataLink, EmulatorDataLink
from vtpm.guest_link.unpowered import Refusal, refuse
from vtpm.instance.lockout_watch import LockoutWatch, Seen
from vtpm.instance.passage import Passage, Stage
from vtpm.instance.state_keeper import MoveRefusedError, Permit, StateKeeper
from vtpm.instance.tpm_engine import MakeEngine
from vtpm.tpm.lockout import GET_LOCKOUT
from vtpm.tpm.power_commands import SHUTDOWN_CLEAR, SHUTDOWN_CODE, STARTUP
from vtpm.tpm.return_codes import Rc12, Rc20
from vtpm.tpm.types import Locality, Startup, StateKind, TpmVersion
from vtpm.wire.tpm_stream import BadCommand, BadReason, TpmCommand

EXIT_DEFECT = 72
RETURN_TIMEOUT_S = 1.5
"""A guest's command waits for this, as for a save: its driver gives it 2 s."""
ACTIVATION_TIMEOUT_S = 1.5
"""Likewise."""
RESET_TIMEOUT_S = 8.0
"""How long a reset waits that comes before the first command where a guest has arrived: QEMU ends when it fails."""

_SUCCESS = bytes(4)
_SHUT_DOWN = frozenset({_SUCCESS, Rc20.TPM_RC_INITIALIZE.to_bytes(4, "big")})
"""Answers to TPM2_Shutdown of a TPM that has nothing left to save; the second is that of one never started up."""


class Power(enum.Enum):
    """What the TPM is to its clients."""

    OFF = "off"
    ON = "on"
    FAILED = "failed"
    """Answers failure to everything until the guest resets (decision record 1), or until it is started anew."""


class Worker:
    """The TPM and its thread. Methods named `do_*` run as jobs in the TPM thread, all others anywhere.

    Args:
        version: of the TPM.
        keeper: see StateKeeper.
        power: OFF, or FAILED for the successor of an instance that died powered on.
        report: called in the TPM thread with (power, why) at each change of power.
        detached: called in the TPM thread when a data channel is no longer served.
        report_lockout: called in the TPM thread when a TPM 2.0 became locked or free, and when asked for.
        report_wanted: called in the TPM thread, with the number of the arrival, when a command waits for activation.
        make_engine: makes what carries the TPM out.
    """

    def __init__(
        self,
        version: TpmVersion,
        keeper: StateKeeper,
        power: Power,
        report: Callable[[Power, str], None],
        detached: Callable[[], None],
        report_lockout: Callable[[Seen], None],
        report_wanted: Callable[[int], None],
        make_engine: MakeEngine = Engine,
    ) -> None:
        self._version = version
        self._keeper = keeper
        self._report = report
        self._detached = detached
        self._watch = LockoutWatch(report_lockout)
        self._report_wanted = report_wanted
        self.passage = Passage()
        """Whether the vTPM is here, and not on its way."""
        self.state_in = bytearray()
        """What SET_STATEBLOB has brought; bounded by who fills it. TPM thread."""
        self.state_out = b""
        """What GET_STATEBLOB hands out: sealed. TPM thread."""
        self._permit: Permit | None = None
        self._engine = make_engine(version, self._store)
        self._power = power
        self._link: DataLink | None = None
        self._last: tuple[bytes, bytes] = (b"", b"")
        self._locality = 0
        self._spent = False
        self._inherited = False
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._link_events = 0
        self._thread = threading.Thread(target=self._run, name="tpm", daemon=True)
        self.established = False
        """The established bit as of the last job, so that asking for it never waits for a command."""
        self.info = ""
        """What GET_INFO answers; JSON."""

    # -- for the main thread ----------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the thread. Before confinement's last step, which forbids making threads."""
        self.info = self._engine.info()
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job in the TPM thread after the command under way, if any. Jobs keep their order."""
        self._jobs.append(job)
        os.eventfd_write(self._wake, 1)

    def cancel(self) -> None:
        """Ask libtpms to give up the command under way; it answers TPM_RC_CANCELED where it can."""
        self.passage.give_up()
        self._engine.cancel()

    @property
    def locality(self) -> int:
        """Locality of plain commands, 0 to 4; the control channel sets it."""
        return self._locality

    @locality.setter
    def locality(self, value: int) -> None:
        self._engine.set_default_locality(Locality(value))
        self._locality = value

    @property
    def power(self) -> Power:
        """What the TPM is to its clients."""
        return self._power

    @property
    def spent(self) -> bool:
        """Whether the engine failed, so that only another process can power this TPM on."""
        return self._spent

    @property
    def lockout(self) -> Seen:
        """Whether the TPM is locked, as it was seen last; a TPM 1.2 is never looked at."""
        return self._watch.seen

    @property
    def engine_version(self) -> int:
        """Version of libtpms, MAJOR<<16 | MINOR<<8 | MICRO."""
        major, minor, micro = self._engine.library_version
        return major << 16 | minor << 8 | micro

    @property
    def link(self) -> DataLink | None:
        """The data channel in use."""
        return self._link

    # -- jobs -------------------------------------------------------------------------------------------------------
    def do_start(self, startup: Startup, *, has_guest: bool) -> None:
        """Power the TPM on for the manager, unless a guest was faster: that is what was wanted, too.

        Args:
            startup: as in `do_power_on`.
            has_guest: whether an emulator is attached, which powers the TPM by its own protocol.
        Raises:
            ConflictError: the TPM failed, or a startup was asked for where it is the guest's to send.
            VtpmError: as `do_power_on`.
        """
        if self._power is Power.OFF and not has_guest:
            self.do_power_on(startup)
        elif self._power is Power.FAILED or startup is not Startup.NONE:
            raise ConflictError(f"the TPM is {self._power.value}{' and has a guest' if has_guest else ''}")

    def do_power_on(self, startup: Startup, *, keep_volatile: bool = True) -> None:
        """Power the TPM on with the state that the manager has for it, and give it TPM2_Startup if asked to.

        Raises:
            VtpmError: there is no state for it, or the engine does not take it. The TPM stays off; after an
                EngineError, or when the first state could not be kept, it is FAILED and the engine is spent.
        """
        arrived = bytes(self.state_in)
        self.do_stop()
        answer = self._arrive(arrived) if arrived else self._load()
        # What has come with the guest is no volatile state that a client could mean when it has that deleted.
        keep_volatile = keep_volatile or bool(arrived)
        try:
            if isinstance(answer, Permit):
                self._permit = answer
                self._engine.power_on({}, origin=Origin.MANUFACTURE)
                if self._permit is not None:
                    raise StateError("the engine manufactured a TPM and saved no state for it")
            else:
                state = dict(answer)
                if not keep_volatile:
                    state.pop(StateKind.VOLATILE, None)
                self._engine.power_on(state, origin=Origin.SAVED)
        except VtpmError:
            self._fail("the engine did not power on")
            raise
        finally:
            self._permit = None
        self._last = (b"", b"")
        self._inherited = False
        self._set_power(Power.ON, "powered on")
        self.established = self._engine.established()
        if startup is not Startup.NONE:
            response = self._process(STARTUP[self._version, startup], 0)
            code = response[6:10]
            if code != _SUCCESS:
                raise StateError(f"TPM startup {startup} answered 0x{code.hex()}")

    def _load(self) -> Mapping[StateKind, bytes] | Permit:
        self._take_back(RETURN_TIMEOUT_S)
        if self.passage.stage is Stage.INERT and not self._want(RESET_TIMEOUT_S):
            raise UnavailableError("the vTPM has arrived and is not activated")
        return self._keeper.load()

    def _arrive(self, sealed: bytes) -> Mapping[StateKind, bytes]:
        before = self.passage.stage
        if before not in (Stage.HERE, Stage.INERT):
            raise ConflictError(f"a state was brought for a vTPM that {before.value}")
        try:
            return self._keeper.arrive(sealed, self.passage.expect)
        except MoveRefusedError:
            # It was not taken in, and what was true before is true still.
            self.passage.enter(before)
            raise

    def do_depart(self) -> None:
        """Have the state sealed for another host, into `state_out`; from the first word of this nothing runs.

        Raises:
            StateError, ConflictError: the TPM is not on, or is not here.
            MoveRefusedError: the manager refuses; the TPM goes on.
            VtpmError: nobody knows, and the TPM stands still until its return.
        """
        if self._power is not Power.ON:
            raise StateError("the TPM is not powered on, so it has no state to hand out")
        if self.passage.stage not in (Stage.HERE, Stage.LEAVING):
            raise ConflictError(f"the state of a vTPM that {self.passage.stage.value} is not handed out")
        if self._engine.stays:
            raise ConflictError(self._engine.stays)
        volatile = self._engine.get_state(StateKind.VOLATILE)
        self.passage.enter(Stage.LEAVING)
        try:
            self.state_out = self._keeper.depart(volatile)
        except MoveRefusedError:
            self.passage.enter(Stage.HERE)
            raise

    def do_return(self, timeout_s: float) -> None:
        """Go on here after a departure; nothing when there was none.

        Raises:
            UnavailableError: the manager did not say yet. Ask again.
            MoveRefusedError: the vTPM has moved, now or before.
        """
        self._take_back(timeout_s)

    def _take_back(self, timeout_s: float) -> None:
        if self.passage.stage is Stage.GONE:
            raise MoveRefusedError("the vTPM has moved to another host")
        if self.passage.stage is not Stage.LEAVING:
            return
        try:
            self._keeper.take_back(timeout_s)
        except MoveRefusedError:
            self.passage.enter(Stage.GONE)
            raise
        finally:
            self.state_out = b""
        self.passage.enter(Stage.HERE)

    def do_power_off(self) -> None:
        """Cut the power, as a reset does: what TPM2_Shutdown was not called for is not saved."""
        self.state_in.clear()
        self.state_out = b""
        if self._engine.powered:
            if self.passage.runs and not self._was_shut_down():
                self._watch.power_lost()
            self._engine.power_off()
        if self._power is Power.ON:
            self._set_power(Power.OFF, "powered off")

    def do_stop(self) -> None:
        """Carry out STOP, with which every reset begins. A failed TPM stays failed until INIT.

        An emulator's first STOP is no reset: it ends in order what the clients before it did. That this did not work
        shows in the TPM's power, and is none of the emulator's doing.
        """
        if self._inherited:
            with contextlib.suppress(VtpmError):
                self.do_orderly_power_off()
        self.do_power_off()

    def do_orderly_power_off(self) -> None:
        """Send TPM2_Shutdown(CLEAR) unless a shutdown was the guest's last command, then cut the power.

        Raises:
            StoreError: what TPM2_Shutdown saves was not kept. The power is cut, and the TPM is FAILED.
            EngineError: the TPM did not carry it out. The power is cut.
        """
        code = _SUCCESS
        if self._shuts_down_in_order():
            code = self._process(SHUTDOWN_CLEAR, 0)[6:10]
        lost = self._engine.store_error
        self.do_power_off()
        if code in _SHUT_DOWN:
            return
        if lost is not None:
            raise StoreError(f"the TPM was not shut down in order: its state could not be kept ({lost})")
        raise EngineError(f"the TPM was not shut down in order: it answered TPM2_Shutdown with 0x{code.hex()}")

    def do_serve_next(self) -> None:
        """End in order what the client before did, and be ready for the next one. Raises VtpmError: it is not.

        A vTPM that is on its way is not asked back for that: its QEMU ends when the guest has left with it.
        """
        self.do_orderly_power_off()
        if self.passage.runs:
            self.do_power_on(Startup.NONE)

    def do_store_volatile(self) -> None:
        """Hand the volatile state to the manager. Raises VtpmError: it is not kept."""
        if self._power is not Power.ON:
            raise StateError("the TPM is not powered on, so it has no volatile state")
        self._check_here()
        self._keeper.save(StateKind.VOLATILE, self._engine.get_state(StateKind.VOLATILE), None)

    def do_tell_lockout(self) -> None:
        """Look whether the TPM is locked, if it is on, and report it, changed or not."""
        if self._power is Power.ON and self._version is TpmVersion.V2_0 and self.passage.runs:
            self._look_at_lockout()
        self._watch.tell()

    def do_hash_start(self) -> int:
        """DRTM: begin a measurement. Returns the result code."""
        return self._beside_commands(self._engine.hash_start)

    def do_hash_data(self, data: bytes) -> int:
        """DRTM: measure data. Returns the result code."""
        return self._beside_commands(partial(self._engine.hash_data, data))

    def do_hash_end(self) -> int:
        """DRTM: end a measurement. Returns the result code."""
        return self._beside_commands(self._engine.hash_end)

    def do_reset_established(self, locality: int) -> int:
        """Clear the established bit. Returns the result code."""
        return self._beside_commands(partial(self._engine.reset_established, Locality(locality)))

    def _beside_commands(self, act: Callable[[], int]) -> int:
        """Run what is no command and yet may write state; that this was not kept shows at once, as with a command."""
        if not self._admit():
            return int(Rc12.TPM_FAIL)
        result = act()
        if self._failed_to_store():
            return int(Rc12.TPM_FAIL)
        self.established = self._engine.established()
        return result

    def do_set_buffer_size(self, wanted_bytes: int) -> tuple[int, int, int]:
        """Set the buffer size (0 asks only); returns size, least and most, in bytes."""
        size = self._engine.set_buffer_size(wanted_bytes)
        return size.size, size.min, size.max

    def do_attach(self, link: DataLink) -> None:
        """Serve this data channel from now on, in place of one that is gone."""
        self.do_detach()
        self._link = link
        self._link_events = select.EPOLLIN
        self._poll.register(link, self._link_events)
        if isinstance(link, EmulatorDataLink):
            self._inherited = self._engine.powered
            # A predecessor may have left a request unanswered. Nobody can know what it did; it failed.
            try:
                link.settle(refuse(self._version, Refusal.FAILED))
            except OSError:
                self.do_detach()

    def do_detach(self) -> None:
        """Close the data channel, if there is one."""
        if self._link is not None:
            self._poll.unregister(self._link)
            self._link.close()
            self._link = None
            self._detached()

    # -- the thread -------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._serve_for_ever()
        finally:
            # Only a defect ends this thread, and without it the instance would hang; a successor is better.
            traceback.print_exc()
            os._exit(EXIT_DEFECT)

    def _serve_for_ever(self) -> None:
        while True:
            link, serve = self._link, self._engine.serve
            direct = serve is not None and self._power is Power.ON and self.passage.runs
            if direct and link is not None and link.between_commands:
                assert serve is not None
                self._serve_directly(link, serve)
            else:
                self._serve_waiting()

    def _serve_waiting(self) -> None:
        for fd, _ in self._poll.poll(-1, 2):
            if fd == self._wake:
                self._run_jobs()
                # A job may have put another link at a descriptor that this round of events still names.
                break
            link = self._link
            if link is not None and fd == link.fileno():
                self._serve(link, link.receive)
                if self._link is link:
                    self._wait_on(link)

    def _wait_on(self, link: DataLink) -> None:
        # Edge-triggered for the rest of a command, for what is there of it keeps the socket readable.
        events = select.EPOLLIN | select.EPOLLET if link.waits_for_rest else select.EPOLLIN
        if events != self._link_events:
            self._link_events = events
            self._poll.modify(link, events)

    def _run_jobs(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._jobs:
            self._jobs.popleft()()

    def _serve_directly(self, link: DataLink, serve: Callable[[int, int], Served]) -> None:
        """Let the engine serve the link until there is something to do that it cannot do alone."""
        try:
            served = serve(link.fileno(), self._wake)
        except EngineError as error:
            self._fail(error.message)
            served = Served(ServeEnd.RESPONSE, refuse(self._version, Refusal.FAILED), None)
        if served.last is not None:
            self._note_last(*served.last)
        if served.end is ServeEnd.WOKEN:
            self._run_jobs()
        elif served.end is ServeEnd.INPUT:
            self._serve(link, partial(link.take, served.data))
        else:
            try:
                link.send(served.data)
            except OSError:
                self.do_detach()

    def _serve(self, link: DataLink, take: Callable[[], Sequence[TpmCommand | BadCommand]]) -> None:
        try:
            for command in take():
                link.respond(self._answer(command), command)
            alive = link.alive
        except OSError:
            alive = False
        if not alive:
            self.do_detach()

    def _answer(self, command: TpmCommand | BadCommand) -> bytes:
        if isinstance(command, BadCommand):
            bad_locality = command.reason is BadReason.LOCALITY
            return refuse(self._version, Refusal.BAD_LOCALITY if bad_locality else Refusal.BAD_SIZE)
        if self._power is not Power.ON:
            return refuse(self._version, Refusal.FAILED if self._power is Power.FAILED else Refusal.NOT_POWERED)
        if not self._admit():
            gone = self.passage.stage is Stage.GONE
            return refuse(self._version, Refusal.FAILED if gone else Refusal.IN_USE)
        return self._process(command.data, self.locality if command.locality is None else command.locality)

    def _admit(self) -> bool:
        """Whether a command may run, for which it is held for as long as a guest's driver waits.

        After a departure it is a sign that the guest goes on here; after an arrival, that it goes on at all.
        """
        stage = self.passage.stage
        if stage is Stage.LEAVING:
            with contextlib.suppress(UnavailableError, MoveRefusedError):
                self._take_back(RETURN_TIMEOUT_S)
        elif stage is Stage.INERT:
            self._want(ACTIVATION_TIMEOUT_S)
        return self.passage.runs

    def _want(self, timeout_s: float) -> bool:
        """Say that the guest goes on here, and wait to be activated; return whether the TPM runs."""
        if self.passage.begin_wait():
            self._report_wanted(self.passage.arrival)
        return self.passage.wait_activated(timeout_s)

    def _check_here(self) -> None:
        if not self.passage.runs:
            raise ConflictError(f"nothing runs or is saved of a vTPM that {self.passage.stage.value}")

    def _process(self, command: bytes, locality: int) -> bytes:
        self._check_here()
        try:
            response = self._engine.process(command, Locality(locality))
        except EngineError as error:
            self._fail(error.message)
            return refuse(self._version, Refusal.FAILED)
        self._note_last(command[6:10], response[6:10])
        return response

    def _note_last(self, code: bytes, result: bytes) -> None:
        self._last = code, result
        if self._failed_to_store() or self._version is not TpmVersion.V2_0:
            return
        if self._watch.suspects(int.from_bytes(code, "big"), int.from_bytes(result, "big")):
            self._look_at_lockout()

    def _look_at_lockout(self) -> None:
        # Not as the guest's command: what was its last one stays that.
        try:
            response = self._engine.process(GET_LOCKOUT)
        except EngineError as error:
            self._fail(error.message)
            return
        # Any command may forgive a failed try whose time is over, and keeps that.
        if not self._failed_to_store():
            self._watch.take(response)

    def _failed_to_store(self) -> bool:
        if self._engine.store_error is None:
            return False
        self._fail(f"state could not be kept: {self._engine.store_error}")
        return True

    def _shuts_down_in_order(self) -> bool:
        is_on = self._power is Power.ON and self._version is TpmVersion.V2_0
        return is_on and self.passage.runs and not self._was_shut_down()

    def _was_shut_down(self) -> bool:
        return self._last == (SHUTDOWN_CODE, _SUCCESS)

    def _store(self, kind: StateKind, data: bytes) -> None:
        self._check_here()
        permit = self._permit if kind is StateKind.PERMANENT else None
        self._keeper.save(kind, data, permit)
        if permit is not None:
            self._permit = None

    def _fail(self, why: str) -> None:
        self._spent = True
        self._set_power(Power.FAILED, why)

    def _set_power(self, power: Power, why: str) -> None:
        self._power = power
        self._report(power, why)
