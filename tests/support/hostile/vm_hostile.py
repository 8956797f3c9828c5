"""Init of a hostile image: what an attacker makes of a vtpmd. It has both ports, no TPM, and does what it is told.

It answers the manager as far as it must to be started. Its orders come as TPM commands of its own client, through the
relay, and what it has to report goes back as their responses: one line of words each. `tests.support.hostile.machine`
is the other side. Runs in the virtual machine, with what the image of a vtpmd holds.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

from vtpm.engine import library
from vtpm.instance import vm_boot
from vtpm.instance.vm_main import _open_port, wait_connected
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.wire import guest_port
from vtpm.wire.framing import BadFrame, Deframer, encode_frame
from vtpm.wire.manager_link import (
    MAX_BODY_BYTES,
    MAX_CHUNK_BYTES,
    ClientChanged,
    ClientKind,
    Direction,
    Done,
    Hello,
    LinkPower,
    Load,
    LoadError,
    LockoutChanged,
    Note,
    Permit,
    PowerChanged,
    PowerOn,
    Ready,
    SaveChunk,
    SaveError,
    Shutdown,
    StateChunk,
    StateEnd,
    ToManager,
    decode_message,
    encode_message,
)
from vtpm.wire.manager_link_peers import save_messages

# At import, so that an image's builder sees what it takes.
library.load()

ANSWER_S = 10.0
STATE_BYTES = 2 * 1024 * 1024
_HEADER = struct.Struct(">HII")
_UNHEARD_PAUSE_S = 0.02


class Hostile:
    """Both ports, and what came on them."""

    def __init__(self, manager_fd: int, guest_fd: int) -> None:
        self._manager, self._guest = manager_fd, guest_fd
        self._came = threading.Condition()
        self._heard: list[str] = []
        self._bytes = bytearray()
        """All that ever came from the manager, and then the state in it, as it was before it was cut into chunks."""
        self._chunks = bytearray()
        self._permit = b""
        self._seq = 0
        self._deaf = self._flooding = False
        self._writing = threading.Lock()
        self._telling = threading.Lock()
        self._resting = threading.Event()
        self._sent = 0
        self._session = b""

    # -- the manager link -------------------------------------------------------------------------------------------
    def hear(self) -> None:
        """Read what the manager says, until it is to be read no more."""
        deframer = Deframer(MAX_BODY_BYTES)
        while not self._deaf and (data := os.read(self._manager, 65536)):
            for body in deframer.feed(data):
                with self._came:
                    self._take(body)
                    self._came.notify_all()

    def _take(self, body: bytes | BadFrame) -> None:
        if isinstance(body, BadFrame):
            self._heard.append("BadFrame")
            return
        message = decode_message(body, Direction.TO_INSTANCE)
        self._heard.append(type(message).__name__)
        if not self._flooding:
            self._bytes += body
        match message:
            case Hello(session=session):
                self._session = session
                self.say(self.ready())
            case PowerOn(seq=seq):
                self.say(Done(seq, "", ""))
                self.say(PowerChanged(LinkPower.ON, "so it says"))
            case Shutdown():
                vm_boot.power_off()
            case StateChunk(data=data):
                self._chunks += data
            case StateEnd(digest=digest):
                self._heard[-1] += f":{digest.hex()}"
                # What the chunks of one answer hold, without the borders between them.
                if not self._flooding:
                    self._bytes += self._chunks
                self._chunks.clear()
            case Permit(permit_id=permit_id):
                self._permit = permit_id
            case LoadError(code=code) | SaveError(code=code):
                self._heard[-1] += f":{code}"

    def ready(self) -> Ready:
        """What a vtpmd says to a Hello."""
        version = library.load()[1].TPMLIB_GetVersion()
        return Ready(self._session, TpmVersion.V2_0, LinkPower.OFF, ClientKind.NONE, version, self._seq)

    def say(self, message: ToManager) -> None:
        """Send one message to the manager."""
        self.put(encode_frame(encode_message(message)))

    def put(self, data: bytes) -> None:
        """Write bytes to the manager link; waits for as long as it takes none."""
        view = memoryview(data)
        with self._writing:
            while view:
                written = os.write(self._manager, view)
                self._sent += written
                view = view[written:]

    def answered(self, words: tuple[str, ...], ask: Callable[[], None]) -> str:
        """Ask the manager; return the first word of these that it answers with."""
        with self._came:
            begin = len(self._heard)
            ask()
            found = self._came.wait_for(lambda: [w for w in self._heard[begin:] if w.startswith(words)], ANSWER_S)
            return found[0] if found else "nothing"

    def load(self) -> str:
        """Ask for state, as every vtpmd does."""
        self._seq += 1
        return self.answered(("StateEnd", "Permit", "LoadError"), lambda: self.say(Load(self._seq)))

    def save(self, kind: StateKind, data: bytes) -> str:
        """Have state kept."""
        self._seq += 1
        messages = list(save_messages(self._seq, kind, data, self._permit or None))
        self._permit = b""
        return self.answered(("Save",), lambda: [self.say(message) for message in messages] and None)

    # -- floods -----------------------------------------------------------------------------------------------------
    def flood(self, kind: str) -> None:
        """Flood the manager link until it is to rest."""
        self._flooding = True
        pieces = _pieces(kind)
        while not self._resting.is_set():
            if kind == "loads":
                self.load()
            elif kind == "saves":
                self.save(StateKind.VOLATILE, os.urandom(STATE_BYTES))
            elif kind == "unheard-loads":
                self._deaf = True
                self._seq += 1
                self.say(Load(self._seq))
                time.sleep(_UNHEARD_PAUSE_S)
            else:
                self.put(next(pieces))

    def flood_guest(self, kind: str) -> None:
        """Flood the guest port until it is to rest."""
        pieces = _guest_pieces(kind)
        while not self._resting.is_set():
            view = memoryview(next(pieces))
            with self._telling:
                while view:
                    view = view[os.write(self._guest, view) :]

    # -- the guest port ---------------------------------------------------------------------------------------------
    def serve(self) -> None:
        """Follow the orders that come as TPM commands."""
        deframer = Deframer(guest_port.MAX_BODY_BYTES)
        while data := os.read(self._guest, 65536):
            for body in deframer.feed(data):
                assert isinstance(body, bytes)
                message = guest_port.decode_message(body, guest_port.Direction.TO_VM)
                match message:
                    case guest_port.Hello(session=session):
                        self._tell(guest_port.Ready(session))
                    case guest_port.Close(connection=connection):
                        self._tell(guest_port.Closed(connection))
                    case guest_port.TpmRequest(connection=connection, data=command):
                        report = self.obey(command[_HEADER.size :].decode()).encode()
                        header = _HEADER.pack(0x8001, _HEADER.size + len(report), 0)
                        self._tell(guest_port.Response(connection, header + report))

    def _tell(self, message: guest_port.ToRelay) -> None:
        with self._telling:
            os.write(self._guest, encode_frame(guest_port.encode_message(message)))

    def obey(self, order: str) -> str:
        """Do what one line says; return what came of it."""
        word, *rest = order.split(" ")
        match word:
            case "send":
                self.put(encode_frame(bytes.fromhex(rest[0])))
            case "raw":
                self.put(bytes.fromhex(rest[0]))
            case "guest":
                with self._telling:
                    os.write(self._guest, bytes.fromhex(rest[0]))
            case "load":
                return self.load()
            case "save":
                return self.save(StateKind(int(rest[0])), bytes.fromhex(rest[1]) * int(rest[2]))
            case "find":
                with self._came:
                    return str(bytes(self._bytes).count(bytes.fromhex(rest[0])))
            case "heard":
                with self._came:
                    return " ".join(self._heard)
            case "sent":
                return str(self._sent)
            case "rest":
                self._resting.set()
            case "flood":
                self._resting.clear()
                threading.Thread(target=self.flood, args=rest, daemon=True).start()
            case "flood-guest":
                self._resting.clear()
                threading.Thread(target=self.flood_guest, args=rest, daemon=True).start()
            case _:
                return "what?"
        return "done"


def _pieces(kind: str) -> Iterator[bytes]:
    whole = encode_frame(encode_message(SaveChunk(1, 4096, b"\xdb" * MAX_CHUNK_BYTES)))
    number = 0
    while True:
        number += 1
        match kind:
            case "garbage":
                yield os.urandom(32768)
            case "oversized":
                yield b"\xc0" + b"x" * 262144 + b"\xc0"
            case "cut":
                yield whole[: len(whole) // 2]
            case "out-of-order":
                yield whole
            case "empty":
                yield b"\xc0" * 32768
            case "endless":
                # A frame that never ends.
                yield b"x" * 32768
            case "words":
                # All that a vtpmd may say without being asked, faster than any does.
                power = (LinkPower.OFF, LinkPower.ON, LinkPower.FAILED)[number % 3]
                for message in (
                    PowerChanged(power, f"change {number}"),
                    ClientChanged(ClientKind.DATA, number, number),
                    LockoutChanged(number % 2 == 1, number, 32, 600, number if number % 2 else 0),
                    Note(f"note {number} " + "x" * 400),
                ):
                    yield encode_frame(encode_message(message))
            case _:
                raise ValueError(kind)


def _guest_pieces(kind: str) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        match kind:
            case "garbage":
                yield os.urandom(32768)
            case "oversized":
                yield b"\xc0" + b"x" * 65536 + b"\xc0"
            case "undue":
                response = _HEADER.pack(0x8001, 4096, 0) + bytes(4096 - _HEADER.size)
                yield encode_frame(guest_port.encode_message(guest_port.Response(number, response)))
            case "power":
                yield encode_frame(guest_port.encode_message(guest_port.Power(number % 2 == 0)))
            case _:
                raise ValueError(kind)


def main() -> None:
    """Boot as a vtpmd does, and turn on those who started it."""
    vm_boot.mount_file_systems()
    vm_boot.load_modules()
    manager_fd, guest_fd = _open_port(vm_boot, guest_port.MANAGER_PORT), _open_port(vm_boot, guest_port.GUEST_PORT)
    for fd in (manager_fd, guest_fd):
        wait_connected(fd)
    hostile = Hostile(manager_fd, guest_fd)
    threading.Thread(target=hostile.hear, daemon=True).start()
    hostile.serve()
    vm_boot.power_off()
