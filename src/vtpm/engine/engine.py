"""The one typed door to libtpms: one process, one libtpms, one TPM.

Keeps no file and no key: state comes in through `power_on` and goes out through the store that the caller
gives. Imports the standard library, the compiled extension, `vtpm.tpm` and `vtpm.errors`, nothing else. May
be imported by `instance`.

libtpms makes a blank TPM whenever it hears that there is no permanent state. Only `Origin.MANUFACTURE` lets
it hear so. That is also why TPMLIB_SetState is used to judge state and never to load it: to take back what it
has set would tell libtpms "none".
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self

from vtpm.engine import library
from vtpm.engine.features import Feature, lacking
from vtpm.engine.nvram import Nvram, Origin, Retention, Store
from vtpm.engine.ownership import LIBTPMS
from vtpm.errors import EngineError, ProtocolError, StateError, UsageError
from vtpm.tpm.headers import HEADER_BYTES, MAX_COMMAND_BYTES
from vtpm.tpm.return_codes import Rc12, describe_12
from vtpm.tpm.types import MAX_LOCALITY, MAX_STATE_BYTES, Locality, StateKind, TpmVersion

__all__ = ["BufferSize", "Engine", "Origin", "ServeEnd", "Served", "Store"]

LOCALITY_0 = Locality(0)

INFO_FLAGS = 0xFF
"""All of enum TPMLIB_InfoFlags; a version ignores those that it does not know."""

# enum TPMLIB_StateType.
_STATE_TYPES = {StateKind.PERMANENT: 1, StateKind.VOLATILE: 2, StateKind.SAVESTATE: 4}

_CHOICES = {TpmVersion.V1_2: library.TPM_VERSION_1_2, TpmVersion.V2_0: library.TPM_VERSION_2}
_FEATURES = {TpmVersion.V1_2: Feature.TPM_1_2, TpmVersion.V2_0: Feature.TPM_2_0}
_RETENTION = {TpmVersion.V1_2: Retention.WHILE_POWERED, TpmVersion.V2_0: Retention.UNTIL_POWERED}

_CANCEL_EVERY_S = 0.02


class BufferSize(NamedTuple):
    """Size of libtpms' command and response buffer, bytes, and the bounds within which it can be set."""

    size: int
    min: int
    max: int


class ServeEnd(enum.Enum):
    """Why `Engine.serve` returned."""

    WOKEN = "woken"
    """The wake-up descriptor is readable; nothing of the link was taken."""
    INPUT = "input"
    """What came is not one whole plain command: the end of the stream, a part, several, another form."""
    RESPONSE = "response"
    """A command changed state or was answered TPM_RC_LOCKOUT, or the peer did not take the whole response."""


class Served(NamedTuple):
    """How `Engine.serve` ended; nothing that was received or is to be sent is lost.

    `data` is what came (INPUT; empty when the stream has ended or broke) or what of the response is still to be sent
    (RESPONSE). `last` is the code of the last command and the return code of its response, four bytes each,
    or None when no command was run.
    """

    end: ServeEnd
    data: bytes
    last: tuple[bytes, bytes] | None


class _Power(enum.Enum):
    OFF = "it is powered off"
    ON = "it is powered on"
    BROKEN = "libtpms has failed; end this process and start another"
    FORKED = "it was running when this process was forked, and a TPM must not run twice"
    CLOSED = "it was closed"


class Engine:
    """The TPM of this process.

    Args:
        version: TPM 1.2 or 2.0, for the engine's whole life.
        store: called inside `power_on`, `process`, `hash_start` and `reset_established`, in their thread,
            when libtpms writes state; the command is answered after it returns. Whatever it raises makes
            libtpms fail (for good, until the next `power_on`) and is kept as `store_error`. It must not call
            the engine.
    Raises:
        EngineError: libtpms is absent or lacks the version, or this process has an engine already.
    C: TPMLIB_ChooseTPMVersion, TPMLIB_RegisterCallbacks.
    """

    stays = ""
    """Why it cannot go to another host while it runs: it can."""

    def __init__(self, version: TpmVersion, store: Store) -> None:
        ffi, lib = library.load()
        LIBTPMS.claim(self)
        self._ffi, self._lib = ffi, lib
        self._busy = threading.Lock()
        self._power = _Power.OFF
        try:
            facts = library.inspect(lib)
            self.version = version
            self.library_version = facts.version
            self.lacks = lacking(facts)
            if line := self.lacks.get(_FEATURES[version]):
                raise EngineError(f"TPM {version} cannot run on this libtpms: {line}")
            self._check(lib.TPMLIB_ChooseTPMVersion(_CHOICES[version]), "TPMLIB_ChooseTPMVersion")
        except EngineError:
            LIBTPMS.release()
            raise
        self._nvram = Nvram(ffi, lib, store, _RETENTION[version])
        self._response = ffi.new("struct vtpm_response *")
        self._turn = ffi.new("struct vtpm_turn *")
        self._serve_ends = {
            lib.VTPM_WOKEN: ServeEnd.WOKEN,
            lib.VTPM_INPUT: ServeEnd.INPUT,
            lib.VTPM_RESPONSE: ServeEnd.RESPONSE,
        }

    @property
    def powered(self) -> bool:
        """Whether a TPM runs."""
        return self._power is _Power.ON

    @property
    def store_error(self) -> BaseException | None:
        """What the store raised since the last `power_on`, or None. If not None, the TPM has failed."""
        return self._nvram.error

    def power_on(self, state: Mapping[StateKind, bytes], *, origin: Origin) -> None:
        """Start the TPM, as a platform does with _TPM_Init; TPM2_Startup (TPM_Startup) is not sent.

        Args:
            state: the blobs there are. With VOLATILE, PCRs and sessions go on where they were.
            origin: SAVED needs PERMANENT in `state`; MANUFACTURE makes a new TPM and stores it, and forbids
                PERMANENT.
        Raises:
            StateError: the state is missing, damaged or contradicts `origin`; the engine is off.
            EngineError: libtpms or the store failed, or the engine is not off.
        C: TPMLIB_MainInit.
        """
        check_state(self.version, state, origin)
        with self._busy:
            self._require(_Power.OFF)
            self._nvram.offer(state, origin)
            result = self._lib.TPMLIB_MainInit()
            store_error = self.store_error
            if result == Rc12.TPM_SUCCESS and store_error is None:
                self._nvram.settle()
                self._power = _Power.ON
                return
            self._nvram.clear()
            self._lib.TPMLIB_Terminate()
        if store_error is not None:
            raise EngineError(
                f"TPM {self.version} cannot be powered on: its state cannot be stored ({store_error})"
            ) from store_error
        if origin is Origin.MANUFACTURE:
            raise EngineError(f"TPM {self.version} cannot be manufactured: libtpms says {describe_12(result)}")
        raise StateError(
            f"TPM {self.version} cannot be powered on: libtpms refuses its state with {describe_12(result)}",
            next_step="It is damaged or was written by a newer libtpms; put back what was saved",
        )

    def power_off(self) -> None:
        """Stop the TPM; what was not stored is gone. Safe when off.

        A command that runs in another thread is cancelled and waited for.

        C: TPMLIB_Terminate.
        """
        while not self._busy.acquire(timeout=_CANCEL_EVERY_S):
            # Again and again: libtpms forgets a cancel that comes just before its command begins.
            self.cancel()
        try:
            if self._power is _Power.ON:
                self._lib.TPMLIB_Terminate()
                self._power = _Power.OFF
            self._nvram.clear()
        finally:
            self._busy.release()

    def close(self) -> None:
        """Power off and give the process' libtpms back, so that another Engine may be made."""
        self.power_off()
        if self._power is _Power.OFF:
            self._power = _Power.CLOSED
            self._lib.free(self._response.data)
            self._response.data, self._response.capacity = self._ffi.NULL, 0
            LIBTPMS.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def process(self, command: bytes | memoryview, locality: Locality = LOCALITY_0) -> bytes:
        """Run one TPM command and return its response.

        Args:
            command: whole command, 10 to MAX_COMMAND_BYTES bytes, big-endian.
            locality: 0 to 4.
        Returns:
            Whole response; a TPM-level failure is in its return code, never an exception.
        Raises:
            EngineError: the engine is not powered, or libtpms itself failed and cannot be used again.
            ProtocolError: the command is shorter or longer than a command can be.
            UsageError: no such locality.
        Spec: TPM 2.0 Part 1 (revision 1.59), command processing. C: TPMLIB_Process.
        """
        if type(command) is not bytes:
            command = self._ffi.from_buffer(command)
        size = len(command)
        if not HEADER_BYTES <= size <= MAX_COMMAND_BYTES:
            raise ProtocolError(f"TPM command has {size} bytes; {HEADER_BYTES} to {MAX_COMMAND_BYTES} are allowed")
        if not 0 <= locality <= MAX_LOCALITY:
            raise UsageError(f"locality {locality} does not exist; 0 to {MAX_LOCALITY} do")
        with self._busy:
            if self._power is not _Power.ON:
                self._require(_Power.ON)
            response = self._response
            result = self._lib.vtpm_process(command, size, locality, response)
            if result or response.size < HEADER_BYTES:
                self._power = _Power.BROKEN
                raise EngineError(f"libtpms failed in TPMLIB_Process with {describe_12(result)}")
            return bytes(self._ffi.buffer(response.data, response.size))

    def serve(self, link_fd: int, wake_fd: int) -> Served:
        """Answer plain commands from a stream socket, until something comes that is not just that.

        Runs without Python's lock and without a step through Python: one poll, one recv, one send a command. A
        command that changes state, or finds the TPM locked, is not answered here: its response is returned, so that
        the caller sees to it. Until it returns, other methods than `cancel` and `set_default_locality` wait for it.

        Args:
            link_fd: connected stream socket; between two commands. Never waited for but for its next command.
            wake_fd: ends the serving when it is readable.
        Raises:
            EngineError: the engine is not powered, or libtpms itself failed and cannot be used again.
        C: TPMLIB_Process.
        """
        turn = self._turn
        with self._busy:
            self._require(_Power.ON)
            self._lib.vtpm_serve(link_fd, wake_fd, self._response, turn)
            if turn.event == self._lib.VTPM_FAILED:
                self._power = _Power.BROKEN
                raise EngineError(f"libtpms failed in TPMLIB_Process with {describe_12(turn.error)}")
            end = self._serve_ends[turn.event]
            data = b""
            if end is ServeEnd.INPUT:
                data = bytes(self._ffi.buffer(turn.input, turn.input_size))
            elif end is ServeEnd.RESPONSE:
                data = bytes(self._ffi.buffer(self._response.data, self._response.size))[turn.sent :]
        last = (bytes(turn.last_code), bytes(turn.last_result)) if turn.has_last else None
        return Served(end, data, last)

    def set_default_locality(self, locality: Locality) -> None:
        """Set the locality of the plain commands of `serve`, from the next one on; from any thread.

        Raises:
            UsageError: no such locality.
        """
        if not 0 <= locality <= MAX_LOCALITY:
            raise UsageError(f"locality {locality} does not exist; 0 to {MAX_LOCALITY} do")
        self._lib.vtpm_set_default_locality(locality)

    def cancel(self) -> None:
        """Ask the command that runs to end early; call from another thread. TPM 1.2 takes no notice.

        One that comes before its command has begun is lost. C: TPMLIB_CancelCommand.
        """
        self._lib.TPMLIB_CancelCommand()

    def set_buffer_size(self, wanted: int) -> BufferSize:
        """Set the size of the TPM's buffer, bytes; the nearest allowed is taken, 0 only asks.

        Raises:
            UsageError: negative, or more than 32 bits.
        C: TPMLIB_SetBufferSize.
        """
        if not 0 <= wanted < 1 << 32:
            raise UsageError(f"buffer size {wanted} is not an unsigned 32-bit number")
        bounds = self._ffi.new("uint32_t[2]")
        with self._busy:
            size = self._lib.TPMLIB_SetBufferSize(wanted, bounds, bounds + 1)
        return BufferSize(size, bounds[0], bounds[1])

    def get_state(self, kind: StateKind) -> bytes:
        """Return one blob of the running TPM; with SAVESTATE, what TPM_SaveState stored last.

        Raises:
            StateError: there is no such blob now (TPM 2.0 never has a SAVESTATE).
            EngineError: not powered, or libtpms failed.
        C: TPMLIB_GetState.
        """
        with self._busy:
            self._require(_Power.ON)
            if kind is StateKind.SAVESTATE:
                blob = self._nvram.stored(kind)
            else:
                blob = self._get_blob(_STATE_TYPES[kind])
        if not blob:
            raise StateError(f"TPM {self.version} has no {kind.name.lower()} state now")
        return blob

    def validate_state(self, state: Mapping[StateKind, bytes]) -> None:
        """Let libtpms judge blobs, with the engine off, without loading them.

        Finds damage to the structure, not to every byte: authenticity is what the sealed envelope is for.

        Args:
            state: PERMANENT, without which nothing else can be judged, and what there is of the others.
        Raises:
            StateError: a blob is missing or refused.
            EngineError: the engine is not off.
        C: TPMLIB_SetState.
        """
        check_state(self.version, state, Origin.SAVED)
        with self._busy:
            self._require(_Power.OFF)
            refused: tuple[StateKind, int] | None = None
            for kind in sorted(state):
                result = self._lib.TPMLIB_SetState(_STATE_TYPES[kind], state[kind], len(state[kind]))
                if result != Rc12.TPM_SUCCESS:
                    refused = kind, result
                    break
            # A refused blob clears all that was set. To clear it with NULL would mean "make a blank TPM".
            if self._lib.TPMLIB_SetState(_STATE_TYPES[StateKind.PERMANENT], b"\0", 1) == Rc12.TPM_SUCCESS:
                self._power = _Power.BROKEN
                raise EngineError("libtpms took one zero byte for permanent state")
        if refused is not None:
            kind, result = refused
            raise StateError(f"libtpms refuses the {kind.name.lower()} state with {describe_12(result)}")

    def established(self) -> bool:
        """Return the tpmEstablished bit: a dynamic launch (`hash_start`) has happened since it was reset.

        Raises:
            EngineError: not powered, or libtpms failed.
        C: TPM_IO_TpmEstablished_Get.
        """
        bit = self._ffi.new("unsigned char *")
        with self._busy:
            self._require(_Power.ON)
            self._check(self._lib.TPM_IO_TpmEstablished_Get(bit), "TPM_IO_TpmEstablished_Get")
        return bool(bit[0])

    def reset_established(self, locality: Locality) -> int:
        """Clear the tpmEstablished bit and return the TPM result code; from localities 3 and 4 alone it is 0.

        Raises:
            EngineError: not powered.
        C: TPM_IO_TpmEstablished_Reset.
        """
        with self._busy:
            self._require(_Power.ON)
            return int(self._lib.vtpm_reset_established(locality))

    def hash_start(self) -> int:
        """Begin a dynamic launch measurement (locality 4) and return the TPM result code.

        After TPM2_Startup it resets PCRs 17 to 22; before, it measures into PCR 0 (H-CRTM).

        Raises:
            EngineError: not powered.
        Spec: TPM 2.0 Part 1 (revision 1.59), _TPM_Hash_Start. C: TPM_IO_Hash_Start.
        """
        with self._busy:
            self._require(_Power.ON)
            return int(self._lib.TPM_IO_Hash_Start())

    def hash_data(self, data: bytes | memoryview) -> int:
        """Add bytes to the measurement and return the TPM result code.

        Raises:
            EngineError: not powered.
        C: TPM_IO_Hash_Data.
        """
        with self._busy:
            self._require(_Power.ON)
            return int(self._lib.TPM_IO_Hash_Data(self._ffi.from_buffer(data), len(data)))

    def hash_end(self) -> int:
        """End the measurement, extend PCR 17 (or 0) with it and return the TPM result code.

        Raises:
            EngineError: not powered.
        C: TPM_IO_Hash_End.
        """
        with self._busy:
            self._require(_Power.ON)
            return int(self._lib.TPM_IO_Hash_End())

    def info(self, flags: int = INFO_FLAGS) -> str:
        """Return libtpms' JSON on specification, attributes and features, for the `flags` it knows.

        Raises:
            EngineError: libtpms has no memory for it.
        C: TPMLIB_GetInfo.
        """
        with self._busy:
            text = self._lib.TPMLIB_GetInfo(flags & INFO_FLAGS)
            if text == self._ffi.NULL:
                raise EngineError("libtpms failed in TPMLIB_GetInfo")
            try:
                return str(self._ffi.string(text).decode())
            finally:
                self._lib.free(text)

    def _check(self, result: int, function: str) -> None:
        if result != Rc12.TPM_SUCCESS:
            raise EngineError(f"libtpms failed in {function} with {describe_12(result)}")

    def _require(self, power: _Power) -> None:
        if self._power is not power:
            raise EngineError(f"the TPM cannot do this: {self._power.value}")

    def _get_blob(self, state_type: int) -> bytes:
        data = self._ffi.new("unsigned char **")
        size = self._ffi.new("uint32_t *")
        self._check(self._lib.TPMLIB_GetState(state_type, data, size), "TPMLIB_GetState")
        try:
            return bytes(self._ffi.buffer(data[0], size[0])) if data[0] else b""
        finally:
            self._lib.free(data[0])

    def on_fork(self) -> None:
        """Called in a child process: a TPM that runs in the parent must not run here too, on equal seeds."""
        if self._power is _Power.ON or self._busy.locked():
            self._busy = threading.Lock()
            self._power = _Power.FORKED


def check_state(version: TpmVersion, state: Mapping[StateKind, bytes], origin: Origin) -> None:
    """Check that there is the state that a TPM is powered on with, and no more than there can be.

    Raises:
        StateError: permanent state is missing, or there although it is to be made; a blob is of no size that it can be.
    """
    if (StateKind.PERMANENT in state) is not (origin is Origin.SAVED):
        raise StateError(
            f"TPM {version} has no permanent state"
            if origin is Origin.SAVED
            else f"TPM {version} has permanent state and must not be manufactured again"
        )
    for kind, blob in state.items():
        if not 0 < len(blob) <= MAX_STATE_BYTES:
            raise StateError(f"{kind.name.lower()} state has {len(blob)} bytes; 1 to {MAX_STATE_BYTES} are allowed")
    if StateKind.SAVESTATE in state and version is TpmVersion.V2_0:
        raise StateError("TPM 2.0 has no savestate")
