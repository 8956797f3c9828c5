"""One process of Debian's swtpm, unchanged: its data channel, its control channel and its folder of state.

Knows how to talk to it, and nothing of what is to be kept. What it says is checked as anybody's is. For swtpm_engine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from vtpm.errors import EngineError, ProtocolError
from vtpm.tpm.headers import HEADER_BYTES, ResponseHeader
from vtpm.tpm.types import MAX_STATE_BYTES, StateKind
from vtpm.wire.emulator import Reply, Request, command_of, decode_reply, encode_request, is_whole_reply

SWTPM = "/usr/bin/swtpm"
REPLY_TIMEOUT_S = 60.0
"""Of the control channel; INIT manufactures a TPM, perhaps under emulation."""
_RECEIVE_BYTES = 8192
_FILES = {StateKind.PERMANENT: "tpm2-00.permall", StateKind.VOLATILE: "tpm2-00.volatilestate"}


class SwtpmProcess:
    """See the module. For one thread.

    Args:
        folder: of its own, for what swtpm keeps; in memory, for nothing there is meant to last.
        program: the swtpm.
    Raises:
        EngineError: it cannot be started.
    Source: swtpm 0.7.1, swtpm.c (options), swtpm_nvfile.c (names of files).
    """

    def __init__(self, folder: str, program: str = SWTPM) -> None:
        self._folder = folder
        self._data, data = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.settimeout(REPLY_TIMEOUT_S)
        with data, control:
            for end in (data, control):
                end.set_inheritable(True)
            arguments = [program, "socket", "--tpm2", "--tpmstate", f"dir={folder},mode=0600"]
            arguments += ["--fd", str(data.fileno()), "--ctrl", f"type=unixio,clientfd={control.fileno()}"]
            try:
                self.pid = os.posix_spawn(program, arguments, {})
            except OSError as error:
                self._close()
                raise EngineError(f"{program} cannot be executed: {error.strerror}") from error
        self._ended = False

    def command(self, command: bytes | memoryview) -> bytes:
        """Have one TPM command carried out and return its response, whole and of a size that a response can have.

        Raises:
            EngineError: swtpm has ended, or what it says is no response to this command.
        """
        try:
            self._check_silent()
            self._data.sendall(command)
            response = self._data.recv(_RECEIVE_BYTES)
            while response and (missing := _missing_bytes(response)):
                more = self._data.recv(missing)
                response = response + more if more else b""
        except OSError as error:
            raise EngineError(f"swtpm has ended: {error.strerror}") from error
        except ProtocolError as error:
            raise EngineError(f"swtpm answers what is no TPM response: {error.message}") from error
        if not response:
            raise EngineError("swtpm has ended within a command")
        return response

    def control(self, request: Request) -> Reply:
        """Have one control request carried out and return its reply, whatever its result.

        Raises:
            EngineError: swtpm has ended, did not reply in REPLY_TIMEOUT_S, or what it says is no reply to this.
        """
        sent = encode_request(request)
        command = command_of(sent)
        assert command is not None
        reply = b""
        try:
            self._control.sendall(sent)
            while not is_whole_reply(command, reply):
                more = self._control.recv(_RECEIVE_BYTES)
                if not more:
                    raise EngineError(f"swtpm has ended within {command.name}")
                reply += more
            return decode_reply(command, reply)
        except OSError as error:
            raise EngineError(f"swtpm did not reply to {command.name}: {error}") from error
        except ProtocolError as error:
            raise EngineError(f"swtpm is out of step on its control channel: {error.message}") from error

    def put(self, kind: StateKind, blob: bytes) -> None:
        """Lay out state, which the next INIT loads."""
        fd = os.open(self._path(kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(blob)

    def take(self, kind: StateKind) -> bytes:
        """Return state as swtpm has written it last; empty when there is none.

        Raises:
            EngineError: there is more of it than there can be of a TPM's.
        """
        try:
            with open(self._path(kind), "rb") as file:
                blob = file.read(MAX_STATE_BYTES + 1)
        except FileNotFoundError:
            return b""
        if len(blob) > MAX_STATE_BYTES:
            raise EngineError(f"swtpm has more than {MAX_STATE_BYTES} bytes of {kind.name.lower()} state")
        return blob

    def drop(self, kind: StateKind) -> None:
        """Remove state, if there is some."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(kind))  # noqa: PTH108 (the image has no pathlib)

    def end(self) -> None:
        """End it at once, and wait until it has; nothing the second time."""
        if not self._ended:
            self._ended = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._close()

    def _check_silent(self) -> None:
        # What came unasked would be taken for the answer to the next command.
        with contextlib.suppress(BlockingIOError):
            unasked = self._data.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            raise EngineError("swtpm says something unasked" if unasked else "swtpm has ended")

    def _path(self, kind: StateKind) -> str:
        return f"{self._folder}/{_FILES[kind]}"

    def _close(self) -> None:
        self._data.close()
        self._control.close()


def _missing_bytes(response: bytes) -> int:
    """Return how many bytes a response that has begun still lacks. Raises ProtocolError: it is none, or too long."""
    if len(response) < HEADER_BYTES:
        return HEADER_BYTES - len(response)
    missing = ResponseHeader.parse(response).size_bytes - len(response)
    if missing < 0:
        raise ProtocolError(f"{-missing} bytes follow a TPM response")
    return missing
