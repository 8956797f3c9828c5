"""The instance's end of the manager link: asks for state, has state kept, and hears what the manager wants.

The TPM thread calls `load` and `save`, which send and wait, bounded. While it waits it reads the link itself, for each
thread that an answer passes through makes a save slower; the main thread moves all other bytes, and is given what was
not for the TPM thread. After a manager's restart the new one says Hello on the same descriptor; what is open is then
asked again, with the same sequence number, which is harmless (the vault knows the last save it committed).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from vtpm.errors import ProtocolError, StateError, StoreError, UnavailableError, VtpmError
from vtpm.instance.outbox import Outbox
from vtpm.instance.state_keeper import MoveRefusedError, Permit
from vtpm.tpm.types import StateKind
from vtpm.wire.framing import BadFrame, Deframer
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    MAX_SEQ,
    Activated,
    Arrive,
    AskLockout,
    Depart,
    Departed,
    Direction,
    Hello,
    Load,
    LoadError,
    MoveError,
    PowerOn,
    Retry,
    Return,
    Returned,
    SaveBegin,
    Saved,
    SaveError,
    SealedPart,
    Shutdown,
    StateChunk,
    StateEnd,
    ToManager,
    decode_message,
)
from vtpm.wire.manager_link import Permit as PermitMessage
from vtpm.wire.manager_link_moves import BlobReceiver, move_messages
from vtpm.wire.manager_link_peers import StateReceiver, save_messages

LOAD_TIMEOUT_S = 5.0
"""A Load happens at power-on; firmware waits longer for a TPM than a running driver does."""
SAVE_TIMEOUT_S = 1.5
"""Linux gives most TPM 2.0 commands 2 s (tpm2_calc_ordinal_duration); the answer must be there before."""
DEPART_TIMEOUT_S = 8.0
"""The guest is paused, and its switch-over waits: the manager has a durable record to write, and perhaps its anchor."""
ARRIVE_TIMEOUT_S = 8.0
"""Likewise at the other host."""
RETRY_DELAY_S = 0.1
Request = Hello | PowerOn | Shutdown | AskLockout | Activated
"""What the manager says unasked."""
_RECEIVE_BYTES = 65536
_FRAMES_SENT = 2
"""At most, in one call: a save's head and its body, for most states have but one."""


@dataclass
class _Open:
    """One question to the manager that has no answer yet."""

    seq: int
    messages: tuple[ToManager, ...] = field(repr=False)
    asks: type[ToManager]
    state: StateReceiver = field(init=False)
    """For a Load and an Arrive."""
    sealed: BlobReceiver = field(init=False)
    """For a Depart."""
    answered: bool = False
    result: Mapping[StateKind, bytes] | Permit | bytes | None = field(default=None, repr=False)
    error: VtpmError | None = None
    retry: Retry = Retry.FINAL

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nothing of the answer has come."""
        self.state, self.sealed = StateReceiver(self.seq), BlobReceiver()

    def take(self, message: object) -> None:
        """Take a message that names this question. Raises ProtocolError: it is no answer to it."""
        match message:
            case StateChunk() | StateEnd() if self.asks in (Load, Arrive):
                self.result = self.state.receive(message)
                self.answered = self.result is not None
                return
            case Departed() | SealedPart() if self.asks is Depart:
                blob = self.sealed.receive(message)
                self.result = blob.data if blob is not None else None
                self.answered = blob is not None
                return
            case PermitMessage() if self.asks is Load:
                self.result = Permit(message.permit_id)
            case LoadError() if self.asks is Load:
                self.error, self.retry = StateError(f"{message.code}: {message.message}"), message.retry
            case MoveError() if self.asks in (Depart, Return, Arrive):
                self.error, self.retry = MoveRefusedError(f"{message.code}: {message.message}"), message.retry
            case SaveError() if self.asks is SaveBegin:
                self.error = StoreError(f"{message.code}: {message.message}")
            case Saved() if self.asks is SaveBegin:
                pass
            case Returned() if self.asks is Return:
                pass
            case _:
                raise ProtocolError(f"a {type(message).__name__} does not answer question {self.seq}")
        self.answered = True


class ManagerChannel:
    """See the module.

    Args:
        fd: the link, which is read and written, be it a socket or a virtio-serial port; made non-blocking.
        on_request: called in the main thread with each Request.
        post: has something run in the main thread.
        complain: takes a line for the log.
    """

    def __init__(
        self,
        fd: int,
        on_request: Callable[[Request], None],
        post: Callable[[Callable[[], None]], None],
        complain: Callable[[str], None],
    ) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._on_request = on_request
        self._post = post
        self._complain = complain
        self._deframer = Deframer(MAX_BODY_BYTES)
        self._reading = threading.Lock()
        """Held from taking bytes of the link to the end of what they say, so that messages keep their order."""
        self._lock = threading.Lock()
        """Guards all below."""
        self._out = Outbox()
        self._open: _Open | None = None
        self._last_seq = 0
        # What the main thread waits for lies in an epoll object of its own, which either thread may change.
        self._watched = select.epoll()
        self._events = select.EPOLLIN
        self._watched.register(fd, self._events)
        # The main thread may have begun to read when the TPM thread begins to wait, and so come upon the answer.
        self._answered = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._own_poll = select.poll()
        self._own_poll.register(fd, select.POLLIN)
        self._own_poll.register(self._answered, select.POLLIN)

    # -- TPM thread -------------------------------------------------------------------------------------------------
    def load(self) -> Mapping[StateKind, bytes] | Permit:
        """Ask for the vTPM's state; see StateKeeper.

        Raises:
            UnavailableError: no answer in LOAD_TIMEOUT_S.
            StateError: the manager refuses.
        """
        deadline_s = time.monotonic() + LOAD_TIMEOUT_S
        while True:
            seq = self._next_seq()
            question = _Open(seq, (Load(seq),), Load)
            self._ask(question, deadline_s, "state to load")
            if question.result is not None:
                assert not isinstance(question.result, bytes)
                return question.result
            if question.retry is Retry.FINAL or time.monotonic() + RETRY_DELAY_S > deadline_s:
                raise question.error or StateError("the manager gave no state")
            time.sleep(RETRY_DELAY_S)

    def save(self, kind: StateKind, data: bytes, permit: Permit | None) -> None:
        """Have a blob kept; see StateKeeper.

        Raises:
            UnavailableError: no answer in SAVE_TIMEOUT_S.
            StoreError: the manager could not make it durable, or refuses it.
        """
        seq = self._next_seq()
        messages = tuple(save_messages(seq, kind, data, permit.permit_id if permit else None))
        question = _Open(seq, messages, SaveBegin)
        self._ask(question, time.monotonic() + SAVE_TIMEOUT_S, f"a save of {kind.name} state")
        if question.error is not None:
            raise question.error

    def depart(self, volatile: bytes) -> bytes:
        """Give the volatile state for another host, and return all state sealed for that one; see StateKeeper."""
        seq = self._next_seq()
        sealed = self._move(_Open(seq, tuple(move_messages(Depart, seq, volatile)), Depart), DEPART_TIMEOUT_S)
        assert isinstance(sealed, bytes)
        return sealed

    def take_back(self, timeout_s: float) -> None:
        """Ask to go on here after a departure; see StateKeeper."""
        seq = self._next_seq()
        self._move(_Open(seq, (Return(seq),), Return), timeout_s)

    def arrive(self, sealed: bytes, begun: Callable[[int], None]) -> Mapping[StateKind, bytes]:
        """Give a sealed state that was brought, and return it opened; see StateKeeper."""
        seq = self._next_seq()
        begun(seq)
        state = self._move(_Open(seq, tuple(move_messages(Arrive, seq, sealed)), Arrive), ARRIVE_TIMEOUT_S)
        assert isinstance(state, Mapping)
        return state

    def _move(self, question: _Open, timeout_s: float) -> Mapping[StateKind, bytes] | Permit | bytes | None:
        self._ask(question, time.monotonic() + timeout_s, f"{question.asks.__name__} of a move")
        if question.error is None:
            return question.result
        if question.retry is Retry.LATER:
            raise UnavailableError(question.error.message)
        raise question.error

    def _next_seq(self) -> int:
        with self._lock:
            if self._last_seq >= MAX_SEQ:
                raise ProtocolError("the sequence numbers of this instance are used up", next_step="Reset the guest")
            self._last_seq += 1
            return self._last_seq

    def _ask(self, question: _Open, deadline_s: float, what: str) -> None:
        with self._lock:
            self._open = question
            self._out.ask(question.messages)
            # From this thread, for a save waits for it; what the link does not take is the main thread's to send.
            with contextlib.suppress(OSError):
                self._send()
            self._watch()
        self._await_answer(question, deadline_s)
        with self._lock:
            self._open = None
            self._out.give_up(question.messages)
            self._watch()
        if not question.answered:
            raise UnavailableError(f"the manager did not answer {what} in time")

    def _await_answer(self, question: _Open, deadline_s: float) -> None:
        while not question.answered:
            ready = self._own_poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._answered)
            # A link that has ended is the main thread's to see, and ends the process.
            if not ready or not (question.answered or self._take()):
                return

    # -- any thread -------------------------------------------------------------------------------------------------
    def tell(self, message: ToManager) -> None:
        """Send a message that has no answer, or is one. A manager that does not read misses some: see Outbox."""
        with self._lock:
            self._out.put(message)
            self._watch()

    @property
    def last_seq(self) -> int:
        """The highest sequence number used so far."""
        return self._last_seq

    # -- main thread ------------------------------------------------------------------------------------------------
    def fileno(self) -> int:
        """Descriptor to wait on, until it is readable."""
        return self._watched.fileno()

    def on_ready(self) -> bool:
        """Send what the link takes, and take what has come. Returns False when the link has ended."""
        events = sum(mask for _, mask in self._watched.poll(0))
        if events & select.EPOLLOUT and not self.flush():
            return False
        return not events & ~select.EPOLLOUT or self._take()

    def flush(self) -> bool:
        """Send what the link takes. Returns False when the link has ended."""
        with self._lock:
            try:
                self._send()
            except OSError:
                return False
            self._watch()
        return True

    def repeat(self) -> None:
        """Ask again what is open: another manager has said Hello."""
        with self._lock:
            question = self._open
            if question is None:
                return
            question.begin()
            self._out.ask(question.messages)
            self._watch()

    def forget_unsent(self) -> None:
        """Drop what was queued for a manager that is gone, from the next frame on."""
        with self._lock:
            self._out.clear()
            self._watch()

    # -- either -----------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Have the main thread woken for what it is to do: never for an answer that the TPM thread waits for."""
        events = (0 if self._open is not None else select.EPOLLIN) | (select.EPOLLOUT if self._out else 0)
        if events != self._events:
            self._events = events
            self._watched.modify(self._fd, events)

    def _take(self) -> bool:
        """Take what has come and act on it. Returns False when the link has ended."""
        with self._reading:
            try:
                data = os.read(self._fd, _RECEIVE_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            for body in self._deframer.feed(data):
                if isinstance(body, BadFrame):
                    self._complain(f"manager link: a frame was skipped: {body.damage.value}")
                    continue
                try:
                    self._receive(body)
                except ProtocolError as error:
                    self._complain(f"manager link: {error}")
        return bool(data)

    def _send(self) -> None:
        while self._out:
            try:
                # Together, so that the manager is woken once for a save.
                self._out.sent(os.write(self._fd, b"".join(self._out.heads(_FRAMES_SENT))))
            except BlockingIOError:
                return

    def _receive(self, body: bytes) -> None:
        message = decode_message(body, Direction.TO_INSTANCE)
        if isinstance(message, Request):
            # From either thread, so that they keep their order.
            self._post(partial(self._on_request, message))
            return
        with self._lock:
            question = self._open
            if question is None or getattr(message, "seq", None) != question.seq:
                # An answer to a question given up, or given twice after a manager's restart.
                return
            question.take(message)
            if not question.answered:
                return
        os.eventfd_write(self._answered, 1)
