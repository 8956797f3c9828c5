"""A client that writes a counter to a vTPM's NV in a loop and knows what it was answered, for tests that kill.

Everything it makes in the TPM is noDA: three unorderly ends after using an authorised DA object lock a TPM by rule.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from pathlib import Path

from tests.unit.engine import commands

COUNTER_INDEX = 0x0150_0020
MARKER_INDEX = 0x0150_0021
MARKER_BYTES = 16
TIMEOUT_S = 10.0
_RC_INITIALIZE = 0x100
_ENDORSEMENT = 0x4000000B


class TpmGone(Exception):
    """The connection ended, or the TPM answered that it failed."""


class TpmConnection:
    """A plain data connection. A context manager that closes it. Raises TpmGone where the other side ends."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(TIMEOUT_S)
        try:
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise TpmGone(str(error)) from error

    def __enter__(self) -> TpmConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def close(self) -> None:
        self._sock.close()

    def transact(self, command: bytes) -> bytes:
        """Send one command and return its whole response. A TPM that never answers is a defect: TimeoutError."""
        try:
            self._sock.sendall(command)
            response = self._exactly(10)
            return response + self._exactly(struct.unpack_from(">I", response, 2)[0] - 10)
        except TimeoutError:
            raise
        except OSError as error:
            raise TpmGone(str(error)) from error

    def succeed(self, command: bytes) -> bytes:
        """As transact, for commands that must succeed. Raises TpmGone with the return code otherwise."""
        response = self.transact(command)
        if code := commands.code_of(response):
            raise TpmGone(f"the TPM answered 0x{code:x} to command 0x{command[6:10].hex()}")
        return response

    def startup(self) -> None:
        """Send TPM2_Startup(CLEAR); harmless when the TPM had it already."""
        code = commands.code_of(self.transact(commands.startup()))
        if code not in (0, _RC_INITIALIZE):
            raise TpmGone(f"TPM2_Startup answered 0x{code:x}")

    def read(self, index: int, size: int) -> bytes:
        """Read an NV index."""
        return commands.nv_value(self.succeed(commands.nv_read(index, size)), size)

    def counter(self) -> int:
        """Read the counter that a Writer writes."""
        return int.from_bytes(self.read(COUNTER_INDEX, 8), "big")

    def endorsement_key(self) -> bytes:
        """Public area of a key made from the endorsement primary seed: the same as long as the seed is."""
        response = self.succeed(_create_endorsement_key())
        self.succeed(commands.flush(commands.created_handle(response)))
        size = struct.unpack_from(">H", response, 18)[0]
        return response[18 : 20 + size]

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._sock.recv(count - len(data))
            if not part:
                raise TpmGone("the connection ended")
            data += part
        return bytes(data)


class Writer:
    """Writes 1, 2, 3, ... to one vTPM, in a thread of its own while `running`.

    Args:
        path: the vTPM's data socket; the TPM is new, and powered on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered = 0
        """The last value whose success arrived."""
        self.asked = 0
        """The last value that was sent: `answered`, or one more."""
        self.longest_s = 0.0
        """The longest that one write took to be answered."""
        self.error: BaseException | None = None
        """Why the thread ended by itself; TpmGone after a kill."""
        self._marker = secrets.token_bytes(MARKER_BYTES)
        self._connection = TpmConnection(path)
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._thread: threading.Thread | None = None
        try:
            self._endorsement_key = self._begin(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def start(self) -> None:
        """Write until `stop`, or until the TPM goes."""
        assert self._thread is None
        self._stop.clear()
        self.error = None
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def await_writes(self, count: int) -> None:
        """Wait until this many more writes were answered, or the writer has ended."""
        with self._progress:
            wanted = self.answered + count
            assert self._progress.wait_for(lambda: self.answered >= wanted or self.error is not None, TIMEOUT_S)

    def stop(self) -> bool:
        """Stop after the write under way; whether the connection still works."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join(TIMEOUT_S + 5)
        assert not self._thread.is_alive(), "a write was never answered"
        self._thread = None
        if self.error is not None and not isinstance(self.error, TpmGone):
            raise self.error
        return self.error is None

    def reconnect(self) -> None:
        """Connect again, to a TPM that was started anew."""
        self._connection.close()
        self._connection = TpmConnection(self.path)
        self._connection.startup()

    def check(self) -> None:
        """Nothing answered is lost, nothing else has come, and it is the TPM that it was."""
        tpm = self._connection
        held = tpm.counter()
        assert held in (self.answered, self.asked), (
            f"the TPM holds {held}; {self.answered} was answered last, and {self.asked} asked for"
        )
        assert tpm.read(MARKER_INDEX, MARKER_BYTES) == self._marker
        assert tpm.endorsement_key() == self._endorsement_key, "the TPM was manufactured anew"
        self.answered = self.asked = held

    def read_undisturbed(self) -> None:
        """Read on the connection that there is. Raises TpmGone."""
        assert self._connection.counter() == self.answered

    def close(self) -> None:
        self._stop.set()
        self._connection.close()

    def _begin(self, tpm: TpmConnection) -> bytes:
        """Make the indexes; return the TPM's endorsement key."""
        tpm.startup()
        for index, size in ((COUNTER_INDEX, 8), (MARKER_INDEX, MARKER_BYTES)):
            tpm.succeed(commands.nv_define(index, size))
        tpm.succeed(commands.nv_write(MARKER_INDEX, self._marker))
        tpm.succeed(commands.nv_write(COUNTER_INDEX, bytes(8)))
        return tpm.endorsement_key()

    def _write(self) -> None:
        error: BaseException | None = None
        try:
            while not self._stop.is_set():
                self.asked = self.answered + 1
                began = time.monotonic()
                self._connection.succeed(commands.nv_write(COUNTER_INDEX, self.asked.to_bytes(8, "big")))
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                with self._progress:
                    self.answered = self.asked
                    self._progress.notify_all()
        except (TpmGone, TimeoutError, AssertionError) as caught:
            error = caught
        with self._progress:
            self.error = error
            self._progress.notify_all()


def data_socket(tcti: str) -> Path:
    """The path in a `swtpm:path=` TCTI."""
    return Path(tcti.removeprefix("swtpm:path="))


def closing(writers: list[Writer]) -> contextlib.ExitStack:
    """A context that closes them all."""
    stack = contextlib.ExitStack()
    for writer in writers:
        stack.callback(writer.close)
    return stack


def _create_endorsement_key() -> bytes:
    password = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    # ECC P-256, AES-128-CFB, no scheme, no KDF, empty unique.
    public = struct.pack(">HHIH", 0x0023, 0x000B, commands.STORAGE_KEY, 0)
    public += struct.pack(">HHHHHHHH", 0x0006, 128, 0x0043, 0x0010, 0x0003, 0x0010, 0, 0)
    body = struct.pack(">I", _ENDORSEMENT) + password + struct.pack(">HHH", 4, 0, 0)
    body += struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
    return struct.pack(">HII", 0x8002, 10 + len(body), 0x131) + body
