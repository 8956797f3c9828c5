"""Asks any server of the control protocol the same things and tells where two of them answer differently.

The server under test is a path: Debian's swtpm, a vtpmd, anything whose control channel listens on a unix socket.

    ours, theirs = ask_all(vtpmd_socket), ask_all(swtpm_socket)
    assert not [line for line in differences(ours, theirs) if line not in INTENDED]
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vtpm.errors import ProtocolError
from vtpm.tpm.types import StateKind
from vtpm.wire.emulator import (
    Command,
    GetInfo,
    GetStateBlob,
    HashData,
    Init,
    LockStorage,
    Plain,
    Reply,
    Request,
    ResetEstablished,
    SetBufferSize,
    SetLocality,
    SetStateBlob,
    decode_reply,
    encode_request,
)

TIMEOUT_S = 10.0
_MOST_BYTES = 1 << 22
QEMU_PADDING = b"\0\0\0"


@dataclass(frozen=True)
class Exchange:
    """One request and its answer. `raw` is the reply as it came, `reads` how many reads it took."""

    request: Request
    raw: bytes = field(repr=False)
    reply: Reply
    reads: int


class ControlClient:
    """A client of one control channel. Args: path of its socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(os.fspath(path))

    def ask(self, request: Request, padding: bytes = b"", descriptors: Sequence[int] = ()) -> Exchange:
        """Send a request, with descriptors if any, and return the answer. Raises TimeoutError: none comes."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        # Sent whole in one write, like QEMU's; a state blob may need several.
        data = encode_request(request, padding=padding)
        sent = self._socket.sendmsg([data], ancillary)
        if sent < len(data):
            self._socket.sendall(data[sent:])
        raw, reads = b"", 0
        while True:
            got = self._socket.recv(_MOST_BYTES)
            if not got:
                raise ProtocolError(f"the server hung up on {request} after {raw[:16].hex()!r}")
            raw, reads = raw + got, reads + 1
            try:
                return Exchange(request, raw, decode_reply(request.command, raw), reads)
            except ProtocolError:
                if len(raw) > _MOST_BYTES:
                    raise

    def ask_raw(self, data: bytes, reply_bytes: int) -> bytes:
        """Send any bytes and return at least so many bytes of answer. Raises TimeoutError: they do not come."""
        self._socket.sendall(data)
        raw = b""
        while len(raw) < reply_bytes and (got := self._socket.recv(4096)):
            raw += got
        return raw

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(*commands: Command) -> list[Request]:
    return [Plain(command) for command in commands]


SEQUENCES: Mapping[str, Sequence[Request]] = {
    "before init": [
        *_plain(Command.STOP, Command.GET_CAPABILITY, Command.GET_CONFIG, Command.GET_TPMESTABLISHED),
        *_plain(Command.HASH_START, Command.HASH_END, Command.CANCEL_TPM_CMD, Command.STORE_VOLATILE),
        HashData(b"abc"),
        SetLocality(0),
        ResetEstablished(3),
        GetStateBlob(1, StateKind.PERMANENT, 0),
        SetBufferSize(0),
        SetBufferSize(4096),
        LockStorage(1),
    ],
    "as qemu starts and resets": [
        *_plain(Command.GET_CAPABILITY, Command.STOP),
        SetBufferSize(0),
        *_plain(Command.STOP),
        SetBufferSize(3968),
        Init(0),
        *_plain(Command.GET_TPMESTABLISHED),
        SetLocality(4),
        SetLocality(0),
        ResetEstablished(0),
        *_plain(Command.STOP),
        SetBufferSize(4096),
        Init(0),
    ],
    "dynamic launch": [
        Init(0),
        *_plain(Command.HASH_START),
        HashData(b""),
        HashData(bytes(4096)),
        *_plain(Command.HASH_END, Command.GET_TPMESTABLISHED),
        ResetEstablished(4),
        *_plain(Command.GET_TPMESTABLISHED),
    ],
    "while it runs": [
        Init(0),
        *_plain(Command.CANCEL_TPM_CMD, Command.STORE_VOLATILE, Command.GET_CONFIG),
        SetBufferSize(0),
        SetBufferSize(4096),
        SetStateBlob(0, StateKind.PERMANENT, b"junk"),
        GetInfo(1, 0),
        GetInfo(1, 3),
        GetInfo(1, 1 << 20),
    ],
    "state": [
        Init(0),
        *(GetStateBlob(1, kind, offset) for kind in StateKind for offset in (0, 10, 1 << 30)),
        *_plain(Command.STOP),
        SetStateBlob(0, StateKind.SAVESTATE, b""),
        SetStateBlob(0, StateKind.VOLATILE, bytes(9000)),
    ],
    "a data channel without a descriptor": _plain(Command.SET_DATAFD, Command.GET_CONFIG),
}
"""What is asked, each on a connection of its own, in this order. Together they have every command but SHUTDOWN."""


def ask_all(path: Path, padding: bytes = b"") -> dict[str, list[Exchange]]:
    """Ask the server at this socket all SEQUENCES."""
    answers = {}
    for name, requests in SEQUENCES.items():
        with ControlClient(path) as client:
            answers[name] = [client.ask(request, padding) for request in requests]
    return answers


def differences(ours: Mapping[str, Sequence[Exchange]], theirs: Mapping[str, Sequence[Exchange]]) -> list[str]:
    """Return a line for each request that two servers answered with other results or other fields.

    Values of fields and sizes of failures are not compared: servers may have other capabilities, sizes and texts.
    """
    lines = []
    for name in theirs:
        for left, right in zip(ours[name], theirs[name], strict=True):
            shapes = [(f"0x{one.reply.result:03x}", sorted(one.reply.fields)) for one in (left, right)]
            if shapes[0] != shapes[1]:
                lines.append(f"{name}: {left.request}: {shapes[0]} instead of {shapes[1]}")
    return lines


@contextmanager
def debian_swtpm() -> Iterator[Path]:
    """Run Debian's swtpm, not yet initialised, with state of its own; gives the path of its control socket."""
    with tempfile.TemporaryDirectory(prefix="swtpm") as name:
        directory = Path(name)
        path = directory / "control"
        # Listens before swtpm is there, and is handed over: nobody has to wait for it to appear.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.fspath(path))
            listener.listen(8)
            process = subprocess.Popen(
                [
                    *("swtpm", "socket", "--tpm2"),
                    *("--ctrl", f"type=unixio,fd={listener.fileno()}"),
                    *("--tpmstate", f"dir={directory}"),
                ],
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            yield path
        finally:
            process.kill()
            process.wait(TIMEOUT_S)
