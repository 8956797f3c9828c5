"""A TPM carried out by swtpm, as the TPM thread has one carried out by libtpms: the adapter.

swtpm writes its permanent state to its folder inside the command that changes it. So the adapter looks at that file
after whatever may have changed it, has the store keep what is new, and gives the response only then. It compares the
content: a file's times are too coarse to tell one write from the next. The state that is kept is the file as swtpm has
written it, and nobody else's to read. TPM 2.0 alone. For one thread, but for `cancel` and `set_default_locality`.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping

from vtpm.engine import library
from vtpm.engine.engine import LOCALITY_0, BufferSize, Origin, Store, check_state
from vtpm.errors import EngineError, ProtocolError, StateError, UsageError, VtpmError
from vtpm.foreign.swtpm_process import SWTPM, SwtpmProcess
from vtpm.tpm.headers import HEADER_BYTES, MAX_COMMAND_BYTES, failure_response
from vtpm.tpm.return_codes import Rc20, describe_12
from vtpm.tpm.types import MAX_LOCALITY, Locality, StateKind, TpmVersion
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    HashData,
    Init,
    Plain,
    Reply,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
)

_HEADER = struct.Struct(">BBHHI")
"""Before each of swtpm's blobs: version, least version that reads it, size of this, flags, size of all."""
_VERSION, _FLAGS = 2, 0
_INFO_FLAGS = 0xFF
_MAX_INFO_BYTES = 64 * 1024


class _Power(enum.Enum):
    OFF = "it is powered off"
    ON = "it is powered on"
    BROKEN = "swtpm has failed; end this process and start another"


class SwtpmEngine:
    """See the module, and TpmEngine.

    Args:
        version: TPM 2.0.
        store: called inside what changes permanent state, in its thread; nothing is answered before it returns. What
            it raises is kept as `store_error`; swtpm is ended then, and nothing that it answered gets out.
        folder: of its own and in memory, for what swtpm keeps.
        program: the swtpm.
    Raises:
        EngineError: the version is another, or swtpm cannot be started.
    """

    serve = None
    """See TpmEngine: commands are taken from links by the TPM thread."""

    stays = "swtpm's TPM does not move while it runs: stop the vTPM and move it then"
    """See TpmEngine."""

    def __init__(self, version: TpmVersion, store: Store, *, folder: str, program: str = SWTPM) -> None:
        if version is not TpmVersion.V2_0:
            raise EngineError(f"vTPMs of the make swtpm are TPM 2.0, not {version}")
        self.version = version
        # swtpm and the compiled door share the one libtpms of their image.
        self.library_version = library.inspect(library.load()[1]).version
        self._store = store
        self._error: VtpmError | None = None
        self._power = _Power.OFF
        self._locality = LOCALITY_0
        self._kept = b""
        self._swtpm = SwtpmProcess(folder, program)

    @property
    def powered(self) -> bool:
        """See Engine."""
        return self._power is _Power.ON

    @property
    def pid(self) -> int:
        """Of swtpm."""
        return self._swtpm.pid

    @property
    def store_error(self) -> BaseException | None:
        """See Engine."""
        return self._error

    def power_on(self, state: Mapping[StateKind, bytes], *, origin: Origin) -> None:
        """See Engine. swtpm makes a blank TPM where it finds no permanent state, so that is laid out, or forbidden."""
        check_state(self.version, state, origin)
        for kind, blob in state.items():
            _check_own(kind, blob)
        self._require(_Power.OFF)
        self._error = None
        for kind in (StateKind.PERMANENT, StateKind.VOLATILE):
            self._swtpm.drop(kind)
            if kind in state:
                self._swtpm.put(kind, state[kind])
        self._kept = state.get(StateKind.PERMANENT, b"")
        result = self._ask(Init(0)).result
        # Loaded, or not to be: a reset must not go back to it.
        self._swtpm.drop(StateKind.VOLATILE)
        if result == 0:
            self._power = _Power.ON
            self._locality = LOCALITY_0
            self._ask_to(SetLocality(LOCALITY_0))
            self._keep()
        if self._error is not None:
            raise EngineError(f"the TPM cannot be powered on: its state cannot be stored ({self._error})")
        if result:
            self._refuse_init(origin, result)

    def _refuse_init(self, origin: Origin, result: int) -> None:
        if origin is Origin.MANUFACTURE:
            raise EngineError(f"a TPM cannot be manufactured: swtpm says {describe_12(result)}")
        raise StateError(
            f"the TPM cannot be powered on: swtpm refuses its state with {describe_12(result)}",
            next_step="It is damaged, or was written by another make or a newer swtpm; put back what was saved",
        )

    def power_off(self) -> None:
        """See Engine. If swtpm does not stop in order it is ended, which cuts the power as well."""
        if self._power is _Power.ON:
            self._power = _Power.OFF
            try:
                self._ask_to(Plain(Command.STOP))
            except EngineError:
                self._break()
            self._kept = b""
            self._swtpm.drop(StateKind.PERMANENT)

    def close(self) -> None:
        """End swtpm."""
        self._break()

    def process(self, command: bytes | memoryview, locality: Locality = LOCALITY_0) -> bytes:
        """See Engine. A command whose change could not be kept is answered TPM_RC_FAILURE, as libtpms does."""
        if not HEADER_BYTES <= len(command) <= MAX_COMMAND_BYTES:
            raise ProtocolError(
                f"TPM command has {len(command)} bytes; {HEADER_BYTES} to {MAX_COMMAND_BYTES} are allowed"
            )
        _check_locality(locality)
        self._require(_Power.ON)
        if locality != self._locality:
            self._ask_to(SetLocality(locality))
            self._locality = locality
        try:
            response = self._swtpm.command(command)
        except EngineError:
            self._break()
            raise
        self._keep()
        if self._error is not None:
            return failure_response(self.version, int(Rc20.TPM_RC_FAILURE))
        return response

    def set_default_locality(self, locality: Locality) -> None:
        """See Engine. Each command brings its own to `process`."""
        _check_locality(locality)

    def cancel(self) -> None:
        """Nothing: swtpm hears of it when the command is over, for it does all in one thread."""

    def set_buffer_size(self, wanted: int) -> BufferSize:
        """See Engine."""
        if not 0 <= wanted < 1 << 32:
            raise UsageError(f"buffer size {wanted} is not an unsigned 32-bit number")
        fields = self._ask_to(SetBufferSize(wanted)).fields
        return BufferSize(fields["size"], fields["min_size"], fields["max_size"])

    def get_state(self, kind: StateKind) -> bytes:
        """See Engine. The blobs are swtpm's files."""
        self._require(_Power.ON)
        if kind is StateKind.VOLATILE:
            self._ask_to(Plain(Command.STORE_VOLATILE))
        blob = b"" if kind is StateKind.SAVESTATE else self._swtpm.take(kind)
        self._swtpm.drop(StateKind.VOLATILE)
        if not blob:
            raise StateError(f"TPM {self.version} has no {kind.name.lower()} state now")
        return blob

    def established(self) -> bool:
        """See Engine."""
        self._require(_Power.ON)
        return bool(self._ask_to(Plain(Command.GET_TPMESTABLISHED)).fields["established"])

    def reset_established(self, locality: Locality) -> int:
        """See Engine."""
        return self._beside_commands(ResetEstablished(locality))

    def hash_start(self) -> int:
        """See Engine."""
        return self._beside_commands(Plain(Command.HASH_START))

    def hash_data(self, data: bytes | memoryview) -> int:
        """See Engine."""
        return self._beside_commands(HashData(bytes(data)))

    def hash_end(self) -> int:
        """See Engine."""
        return self._beside_commands(Plain(Command.HASH_END))

    def info(self) -> str:
        """See Engine."""
        text = b""
        while not text.endswith(b"\0"):
            reply = self._ask_to(GetInfo(_INFO_FLAGS, len(text)))
            text += reply.data
            if not reply.data or len(text) > _MAX_INFO_BYTES:
                raise EngineError("swtpm does not end its description of itself")
        return text[:-1].decode(errors="replace")

    def _beside_commands(self, request: Request) -> int:
        self._require(_Power.ON)
        result = self._ask(request).result
        self._keep()
        return result

    def _keep(self) -> None:
        """Have the store keep permanent state that is new; `store_error` and the end of swtpm if it does not."""
        try:
            blob = self._swtpm.take(StateKind.PERMANENT)
            if not blob:
                raise EngineError("swtpm has no permanent state any more")
            if blob != self._kept:
                _check_own(StateKind.PERMANENT, blob)
                self._store(StateKind.PERMANENT, blob)
                self._kept = blob
        except VtpmError as error:
            self._error = error
            self._break()

    def _ask(self, request: Request) -> Reply:
        try:
            return self._swtpm.control(request)
        except EngineError:
            self._break()
            raise

    def _ask_to(self, request: Request) -> Reply:
        """Ask for what cannot fail for a reason outside swtpm."""
        reply = self._ask(request)
        if reply.result:
            raise EngineError(f"swtpm failed in {reply.command.name} with {describe_12(reply.result)}")
        return reply

    def _break(self) -> None:
        self._power = _Power.BROKEN
        self._swtpm.end()

    def _require(self, power: _Power) -> None:
        if self._power is not power:
            raise EngineError(f"the TPM cannot do this: {self._power.value}")


def _check_own(kind: StateKind, blob: bytes) -> None:
    """Raise StateError unless a blob is of swtpm's own form, not encrypted; it would take libtpms' as well.

    Source: swtpm 0.7.1, swtpm_nvstore.c, SWTPM_NVRAM_CheckHeader and SWTPM_NVRAM_GetPlainData.
    """
    if len(blob) >= _HEADER.size:
        version, least, header_bytes, flags, total_bytes = _HEADER.unpack_from(blob)
        if (header_bytes, flags, total_bytes) == (_HEADER.size, _FLAGS, len(blob)) and least <= _VERSION <= version:
            return
    raise StateError(
        f"the {kind.name.lower()} state is not swtpm's: it was written by another make, or is damaged",
        next_step="Start the vTPM with an image of the make that it was created with",
    )


def _check_locality(locality: int) -> None:
    if not 0 <= locality <= MAX_LOCALITY:
        raise UsageError(f"locality {locality} does not exist; 0 to {MAX_LOCALITY} do")
