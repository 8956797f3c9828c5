"""What each control command does to the TPM: a table from request to reply or job. No I/O; main thread.

Semantics follow QEMU 7.2 and Debian's swtpm 0.7.1 where they agree. Not with state: GET_STATEBLOB hands out what the
manager has sealed for the one host that the vTPM goes to, and nothing without that; SET_STATEBLOB takes in nothing
else, and INIT has the manager open it. The one blob is called permanent, and holds all kinds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vtpm.errors import VtpmError
from vtpm.instance.worker import Power, Worker
from vtpm.tpm.return_codes import Rc12
from vtpm.tpm.types import MAX_SEALED_BYTES, Startup, StateKind
from vtpm.wire.emulator import (
    MAX_INFO_BYTES,
    Capability,
    Command,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    InitFlags,
    LockStorage,
    Malformed,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    StateFlags,
    encode_reply,
    error_reply,
)

CAPABILITIES = (
    Capability.INIT
    | Capability.SHUTDOWN
    | Capability.GET_TPMESTABLISHED
    | Capability.SET_LOCALITY
    | Capability.HASHING
    | Capability.CANCEL_TPM_CMD
    | Capability.STORE_VOLATILE
    | Capability.RESET_TPMESTABLISHED
    | Capability.GET_STATEBLOB
    | Capability.SET_STATEBLOB
    | Capability.STOP
    | Capability.GET_CONFIG
    | Capability.SET_DATAFD
    | Capability.SET_BUFFERSIZE
    | Capability.GET_INFO
    | Capability.SEND_COMMAND_HEADER
    | Capability.LOCK_STORAGE
)
_LOCK_RETRY_S = 0.01
_MOST_LOCK_RETRIES = 800


class Interrupt(enum.Enum):
    """Whether a request gives up the TPM command under way."""

    NO = 0
    YES = 1


@dataclass(frozen=True)
class Outcome:
    """What a request leads to: a reply now, or a job for the TPM thread that returns the reply.

    `cancel`: the TPM command under way is to be given up first.
    """

    reply: bytes = b""
    job: Callable[[], bytes] | None = None
    cancel: bool = False


class ControlSession:
    """See the module.

    Args:
        worker: the TPM.
        complain: takes a line for the log, in the TPM thread.
    """

    FAIL = int(Rc12.TPM_FAIL)
    IN_USE = int(Rc12.TPM_RETRY)

    def __init__(self, worker: Worker, complain: Callable[[str], None]) -> None:
        self._worker = worker
        self._complain = complain

    def handle(self, request: object) -> Outcome:
        """Return what a request leads to. SET_DATAFD is not handled here: it brings a descriptor."""
        worker = self._worker
        match request:
            case Malformed():
                return Outcome(request.reply)
            case Init(flags=flags):
                return Outcome(job=partial(self._init, bool(flags & InitFlags.DELETE_VOLATILE)), cancel=True)
            case SetLocality(locality=locality):
                worker.locality = locality
                return Outcome(encode_reply(Command.SET_LOCALITY))
            case ResetEstablished(locality=locality):
                return self._later(request.command, partial(worker.do_reset_established, locality))
            case HashData(data=data):
                return self._later(request.command, partial(worker.do_hash_data, data))
            case SetBufferSize(size=size):
                return Outcome(job=partial(self._set_buffer_size, size))
            case GetInfo(offset=offset):
                return Outcome(self._info(offset))
            case GetStateBlob(kind=kind, offset=offset):
                return Outcome(job=partial(self._get_state, kind, offset))
            case SetStateBlob():
                return Outcome(job=partial(self._set_state, request))
            case LockStorage(retries=retries):
                limit_s = min(retries, _MOST_LOCK_RETRIES) * _LOCK_RETRY_S
                return self._action(Command.LOCK_STORAGE, partial(worker.do_return, limit_s), Interrupt.NO)
        return self._handle_plain(getattr(request, "command", None))

    def _handle_plain(self, command: Command | None) -> Outcome:
        worker = self._worker
        match command:
            case Command.GET_CAPABILITY:
                return Outcome(encode_reply(Command.GET_CAPABILITY, capabilities=int(CAPABILITIES)))
            case Command.GET_TPMESTABLISHED:
                return Outcome(encode_reply(Command.GET_TPMESTABLISHED, established=int(worker.established)))
            case Command.GET_CONFIG:
                return Outcome(encode_reply(Command.GET_CONFIG, flags=0))
            case Command.CANCEL_TPM_CMD:
                return Outcome(encode_reply(Command.CANCEL_TPM_CMD), cancel=True)
            case Command.STOP:
                return self._action(Command.STOP, worker.do_stop, Interrupt.YES)
            case Command.SHUTDOWN:
                return self._action(Command.SHUTDOWN, worker.do_orderly_power_off, Interrupt.YES)
            case Command.STORE_VOLATILE:
                return self._action(Command.STORE_VOLATILE, worker.do_store_volatile, Interrupt.NO)
            case Command.HASH_START:
                return self._later(Command.HASH_START, worker.do_hash_start)
            case Command.HASH_END:
                return self._later(Command.HASH_END, worker.do_hash_end)
        return Outcome(error_reply(command, int(Rc12.TPM_BAD_ORDINAL)))

    def _later(self, command: Command, job: Callable[[], int]) -> Outcome:
        """A job that returns a result code and needs a TPM that is on."""

        def run() -> bytes:
            if self._worker.power is not Power.ON:
                return encode_reply(command, int(Rc12.TPM_INVALID_POSTINIT))
            try:
                return encode_reply(command, job())
            except VtpmError:
                return encode_reply(command, self.FAIL)

        return Outcome(job=run)

    def _action(self, command: Command, job: Callable[[], None], interrupt: Interrupt) -> Outcome:
        """A job that works or raises."""

        def run() -> bytes:
            try:
                job()
            except VtpmError:
                return encode_reply(command, self.FAIL)
            return encode_reply(command)

        return Outcome(job=run, cancel=interrupt is Interrupt.YES)

    def _init(self, delete_volatile: bool) -> bytes:
        try:
            self._worker.do_power_on(Startup.NONE, keep_volatile=not delete_volatile)
        except VtpmError as error:
            self._complain(f"INIT failed: {error.message}")
            return encode_reply(Command.INIT, self.FAIL)
        return encode_reply(Command.INIT)

    def _set_buffer_size(self, wanted_bytes: int) -> bytes:
        if wanted_bytes and self._worker.power is Power.ON:
            # libtpms takes no other size while it runs, and neither does swtpm.
            return encode_reply(Command.SET_BUFFERSIZE, int(Rc12.TPM_BAD_ORDINAL))
        try:
            size, least, most = self._worker.do_set_buffer_size(wanted_bytes)
        except VtpmError:
            return encode_reply(Command.SET_BUFFERSIZE, self.FAIL)
        return encode_reply(Command.SET_BUFFERSIZE, size=size, min_size=least, max_size=most)

    def _get_state(self, kind: StateKind, offset: int) -> bytes:
        """Hand out the sealed state from an offset on, having it sealed first; of the other kinds there is nothing."""
        worker, command = self._worker, Command.GET_STATEBLOB
        if kind is not StateKind.PERMANENT:
            if not worker.state_out:
                return encode_reply(command, self.FAIL)
            return encode_reply(command, flags=0, total=0)
        try:
            if not worker.state_out:
                worker.do_depart()
        except VtpmError as error:
            self._complain(f"the state is not handed out: {error.message}")
            return encode_reply(command, self.FAIL)
        left = worker.state_out[offset:]
        if not left:
            return encode_reply(command, int(Rc12.TPM_BAD_PARAMETER))
        return encode_reply(command, flags=StateFlags.ENCRYPTED, total=len(left), data=left)

    def _set_state(self, request: SetStateBlob) -> bytes:
        """Collect the pieces of a sealed state, for INIT; of the other kinds there can be nothing."""
        worker, command = self._worker, Command.SET_STATEBLOB
        if worker.power is Power.ON:
            return encode_reply(command, int(Rc12.TPM_BAD_ORDINAL))
        if not request.data:
            return encode_reply(command)
        if request.kind is not StateKind.PERMANENT or request.flags != StateFlags.ENCRYPTED:
            return encode_reply(command, int(Rc12.TPM_BAD_PARAMETER))
        if len(worker.state_in) + len(request.data) > MAX_SEALED_BYTES:
            worker.state_in.clear()
            return encode_reply(command, int(Rc12.TPM_SIZE))
        worker.state_in += request.data
        return encode_reply(command)

    def _info(self, offset: int) -> bytes:
        info = self._worker.info.encode() + b"\0"
        if offset >= len(info):
            return encode_reply(Command.GET_INFO, int(Rc12.TPM_BAD_PARAMETER))
        return encode_reply(Command.GET_INFO, total=len(info), data=info[offset : offset + MAX_INFO_BYTES])
