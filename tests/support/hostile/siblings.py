"""Two vTPMs of the kind process beside a hostile one: what their clients wait for answers, and a look at the manager.

One is only read, which no other program has a part in; the other is written, which the manager keeps.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count

from tests.fault.writer import TpmConnection, data_socket
from tests.support.host import Host
from tests.unit.engine import commands

READ_PERIOD_S, WRITE_PERIOD_S, LOOK_PERIOD_S = 0.002, 0.02, 0.1
SECRET_BYTES = 32
_SECRET_INDEX, _COUNTER_INDEX = 0x0150_0030, 0x0150_0031
NAMES = ("reads", "writes")


@dataclass
class Waits:
    """How long each answer took, in seconds."""

    reads: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    """Of the manager, at the list of vTPMs."""


class Siblings:
    """See the module. A context manager that hangs up; creates and starts both."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._stack = ExitStack()
        self.secret = secrets.token_bytes(SECRET_BYTES)
        """In the NV of both."""
        self._counter = count(1)

    def __enter__(self) -> Siblings:
        with self._host.client() as client:
            tpms = []
            for name in NAMES:
                client.create(name)
                tpm = TpmConnection(data_socket(client.start(name).tcti))
                self._stack.callback(tpm.close)
                tpm.startup()
                tpm.succeed(commands.nv_define(_SECRET_INDEX, SECRET_BYTES))
                tpm.succeed(commands.nv_write(_SECRET_INDEX, self.secret))
                tpm.succeed(commands.nv_define(_COUNTER_INDEX, 8))
                tpms.append(tpm)
        self._read, self._written = tpms
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self) -> None:
        """Read a PCR and the NV. Raises TpmGone: it failed."""
        self._read.succeed(commands.pcr_read(0))
        assert self._read.read(_SECRET_INDEX, SECRET_BYTES) == self.secret

    def write(self) -> None:
        """Write the NV. Raises TpmGone: it failed."""
        self._written.succeed(commands.nv_write(_COUNTER_INDEX, next(self._counter).to_bytes(8, "big")))

    @contextmanager
    def used(self) -> Iterator[Waits]:
        """Use them, and look at the manager, meanwhile; every answer is a success, or this raises."""
        waits = Waits()
        ending = threading.Event()
        failures: list[BaseException] = []

        def again(act: Callable[[], object], period_s: float, times: list[float]) -> None:
            try:
                while not ending.wait(period_s):
                    began = time.perf_counter()
                    act()
                    times.append(time.perf_counter() - began)
            except BaseException as error:
                failures.append(error)

        with self._host.client() as client:
            threads = [
                threading.Thread(target=again, args=arguments, daemon=True)
                for arguments in (
                    (self.read, READ_PERIOD_S, waits.reads),
                    (self.write, WRITE_PERIOD_S, waits.writes),
                    (client.list, LOOK_PERIOD_S, waits.looks),
                )
            ]
            for thread in threads:
                thread.start()
            try:
                yield waits
            finally:
                ending.set()
                for thread in threads:
                    thread.join()
        if failures:
            raise failures[0]
