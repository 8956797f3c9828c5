"""The manager's end of one instance's manager link, under asyncio.

Identity is this object's: it was made with the descriptor that the launcher gave for one vTPM and instance, and no
message can claim another. Messages are refused and counted when they are malformed or out of order, never followed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from vtpm.errors import ProtocolError, StateError, StoreError, UnavailableError, VtpmError
from vtpm.manager.instance_moves import NO_MOVE, InstanceMoves, MoveCalls
from vtpm.tpm.types import InstanceId, Startup, TpmVersion, VtpmId
from vtpm.vault.records import SaveAck
from vtpm.vault.vault import PermitGranted, Vault
from vtpm.wire.allowance import Allowance
from vtpm.wire.framing import END, BadFrame, Deframer, encode_frame
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    SESSION_BYTES,
    Arrive,
    AskLockout,
    ClientChanged,
    Depart,
    Direction,
    Done,
    Hello,
    LinkPower,
    Load,
    LoadError,
    LockoutChanged,
    MovePart,
    Note,
    Permit,
    PowerChanged,
    PowerOn,
    Ready,
    Retry,
    Return,
    SaveBegin,
    SaveChunk,
    Saved,
    SaveError,
    Shutdown,
    ShutdownMode,
    ToInstance,
    Wanted,
    decode_message,
    encode_message,
)
from vtpm.wire.manager_link_peers import CompletedSave, SaveReceiver, state_messages

_READ_BYTES = 65536
NONSENSE_BURST, NONSENSE_PER_S = 100, 1.0
"""How many messages of an instance may be refused, at once and in the long run, before it is ended."""
FRAMES_BURST, FRAMES_PER_S = 4000, 2000.0
"""How many frames are taken from one instance: more than it can have saved. Their borders are what is counted."""
BYTES_BURST, BYTES_PER_S = 16 << 20, float(16 << 20)
"""How many bytes likewise: twice what saves without pause come to, unless a guest has filled its NV."""
LOADS_BURST, LOADS_PER_S = 20, 1.0
"""How many loads are answered at once: a guest causes one with each reset. Then each waits for its turn."""
_MAX_OUT_BYTES = 16 * 1024 * 1024
_COMPLAINTS_LOGGED = 10
_log = logging.getLogger("vtpm.manager.link")


@dataclass
class LinkFacts:
    """What the instance has said of itself."""

    power: LinkPower = LinkPower.OFF
    client: ClientChanged | None = None
    engine_version: int = 0
    lockout: LockoutChanged | None = None
    """Only while the TPM is locked."""


class InstanceLink:
    """See the module.

    Args:
        sock: the descriptor from the launcher.
        name, vtpm_id, instance_id, tpm_version: whose it is.
        vault: where its saves go.
        on_change: called when `facts` changed, with a line for the audit log or "".
        on_misbehaviour: called once, when it has sent more nonsense than a restart or a lost byte explains.
        moves: who decides what it asks about a live move; by default everything is refused.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        vtpm_id: VtpmId,
        instance_id: InstanceId,
        tpm_version: TpmVersion,
        vault: Vault,
        on_change: Callable[[InstanceLink, str], None],
        on_misbehaviour: Callable[[InstanceLink], None],
        moves: MoveCalls = NO_MOVE,
    ) -> None:
        sock.setblocking(False)
        self.name = name
        self.vtpm_id = vtpm_id
        self.instance_id = instance_id
        self.facts = LinkFacts()
        self.complaints = 0
        """Messages refused so far."""
        self._sock = sock
        self._tpm_version = tpm_version
        self._vault = vault
        self._on_change = on_change
        self._on_misbehaviour = on_misbehaviour
        self._nonsense = Allowance(burst=NONSENSE_BURST, per_second=NONSENSE_PER_S)
        self._borders = Allowance(burst=2 * FRAMES_BURST, per_second=2 * FRAMES_PER_S)
        self._bytes = Allowance(burst=BYTES_BURST, per_second=BYTES_PER_S)
        self._loads = Allowance(burst=LOADS_BURST, per_second=LOADS_PER_S)
        self._loop = asyncio.get_running_loop()
        self._deframer = Deframer(MAX_BODY_BYTES)
        self._saves = SaveReceiver()
        self._saving: Future[SaveAck] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._moves = InstanceMoves(moves, self._send)
        # Guards `_out`, the socket's end and writes to it: answers to saves are sent from the store's thread.
        self._sending = threading.Lock()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._seq = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Done]] = {}
        self._looking: asyncio.Future[None] | None = None
        self._session = secrets.token_bytes(SESSION_BYTES)
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self.closed = False
        self._condemned = False
        self._loop.add_reader(sock, self._on_readable)
        self._send(Hello(self._session))

    # -- what the manager wants -------------------------------------------------------------------------------------
    async def ready(self, timeout_s: float) -> Ready:
        """Wait until the instance has answered the hello.

        Raises:
            UnavailableError: it did not in this time, or the link ended.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except TimeoutError:
            raise UnavailableError(f"the instance of {self.name} did not answer in {timeout_s:g} s") from None

    async def power_on(self, startup: Startup, timeout_s: float) -> None:
        """Have the TPM powered on. Raises VtpmError: it was not; the message says why."""
        await self._ask(lambda seq: PowerOn(seq, startup), "power-on", timeout_s)

    async def shut_down(self, mode: ShutdownMode, timeout_s: float) -> None:
        """Have the TPM powered off and the instance end. Raises VtpmError: it did not."""
        await self._ask(lambda seq: Shutdown(seq, mode), "shutdown", timeout_s)

    async def ask_lockout(self, timeout_s: float) -> None:
        """Have the instance look whether its TPM is still locked; return when it has said so, or time is up."""
        if self._looking is None:
            # One question at a time, however many want to know and however long a command keeps the TPM busy.
            self._looking = self._loop.create_future()
            self._send(AskLockout())
        await asyncio.wait({self._looking}, timeout=timeout_s)

    @property
    def wanted(self) -> bool:
        """Whether its guest waits for the vTPM to be activated; see InstanceMoves."""
        return self._moves.wanted

    def activate(self) -> None:
        """Let the vTPM run that has arrived at this instance; see InstanceMoves."""
        self._moves.activate()

    def close(self) -> None:
        """Let go of the link. Saves under way go on in the vault, and are not answered."""
        with self._sending:
            if self.closed:
                return
            self.closed = True
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
        if self._loading is not None:
            self._loading.cancel()
        self._moves.close()
        gone = UnavailableError(f"the instance of {self.name} is gone")
        waiters: list[asyncio.Future[Any]] = [self._ready, *self._asked.values()]
        for waiting in waiters:
            if not waiting.done():
                waiting.set_exception(gone)
                # Nobody may be waiting; that is no defect.
                waiting.exception()
        self._asked.clear()
        self._answer_lockout()

    async def _ask(self, message: Callable[[int], PowerOn | Shutdown], what: str, timeout_s: float) -> None:
        seq = next(self._seq)
        answer: asyncio.Future[Done] = self._loop.create_future()
        self._asked[seq] = answer
        self._send(message(seq))
        try:
            done = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"the instance of {self.name} did not finish its {what} in {timeout_s:g} s"
            ) from None
        finally:
            self._asked.pop(seq, None)
        if done.code:
            raise StateError(f"{what} of {self.name} failed ({done.code}): {done.message}")

    # -- bytes ------------------------------------------------------------------------------------------------------
    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # The launcher says what became of the instance; here it is only silent.
            self._loop.remove_reader(self._sock)
            return
        self._pace(data)
        for body in self._deframer.feed(data):
            if self.closed or self._condemned:
                return
            if isinstance(body, BadFrame):
                self._complain(f"a frame was skipped: {body.damage.value}")
                continue
            try:
                self._receive(decode_message(body, Direction.TO_MANAGER))
            except ProtocolError as error:
                self._complain(error.message)

    def _send(self, message: ToInstance) -> None:
        if not self._put(message):
            self._see_to_rest()

    def _put(self, message: ToInstance) -> bool:
        """Queue a message and send what the socket takes; False when something is left to see to. From any thread."""
        frame = encode_frame(encode_message(message))
        with self._sending:
            if self.closed:
                return True
            self._out_bytes += len(frame)
            self._out.append(memoryview(frame))
            if len(self._out) == 1:
                self._send_waiting()
            return not self._out

    def _see_to_rest(self) -> None:
        if self.closed:
            return
        if self._out_bytes > _MAX_OUT_BYTES:
            self._complain("it asks for more than it reads; the link is closed")
            # Without a link it would go on under its guest, answering nobody here.
            self._condemn()
            self.close()
        elif self._out:
            self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        with self._sending:
            self._send_waiting()
            if not self._out:
                self._loop.remove_writer(self._sock)

    def _send_waiting(self) -> None:
        while self._out:
            try:
                sent = self._sock.send(self._out[0])
            except BlockingIOError:
                return
            except OSError:
                self._out.clear()
                self._out_bytes = 0
                return
            self._out_bytes -= sent
            if sent < len(self._out[0]):
                self._out[0] = self._out[0][sent:]
            else:
                self._out.popleft()

    def _pace(self, data: bytes) -> None:
        """Leave a link alone for as long as it has sent too fast: its siblings share this loop."""
        pause_s = max(self._borders.overdraw(data.count(END)), self._bytes.overdraw(len(data)))
        if pause_s:
            self._loop.remove_reader(self._sock)
            self._loop.call_later(pause_s, self._resume)

    def _resume(self) -> None:
        if not self.closed and not self._condemned:
            self._loop.add_reader(self._sock, self._on_readable)

    def _complain(self, what: str) -> None:
        self.complaints += 1
        if not self._nonsense.take():
            self._condemn()
        if self.complaints <= _COMPLAINTS_LOGGED or self.complaints % 1000 == 0:
            _log.warning("%s: refused (%d so far): %s", self.name, self.complaints, what)

    def _condemn(self) -> None:
        if self._condemned:
            return
        self._condemned = True
        self._loop.remove_reader(self._sock)
        _log.error("%s: its instance is to be ended: %d messages were refused", self.name, self.complaints)
        self._on_misbehaviour(self)

    # -- messages ---------------------------------------------------------------------------------------------------
    def _receive(self, message: object) -> None:
        match message:
            case SaveBegin() | SaveChunk() | Load() if not self._ready.done():
                # Sent before the instance heard this hello, perhaps to a manager that died. Nothing is known of its
                # engine yet, and what is still open comes once more after Ready.
                return
            case SaveBegin() | SaveChunk():
                save = self._saves.receive(message)
                if save is not None:
                    self._save(save)
            case Load(seq=seq):
                if self._loading is not None and not self._loading.done():
                    raise ProtocolError("a load came while another was being answered")
                self._loading = self._loop.create_task(self._load(seq))
            case Depart() | Return() | Arrive() | MovePart() | Wanted():
                if self._ready.done():
                    self._moves.receive(message)
            case Ready():
                self._on_ready(message)
            case PowerChanged(power=power, why=why):
                self.facts.power = power
                self._on_change(self, why if power is LinkPower.FAILED else "")
            case ClientChanged():
                self.facts.client = message
                self._on_change(self, "")
            case Done(seq=seq):
                answer = self._asked.get(seq)
                if answer is None or answer.done():
                    raise ProtocolError(f"nobody asked for the answer to {seq}")
                answer.set_result(message)
            case Note(message=text):
                self._on_change(self, text)
            case LockoutChanged(locked=locked):
                self.facts.lockout = message if locked else None
                self._answer_lockout()
                self._on_change(self, "")

    def _answer_lockout(self) -> None:
        if self._looking is not None:
            self._looking.set_result(None)
            self._looking = None

    def _on_ready(self, message: Ready) -> None:
        if message.session != self._session:
            raise ProtocolError("it answered another hello")
        if message.tpm_version is not self._tpm_version:
            raise ProtocolError(f"it says it is a TPM {message.tpm_version}, not a {self._tpm_version}")
        self.facts.power = message.power
        self.facts.engine_version = message.engine_version
        if not self._ready.done():
            self._ready.set_result(message)
        self._on_change(self, "")

    def _save(self, save: CompletedSave) -> None:
        if self._saving is not None and not self._saving.done():
            self._refuse_save(save.seq, ProtocolError("a save came while another was under way"))
            return
        try:
            self._saving = self._vault.save(
                self.vtpm_id, self.instance_id, save.seq, save.kind, save.data, save.permit_id
            )
        except VtpmError as error:
            self._refuse_save(save.seq, error)
            return
        self._saving.add_done_callback(partial(self._saved, save.seq))

    def _saved(self, seq: int, done: Future[SaveAck]) -> None:
        """Answer a save. In the store's thread: what it has made durable need not wait until this loop is woken."""
        error = done.exception()
        if error is not None:
            self._loop.call_soon_threadsafe(self._refuse_save, seq, error)
        elif not self._put(Saved(seq)):
            self._loop.call_soon_threadsafe(self._see_to_rest)

    def _refuse_save(self, seq: int, error: BaseException) -> None:
        known = error if isinstance(error, VtpmError) else StoreError(f"the vault failed: {type(error).__name__}")
        self._complain(f"save {seq}: {known.message}")
        self._send(SaveError(seq, Retry.FINAL, known.code, known.message))
        self._on_change(self, f"a save was refused: {known.message}")

    async def _load(self, seq: int) -> None:
        while not self._loads.take():
            # Reading and sending megabytes again and again would be at its siblings' expense.
            await asyncio.sleep(1 / LOADS_PER_S)
        try:
            answer = await asyncio.to_thread(
                self._vault.load, self.vtpm_id, self.instance_id, self.facts.engine_version
            )
        except VtpmError as error:
            retry = Retry.LATER if isinstance(error, StoreError) else Retry.FINAL
            _log.error("%s: load refused: %s", self.name, error)
            self._send(LoadError(seq, retry, error.code, error.message))
            self._on_change(self, f"a load was refused: {error.message}")
            return
        if isinstance(answer, PermitGranted):
            self._send(Permit(seq, answer.permit_id))
            return
        for message in state_messages(seq, answer):
            self._send(message)
