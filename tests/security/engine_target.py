"""The target of a confined process that runs a real TPM: manufacture, self test, keys, NV, random numbers.

Runs inside. As in a vtpmd the TPM has a thread of its own, made before the filter, while the first thread waits on the
link; descriptor 3 is the hold, 4 the link.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable
from typing import Any

from tpm_commands import COMMANDS_12, COMMANDS_20

from vtpm.engine import library
from vtpm.engine.engine import Engine, Origin
from vtpm.tpm.types import StateKind, TpmVersion

LINK = 4

# Before the lock-down, as all imports: there is no file to load from afterwards.
library.load()


def prepare(spec: Any, _keep_fds: tuple[int, ...]) -> Callable[[], int]:
    """Make the TPM's thread; what is returned lets it work and sends every command's return code."""
    version = TpmVersion(spec.target_args["attempt"])
    commands = COMMANDS_20 if version is TpmVersion.V2_0 else COMMANDS_12
    stored: dict[StateKind, bytes] = {}
    answers: dict[str, object] = {}
    go, finished = threading.Event(), os.eventfd(0)

    def work() -> None:
        go.wait()
        try:
            with Engine(version, stored.__setitem__) as engine:
                engine.power_on({}, origin=Origin.MANUFACTURE)
                for name, command in commands.items():
                    answers[name] = int.from_bytes(engine.process(command)[6:10], "big")
                answers["permanent"] = len(engine.get_state(StateKind.PERMANENT)) > 0
                answers["volatile"] = len(engine.get_state(StateKind.VOLATILE)) > 0
                engine.power_off()
                engine.power_on({StateKind.PERMANENT: stored[StateKind.PERMANENT]}, origin=Origin.SAVED)
                answers["again"] = int.from_bytes(engine.process(commands["Startup"])[6:10], "big")
        finally:
            os.eventfd_write(finished, 1)

    thread = threading.Thread(target=work, name="tpm")
    thread.start()

    def run() -> int:
        go.set()
        poller = select.poll()
        poller.register(LINK, select.POLLIN)
        poller.register(finished, select.POLLIN)
        poller.poll()
        thread.join()
        os.write(LINK, json.dumps(answers).encode())
        return 0

    return run
