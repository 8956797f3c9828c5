"""Saves per second of many vTPMs at once, what the anchor is spared, and whether more vTPMs make a save dearer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from tests.support.host import Host
from tests.support.swtpm import SwtpmPlatform

from bench import saves, writers
from bench.client import RawClient
from bench.figures import percentile
from bench.peers import ours
from vtpm.manager.storage import open_storage
from vtpm.tpm.types import TpmVersion, VtpmId
from vtpm.vault.anchor import AnchorMode, AnchorPolicy
from vtpm.vault.records import DomainKind, Event, VtpmRecord
from vtpm.vault.store import Store
from vtpm.wire.keeper_client import KeeperClient

WRITERS = (1, 8, 32)
DURATION_S = 6.0
INTERVAL_S = 1
"""The shortest that can be configured, so that anchor writes fall into what is measured; the default is 60."""
REGISTERED = (10, 10_000)
RATIO_LIMIT = 1.2


@dataclass(frozen=True)
class Rate:
    """What some vTPMs that write without pause have of one host.

    Args:
        platform: what stands for the platform TPM.
        writers: vTPMs that write at once.
        anchor_writes_per_1000: writes to the platform TPM for each thousand saves.
    """

    platform: str
    mode: str
    writers: int
    saves: int
    saves_per_s: float
    median_us: float
    p99_us: float
    anchor_writes_per_1000: float


@dataclass(frozen=True)
class Registered:
    """The median save of one vTPM, in microseconds, beside few and many that are registered, and their ratio."""

    few: int
    many: int
    few_us: float
    many_us: float
    ratio: float
    ratio_least: float
    ratio_most: float

    @property
    def met(self) -> bool:
        """Whether the ratio keeps its limit."""
        return self.ratio <= RATIO_LIMIT


def rates() -> Iterator[Rate]:
    """Measure each platform TPM and mode that is worth it, on the disk: hardware is not written at each commit."""
    for mode in AnchorMode:
        with Host(settings=saves.settings(mode, INTERVAL_S)) as host:
            yield from _rates_of(host, "embedded", mode)
    with swtpm_platform() as tcti, Host(tcti, settings=saves.settings(AnchorMode.INTERVAL, INTERVAL_S)) as host:
        yield from _rates_of(host, "swtpm", AnchorMode.INTERVAL)


def _rates_of(host: Host, platform: str, mode: AnchorMode) -> Iterator[Rate]:
    clients: list[RawClient] = []
    with contextlib.ExitStack() as stack:
        for count in WRITERS:
            while len(clients) < count:
                clients.append(stack.enter_context(ours(host, f"writer{len(clients)}")).client)
                writers.prepare(clients[-1].exchange)
            writers.write_for(clients, 1.0)
            before = _anchor_writes(host)
            times = writers.write_for(clients, DURATION_S)
            spent = _anchor_writes(host) - before
            yield Rate(
                platform=platform,
                mode=str(mode),
                writers=count,
                saves=len(times),
                saves_per_s=len(times) / DURATION_S,
                median_us=statistics.median(times) * 1e6,
                p99_us=percentile(times, 99) * 1e6,
                anchor_writes_per_1000=spent / len(times) * 1000,
            )


def _anchor_writes(host: Host) -> int:
    with host.client() as manager:
        anchor = manager.status().anchor
    if anchor is None:
        raise RuntimeError("the manager's store is not open")
    return anchor.writes


@contextlib.contextmanager
def swtpm_platform() -> Iterator[str]:
    """Run a swtpm as the platform TPM, with a boot measured; yield its TCTI."""
    folder = Path(tempfile.mkdtemp(prefix="vb-"))
    # A keeper has a user id of its own.
    folder.chmod(0o711)
    try:
        with SwtpmPlatform(folder) as platform:
            platform.extend(0, "firmware")
            yield platform.tcti
    finally:
        shutil.rmtree(folder)


def registered() -> Registered:
    """Measure saves of one vTPM on two hosts that differ in how many others are registered.

    In memory, beside a keeper whose TPM takes no time: flush and anchor, which are the same for both, would hide it.
    """
    with contextlib.ExitStack() as stack:
        few, many = (stack.enter_context(_with_registered(count)) for count in REGISTERED)
        for _ in range(saves.BLOCKS + 1):
            few.run()
            many.run()
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(few.blocks, many.blocks, strict=True)]
    return Registered(
        *REGISTERED,
        few_us=few.median_s * 1e6,
        many_us=many.median_s * 1e6,
        ratio=many.median_s / few.median_s,
        ratio_least=min(ratios),
        ratio_most=max(ratios),
    )


@contextlib.contextmanager
def _with_registered(count: int) -> Iterator[saves.Timed]:
    with saves.host_in_memory(AnchorMode.EACH_COMMIT) as host:
        host.stop_manager()
        # In a process of its own, for it becomes the manager's user.
        child = multiprocessing.get_context("spawn").Process(
            target=_register, args=(host.state_dir, host.run_dir, count)
        )
        child.start()
        child.join()
        if child.exitcode != 0:
            raise RuntimeError(f"{count} vTPMs could not be registered")
        host.start()
        with saves.saver(host) as timed:
            yield timed


def _register(state_dir: Path, run_dir: Path, count: int) -> None:
    """Create vTPMs as the manager does, in its place, without asking it for each."""
    vault_dir = state_dir / "vault"
    owner = vault_dir.stat()
    if os.geteuid() != owner.st_uid:
        os.setgroups([])
        os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    with contextlib.closing(open_storage(vault_dir, run_dir, AnchorPolicy())) as storage:
        with contextlib.closing(KeeperClient(run_dir)) as keeper:
            records = [_record(number, keeper) for number in range(count)]
        storage.committer.run(_creating(records), patience_s=saves.HOUR_S).result()


def _record(number: int, keeper: KeeperClient) -> VtpmRecord:
    vtpm_id = VtpmId(uuid4())
    return VtpmRecord(
        id=vtpm_id,
        name=f"registered{number}",
        owner_uid=0,
        owner_gid=0,
        vm_uuid=uuid4(),
        tpm_version=TpmVersion.V2_0,
        domain=DomainKind.PROCESS,
        created_at=datetime.now(UTC),
        wrapped_key=keeper.new_key(vtpm_id).wrapped,
    )


def _creating(records: Sequence[VtpmRecord]) -> Callable[[Store], None]:
    def create(store: Store) -> None:
        for record in records:
            store.create_vtpm(record, event=Event(datetime.now(UTC), 0, "created", record.name, record.id))

    return create
