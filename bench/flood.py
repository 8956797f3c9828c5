"""Siblings that write at a calm pace, beside one vTPM that writes without pause and a client that creates and deletes.

The flood runs in processes of its own, so that what it costs the client does not look like the siblings' wait. Calm and
flood alternate, for a machine that others use too is calmer at one time than at another.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from tests.support.host import Host

from bench import saves, writers
from bench.client import RawClient, succeed
from bench.figures import percentile
from bench.peers import ours
from vtpm.client.manager_client import ManagerClient
from vtpm.tpm.types import Startup
from vtpm.vault.anchor import AnchorMode

SIBLINGS = 4
PERIOD_S = 0.05
TURN_S = 5.0
TURNS = 4
RATIO_LIMIT, P99_LIMIT_US = 2.0, 100_000.0
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Flood:
    """What siblings' saves took, in microseconds, without a flood and with it; `floods`: the flooder's in that time."""

    mode: str
    siblings: int
    saves: int
    floods: int
    creations: int
    calm_median_us: float
    calm_p99_us: float
    flood_median_us: float
    flood_p99_us: float

    @property
    def ratio(self) -> float:
        """How many times their p99 is with the flood what it is without."""
        return self.flood_p99_us / self.calm_p99_us

    @property
    def met(self) -> bool:
        """Whether both limits are kept."""
        return self.ratio <= RATIO_LIMIT and self.flood_p99_us <= P99_LIMIT_US


def flood(mode: AnchorMode, turns: int = TURNS, turn_s: float = TURN_S) -> Flood:
    """Measure on a host of its own, on the disk.

    Raises:
        RuntimeError: a save failed, a sibling's or the flooder's, or a creation or deletion.
    """
    with Host(settings=saves.settings(mode)) as host, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(ours(host, f"sibling{number}")).client for number in range(SIBLINGS)]
        for client in clients:
            writers.prepare(client.exchange)
        with host.client() as manager:
            manager.create("flooder")
            tcti = manager.start("flooder", Startup.CLEAR).tcti
        flooders = stack.enter_context(_flooders(Path(tcti.removeprefix("swtpm:path=")), host.socket))
        writers.write_for(clients, turn_s / 2, PERIOD_S)
        calm: list[float] = []
        flooded: list[float] = []
        for _ in range(turns):
            calm += writers.write_for(clients, turn_s, PERIOD_S)
            for flooder in flooders:
                flooder.go()
            flooded += writers.write_for(clients, turn_s, PERIOD_S)
            for flooder in flooders:
                flooder.rest()
    writes, creations = (flooder.done for flooder in flooders)
    return Flood(
        mode=str(mode),
        siblings=SIBLINGS,
        saves=len(flooded),
        floods=writes,
        creations=creations,
        calm_median_us=statistics.median(calm) * 1e6,
        calm_p99_us=percentile(calm, 99) * 1e6,
        flood_median_us=statistics.median(flooded) * 1e6,
        flood_p99_us=percentile(flooded, 99) * 1e6,
    )


Operation = Callable[[int], None]
"""One operation of a flood; takes its number."""


class _Flooder:
    """A process that floods between `go` and `rest`.

    Args:
        make: run in it with the path; yields what it does again and again.
    """

    def __init__(self, make: Callable[[Path], AbstractContextManager[Operation]], path: Path) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._resting = _SPAWN.Event()
        self._process = _SPAWN.Process(target=_serve, args=(make, path, theirs, self._resting))
        self._process.start()
        theirs.close()
        self.done = 0
        """How many of its operations it has done."""

    def go(self) -> None:
        """Begin."""
        self._resting.clear()
        self._pipe.send(True)

    def rest(self) -> None:
        """Pause; returns when nothing of it is under way. Raises RuntimeError: it failed."""
        self._resting.set()
        try:
            self.done += self._pipe.recv()
        except EOFError:
            raise RuntimeError("a flooder failed; its error stands above") from None

    def end(self) -> None:
        """End the process."""
        self._resting.set()
        self._pipe.close()
        self._process.join()


@contextlib.contextmanager
def _flooders(data_socket: Path, manager_socket: Path) -> Iterator[list[_Flooder]]:
    flooders = [_Flooder(_writing, data_socket), _Flooder(_creating, manager_socket)]
    try:
        yield flooders
    finally:
        for flooder in flooders:
            flooder.end()


def _serve(
    make: Callable[[Path], AbstractContextManager[Operation]], path: Path, pipe: Connection, resting: Event
) -> None:
    numbers = itertools.count()
    with make(path) as operation, contextlib.suppress(EOFError):
        while pipe.recv():
            begin = number = next(numbers)
            while not resting.is_set():
                operation(number)
                number = next(numbers)
            pipe.send(number - begin)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Operation]:
    client = RawClient(path)
    writers.prepare(client.exchange)
    try:
        yield lambda _number: succeed(client.exchange, writers.next_write())
    finally:
        client.close()


@contextlib.contextmanager
def _creating(path: Path) -> Iterator[Operation]:
    with ManagerClient(path) as manager:

        def create_and_delete(number: int) -> None:
            manager.create(f"passing{number}")
            manager.delete(f"passing{number}")

        yield create_and_delete
