"""A minimal QMP client: greeting, commands, events. Used by `guest`, and by tests that steer QEMU."""

from __future__ import annotations

import json
from typing import Any

from tests.support.guest.channel import Deadline, GuestError, LineChannel

_COMMAND_TIMEOUT_S = 20.0


class QmpError(GuestError):
    """QEMU refused a command."""


class Qmp:
    """Commands and events of one QEMU.

    Args:
        channel: accepted connection in `-mon mode=control`.
    """

    def __init__(self, channel: LineChannel) -> None:
        self._channel = channel
        self._events: list[dict[str, Any]] = []

    def negotiate(self, deadline: Deadline) -> None:
        """Read the greeting and leave capability negotiation."""
        json.loads(self._channel.read_line(deadline))
        self._execute("qmp_capabilities", {}, deadline)

    def execute(self, command: str, timeout_s: float = _COMMAND_TIMEOUT_S, **arguments: object) -> Any:
        """Run a command and return its answer; dashes in argument names are written as underscores.

        Raises:
            QmpError: QEMU refused it.
            GuestError: no answer in time, or QEMU ended.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._execute(command, named, Deadline(timeout_s))

    def wait_event(self, name: str, timeout_s: float) -> dict[str, Any]:
        """The oldest event of this name that was not taken yet, waiting for one if there is none."""
        deadline = Deadline(timeout_s)
        while True:
            for index, event in enumerate(self._events):
                if event["event"] == name:
                    return self._events.pop(index)
            message = json.loads(self._channel.read_line(deadline))
            if "event" in message:
                self._events.append(message)

    def _execute(self, command: str, arguments: dict[str, object], deadline: Deadline) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._channel.send_line(json.dumps(request).encode(), deadline)
        while True:
            message = json.loads(self._channel.read_line(deadline))
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"QMP {command}: {message['error'].get('desc')}")
            if "event" in message:
                self._events.append(message)
