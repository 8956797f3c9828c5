"""A monitor (QMP) without a QEMU behind it: it answers what the test lets it, and says when it wants to.

Not part of the package vtpm and imports nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}
ALL_ZEROS = "00000000-0000-0000-0000-000000000000"
TIMEOUT_S = 10.0


class PlayedQemu:
    """One QEMU's monitor at `path`. A context manager.

    Args:
        name: noted with each command in `calls`, which several may share.
        run_state: of its machine: "running" at a source, "inmigrate" at a destination.
    """

    def __init__(self, path: Path, name: str, run_state: str, calls: list[str]) -> None:
        self.path = path
        self.name = name
        self.run_state = run_state
        self.calls = calls
        """"NAME COMMAND" of each command that changes something."""
        self.arguments: dict[str, Any] = {}
        """Of the last command of each name."""
        self.greeting: bytes | None = _line(GREETING)
        self.migration: dict[str, Any] = {}
        """What query-migrate answers."""
        self.tpms = [tpm("tpm-crb")]
        self.uuid = ALL_ZEROS
        self.answers: dict[str, Any] = {}
        """By command, what it answers instead of what it would."""
        self.refuses: dict[str, str] = {}
        """By command, QEMU's reason."""
        self.silent: set[str] = set()
        """Commands that get no answer."""
        self.then: dict[str, Callable[[], None]] = {}
        """By command, what happens when it was answered, or was not."""
        self._lock = threading.RLock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Ends accept() and recv() of the thread.
        for sock in (self._listener, self._client):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self._listener.close()
        if self._client is not None:
            self._client.close()

    def becomes(self, status: str, run_state: str = "", **more: Any) -> None:
        """Have its migration, and its machine, come into a state, and say so."""
        with self._lock:
            self.run_state = run_state or self.run_state
            self.migration = {"status": status, **more}
            self.say("MIGRATION", status=status)

    def say(self, event: str, **data: Any) -> None:
        """Send an event."""
        timestamp = {"seconds": 1, "microseconds": 0}
        self.send(_line({"event": event, "data": data, "timestamp": timestamp}))

    def send(self, data: bytes) -> None:
        """Send anything."""
        with self._lock, contextlib.suppress(OSError):
            assert self._client is not None
            self._client.sendall(data)

    def hang_up(self) -> None:
        """End the connection, as an end of the QEMU does."""
        assert self._client is not None
        self._client.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        try:
            self._client, _ = self._listener.accept()
        except OSError:
            return
        if self.greeting is not None:
            self.send(self.greeting)
        came = ""
        with contextlib.suppress(OSError):
            while data := self._client.recv(65536):
                # A client need not end a request with a newline; those of this one are ASCII.
                came = (came + data.decode("ascii")).lstrip()
                while came:
                    try:
                        request, end = json.JSONDecoder().raw_decode(came)
                    except json.JSONDecodeError:
                        break
                    came = came[end:].lstrip()
                    self._handle(request)

    def _handle(self, request: dict[str, Any]) -> None:
        command = request["execute"]
        with self._lock:
            self.arguments[command] = request.get("arguments")
            if not command.startswith(("query-", "qmp_")):
                self.calls.append(f"{self.name} {command}")
            if command not in self.silent:
                self.send(_line({**self._answer(command), "id": request["id"]} if "id" in request else {"return": {}}))
        # Not under the lock: the test may wait here for what another thread does.
        self.then.get(command, lambda: None)()

    def _answer(self, command: str) -> dict[str, Any]:
        if command in self.refuses:
            return {"error": {"class": "GenericError", "desc": self.refuses[command]}}
        if command in self.answers:
            return {"return": self.answers[command]}
        match command:
            case "query-status":
                running = self.run_state == "running"
                return {"return": {"running": running, "singlestep": False, "status": self.run_state}}
            case "query-migrate":
                return {"return": self.migration}
            case "query-tpm":
                return {"return": self.tpms}
            case "query-uuid":
                return {"return": {"UUID": self.uuid}}
            case "cont":
                self.run_state = "running"
            case "migrate_cancel" if self.migration.get("status") in ("setup", "active"):
                self.becomes("cancelled")
        return {"return": {}}


def tpm(model: str, kind: str = "emulator") -> dict[str, Any]:
    """Return one TPM as query-tpm shows it."""
    return {"id": "tpm0", "model": model, "options": {"type": kind, "data": {"chardev": "chrtpm"}}}


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"
