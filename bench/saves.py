"""What one save spends, and on what.

Nothing is timed inside the services. One raw client times whole saves, each a TPM2_NV_Write of 32 bytes, on hosts that
differ in one thing at a time: on the disk, as users have them; and in memory, where a flush costs nothing, beside a
keeper whose TPM takes no time. It also times exchanges with both keepers. So

    ours    = save in memory - exchange with the keeper whose TPM takes no time - libtpms
    flushes = save in interval mode on the disk - the same in memory: the store's, which are the same in both modes
    anchor  = save on the disk - all of the above; beside it stands the exchange with the real keeper alone
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host

from bench import floor, writers
from bench.client import time_block
from bench.figures import percentile
from bench.instant_keeper import instant_keeper
from bench.peers import ours
from vtpm.vault.anchor import AnchorMode
from vtpm.wire.keeper import AnchorState
from vtpm.wire.keeper_client import KeeperClient

LIMIT_US = 500.0
"""What our own code may spend of a save, at the median."""
MEMORY = Path("/dev/shm")
HOUR_S = 3600
BLOCKS = 100
SAVES = 10
"""Of a block."""


@dataclass(frozen=True)
class Spent:
    """One save in one anchor mode, microseconds; medians of `saves` saves unless it says otherwise.

    Args:
        total_us, flushes_us, anchor_us, ours_us, libtpms_us: see the module.
        exchange_us: with the real keeper, for one anchor; to be held against `anchor_us`.
        ours_least_us, ours_most_us: spread of `ours_us` over blocks of saves.
    """

    mode: str
    saves: int
    total_us: float
    total_p99_us: float
    flushes_us: float
    anchor_us: float
    exchange_us: float
    ours_us: float
    libtpms_us: float
    ours_least_us: float
    ours_most_us: float

    @property
    def met(self) -> bool:
        """Whether our own code keeps its limit."""
        return self.ours_us <= LIMIT_US


class Timed:
    """Something that is timed block by block; the first block is warm-up and not kept.

    Args:
        block: times SAVES round trips, in seconds.
    """

    def __init__(self, block: Callable[[], list[float]]) -> None:
        self.blocks: list[list[float]] = []
        self._block = block
        self._warm = False

    def run(self) -> None:
        """Time one more block."""
        times = self._block()
        if self._warm:
            self.blocks.append(times)
        self._warm = True

    @property
    def all(self) -> list[float]:
        """All times."""
        return [time_s for block in self.blocks for time_s in block]

    @property
    def median_s(self) -> float:
        """The median of all times."""
        return statistics.median(self.all)


def spent() -> list[Spent]:
    """Measure saves in both modes, in alternating blocks."""
    with contextlib.ExitStack() as stack:
        libtpms = stack.enter_context(_libtpms())
        keeper = stack.enter_context(_real_keeper())
        disk = {mode: stack.enter_context(_on_disk(mode)) for mode in AnchorMode}
        memory = {mode: stack.enter_context(_in_memory(mode)) for mode in AnchorMode}
        for _ in range(BLOCKS + 1):
            for each in (libtpms, keeper, *disk.values(), *itertools.chain.from_iterable(memory.values())):
                each.run()
    each_commit, interval = AnchorMode.EACH_COMMIT, AnchorMode.INTERVAL
    flushes_s = disk[interval].median_s - memory[interval][0].median_s
    none = Timed(lambda: [0.0])
    none.blocks = [[0.0]] * BLOCKS
    return [
        _row(each_commit, disk[each_commit], *memory[each_commit], keeper, libtpms, flushes_s),
        _row(interval, disk[interval], memory[interval][0], none, none, libtpms, flushes_s),
    ]


def _row(
    mode: AnchorMode, disk: Timed, memory: Timed, instant: Timed, keeper: Timed, libtpms: Timed, flushes_s: float
) -> Spent:
    by_block = [
        statistics.median(save) - statistics.median(anchor) - libtpms.median_s
        for save, anchor in zip(memory.blocks, instant.blocks, strict=True)
    ]
    ours_s = memory.median_s - instant.median_s - libtpms.median_s
    return Spent(
        mode=str(mode),
        saves=len(disk.all),
        total_us=disk.median_s * 1e6,
        total_p99_us=percentile(disk.all, 99) * 1e6,
        flushes_us=flushes_s * 1e6,
        anchor_us=(disk.median_s - flushes_s - ours_s - libtpms.median_s) * 1e6,
        exchange_us=keeper.median_s * 1e6,
        ours_us=ours_s * 1e6,
        libtpms_us=libtpms.median_s * 1e6,
        ours_least_us=min(by_block) * 1e6,
        ours_most_us=max(by_block) * 1e6,
    )


def settings(mode: AnchorMode, interval_s: int = HOUR_S) -> str:
    """Return a host's settings for an anchor mode."""
    return f'anchor = "{mode}"\nanchor_interval_s = {interval_s}\n'


@contextlib.contextmanager
def _libtpms() -> Iterator[Timed]:
    with floor.in_process() as exchange:
        writers.prepare(exchange)
        yield Timed(lambda: time_block(exchange, writers.next_write, SAVES))


@contextlib.contextmanager
def _on_disk(mode: AnchorMode) -> Iterator[Timed]:
    with Host(settings=settings(mode)) as host, saver(host) as timed:
        yield timed


@contextlib.contextmanager
def _in_memory(mode: AnchorMode) -> Iterator[tuple[Timed, Timed]]:
    """Yield saves, and exchanges with the keeper beside them."""
    with host_in_memory(mode) as host, saver(host) as saves, contextlib.closing(KeeperClient(host.run_dir)) as keeper:
        # It takes any anchor, so these do not disturb the manager.
        yield saves, Timed(_anchor_writes(keeper))


@contextlib.contextmanager
def host_in_memory(mode: AnchorMode) -> Iterator[Host]:
    """Start a host whose files are in memory, beside a keeper whose TPM takes no time."""
    folder = Path(tempfile.mkdtemp(prefix="vtpm-host-", dir=MEMORY))
    host = Host(folder=folder, settings=settings(mode))
    host.run_dir.mkdir()
    try:
        with instant_keeper(host.run_dir), host:
            yield host
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _real_keeper() -> Iterator[Timed]:
    with Host(settings=settings(AnchorMode.EACH_COMMIT)) as host:
        # Whoever writes anchors beside a manager makes it refuse its store.
        host.stop_manager()
        with contextlib.closing(KeeperClient(host.run_dir)) as keeper:
            yield Timed(_anchor_writes(keeper))
            keeper.end()
        host.kill("launcher")


@contextlib.contextmanager
def saver(host: Host) -> Iterator[Timed]:
    """Start a vTPM whose saves are timed."""
    with ours(host, "saver") as peer:
        writers.prepare(peer.client.exchange)
        yield Timed(lambda: time_block(peer.client.exchange, writers.next_write, SAVES))


def _anchor_writes(keeper: KeeperClient) -> Callable[[], list[float]]:
    versions = itertools.count(keeper.read_anchor().version + 1)

    def block() -> list[float]:
        times = []
        for _ in range(SAVES):
            anchor = AnchorState(next(versions), secrets.token_bytes(32))
            begin = time.perf_counter()
            keeper.write_anchor(anchor)
            times.append(time.perf_counter() - begin)
        return times

    return block
