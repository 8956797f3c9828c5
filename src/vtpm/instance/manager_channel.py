"""The instance's end of the manager link: asks for state, has state kept, and hears what the manager wants.

The TPM thread calls `load` and `save`, which send and wait, bounded; the main thread moves all other bytes. After a
manager's restart the new one says Hello on the same descriptor; what is open is then asked again, with the same
sequence number, which is harmless (the vault knows the last save it committed).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vtpm.errors import ProtocolError, StateError, StoreError, UnavailableError, VtpmError
from vtpm.instance.outbox import Outbox
from vtpm.instance.state_keeper import Permit
from vtpm.tpm.types import StateKind
from vtpm.wire.framing import BadFrame, Deframer
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    MAX_SEQ,
    AskLockout,
    Direction,
    Hello,
    Load,
    LoadError,
    PowerOn,
    Retry,
    Saved,
    SaveError,
    Shutdown,
    StateChunk,
    StateEnd,
    ToManager,
    decode_message,
)
from vtpm.wire.manager_link import Permit as PermitMessage
from vtpm.wire.manager_link_peers import StateReceiver, save_messages

LOAD_TIMEOUT_S = 5.0
"""A Load happens at power-on; firmware waits longer for a TPM than a running driver does."""
SAVE_TIMEOUT_S = 1.5
"""Linux gives most TPM 2.0 commands 2 s (tpm2_calc_ordinal_duration); the answer must be there before."""
RETRY_DELAY_S = 0.1
_RECEIVE_BYTES = 65536
_FRAMES_SENT = 8
"""At most, in one call."""


@dataclass
class _Open:
    """One question to the manager that has no answer yet."""

    seq: int
    messages: tuple[ToManager, ...] = field(repr=False)
    state: StateReceiver | None
    """For a Load."""
    answered: threading.Event = field(default_factory=threading.Event)
    result: Mapping[StateKind, bytes] | Permit | None = field(default=None, repr=False)
    error: VtpmError | None = None
    retry: Retry = Retry.FINAL


class ManagerChannel:
    """See the module.

    Args:
        sock: the link; made non-blocking.
        on_request: called in the main thread with Hello, PowerOn, Shutdown and AskLockout.
        wake: makes the main thread call `want_write` again.
        complain: takes a line for the log.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_request: Callable[[Hello | PowerOn | Shutdown | AskLockout], None],
        wake: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_request = on_request
        self._wake = wake
        self._complain = complain
        self._deframer = Deframer(MAX_BODY_BYTES)
        self._lock = threading.Lock()
        self._out = Outbox()
        self._open: _Open | None = None
        self._last_seq = 0

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
            question = _Open(seq, (Load(seq),), StateReceiver(seq))
            self._ask(question, deadline_s, "state to load")
            if question.result is not None:
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
        question = _Open(seq, messages, None)
        self._ask(question, time.monotonic() + SAVE_TIMEOUT_S, f"a save of {kind.name} state")
        if question.error is not None:
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
            # From this thread, for a save waits for it; what the socket does not take is the main thread's to send.
            with contextlib.suppress(OSError):
                self._send()
            unsent = bool(self._out)
        if unsent:
            self._wake()
        answered = question.answered.wait(max(0.0, deadline_s - time.monotonic()))
        with self._lock:
            self._open = None
            self._out.give_up(question.messages)
        if not answered:
            raise UnavailableError(f"the manager did not answer {what} in time")

    # -- any thread -------------------------------------------------------------------------------------------------
    def tell(self, message: ToManager) -> None:
        """Send a message that has no answer, or is one. A manager that does not read misses some: see Outbox."""
        with self._lock:
            self._out.put(message)
        self._wake()

    @property
    def last_seq(self) -> int:
        """The highest sequence number used so far."""
        return self._last_seq

    # -- main thread ------------------------------------------------------------------------------------------------
    def fileno(self) -> int:
        """Descriptor to wait on."""
        return self._sock.fileno()

    @property
    def want_write(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(self._out)

    def on_writable(self) -> None:
        """Send what the socket takes. Raises OSError: the link is gone."""
        with self._lock:
            self._send()

    def on_readable(self) -> bool:
        """Take what has come. Returns False when the link has ended. Raises OSError: the link is gone."""
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        for body in self._deframer.feed(data):
            if isinstance(body, BadFrame):
                self._complain(f"manager link: a frame was skipped: {body.damage.value}")
                continue
            try:
                self._receive(body)
            except ProtocolError as error:
                self._complain(f"manager link: {error}")
        return True

    def repeat(self) -> None:
        """Ask again what is open: another manager has said Hello."""
        with self._lock:
            question = self._open
            if question is None:
                return
            if question.state is not None:
                question.state = StateReceiver(question.seq)
            self._out.ask(question.messages)
        self._wake()

    def forget_unsent(self) -> None:
        """Drop what was queued for a manager that is gone, from the next frame on."""
        with self._lock:
            self._out.clear()

    def _send(self) -> None:
        while self._out:
            try:
                # Together, so that the manager is woken once for a save.
                self._out.sent(self._sock.sendmsg(self._out.heads(_FRAMES_SENT)))
            except BlockingIOError:
                return

    def _receive(self, body: bytes) -> None:
        message = decode_message(body, Direction.TO_INSTANCE)
        if isinstance(message, Hello | PowerOn | Shutdown | AskLockout):
            self._on_request(message)
            return
        with self._lock:
            question = self._open
            seq = getattr(message, "seq", None)
            if question is None or seq != question.seq:
                # An answer to a question given up, or given twice after a manager's restart.
                return
            is_load = question.state is not None
            if isinstance(message, StateChunk | StateEnd) and question.state is not None:
                state = question.state.receive(message)
                if state is None:
                    return
                question.result = state
            elif isinstance(message, PermitMessage) and is_load:
                question.result = Permit(message.permit_id)
            elif isinstance(message, LoadError) and is_load:
                question.error = StateError(f"{message.code}: {message.message}")
                question.retry = message.retry
            elif isinstance(message, SaveError) and not is_load:
                question.error = StoreError(f"{message.code}: {message.message}")
            elif not (isinstance(message, Saved) and not is_load):
                raise ProtocolError(f"a {type(message).__name__} does not answer question {seq}")
        question.answered.set()
