"""Host's side of the agent that the guest's init (tests/guests/init.sh) serves on its second serial port.

Every line of the agent begins with "@agent"; anything else on the port is a firmware's console output and is
skipped. Scripts and outputs travel in base64, so they may hold any byte. Nothing is sent before the agent
said that it is ready: a firmware would take it as typed keys.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from tests.support.guest.channel import Deadline, GuestError, LineChannel


@dataclass(frozen=True)
class Result:
    """What one script in the guest left behind; `stdout` and `stderr` are without their last newline."""

    script: str
    status: int
    stdout: str
    stderr: str


class Agent:
    """Runs shell scripts in the guest, one at a time."""

    def __init__(self, channel: LineChannel) -> None:
        self._channel = channel
        self._number = 0

    def wait_ready(self, deadline: Deadline) -> str:
        """Wait for the next boot's agent and return the boot id that the guest's kernel drew."""
        while True:
            words = self._words(deadline)
            if len(words) == 2 and words[0] == "ready":
                return words[1]

    def go_on(self, other: Agent) -> None:
        """Go on as another one, whose guest is here now."""
        self._number = other._number

    def send(self, script: str, deadline: Deadline) -> int:
        """Start a script without waiting for it; returns the number its answer will carry."""
        self._number += 1
        payload = base64.b64encode(script.encode()).decode()
        self._channel.send_line(f"@run {self._number} {payload}".encode(), deadline)
        return self._number

    def run(self, script: str, timeout_s: float) -> Result:
        """Run a shell script (busybox, pipefail set) in the guest and wait for its end.

        Raises:
            GuestError: it did not end in time, the guest was reset meanwhile, or QEMU ended.
        """
        deadline = Deadline(timeout_s)
        return self.finish(script, self.send(script, deadline), deadline)

    def finish(self, script: str, number: int, deadline: Deadline) -> Result:
        """Wait for the end of a script that `send` gave this number. Raises GuestError: as `run`."""
        while True:
            words = self._words(deadline)
            if words and words[0] == "ready":
                raise GuestError(f"the guest booted anew while it ran: {script}")
            # "done", number, status, stdout, stderr, "."; an empty output is an empty word
            if len(words) == 6 and words[0] == "done" and words[1] == str(number):
                return Result(script, int(words[2]), _text(words[3]), _text(words[4]))

    def _words(self, deadline: Deadline) -> list[str]:
        line = self._channel.read_line(deadline).decode("utf-8", "replace").rstrip("\r")
        marker, _, rest = line.partition("@agent ")
        # A firmware may leave bytes without a newline, but never the marker.
        return rest.split(" ") if rest and not marker.strip("\0") else []


def _text(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8", "backslashreplace").removesuffix("\n")
    except binascii.Error as error:
        raise GuestError(f"the agent's answer is damaged: {encoded[:80]}") from error
