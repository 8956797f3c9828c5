"""What lacks descriptors, memory or an end leaves no slot behind, and lets no request wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.launcher.fake_domain import Launcher, is_successor, run
from vtpm.errors import ConfinementError, ConflictError, DomainError, NotFoundError
from vtpm.launcher import service
from vtpm.launcher.slot import Slot
from vtpm.wire.launcher import Ended, Replaced

pytestmark = pytest.mark.timeout(30)
MOST_NEEDED = 40


@contextlib.contextmanager
def _free_descriptors(count: int) -> Iterator[None]:
    """Let this process open so many files, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + MOST_NEEDED, hard))
    filler = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(0))
        for fd in filler[:count]:
            os.close(fd)
        del filler[:count]
        yield
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_start_leaves_nothing_when_descriptors_run_out_at_any_point(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        refusals = 0
        for free in range(MOST_NEEDED):
            before = len(os.listdir("/proc/self/fd"))
            try:
                with _free_descriptors(free):
                    info = await launcher.start("web1")
            except DomainError as error:
                assert "Too many open files" in error.message
                refusals += 1
            else:
                await launcher.stop(info.vtpm_id)
            assert await launcher.list() == ()
            assert list(tmp_path.iterdir()) == []
            assert len(os.listdir("/proc/self/fd")) == before
        # Two listeners, two journals, two pairs and a pipe at least.
        assert 10 <= refusals < MOST_NEEDED - 5

    run(tmp_path, test)


def test_the_vtpm_is_forgotten_when_no_successor_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "RETRY_S", 0)

    async def test(launcher: Launcher) -> None:
        info = await launcher.start("web1")
        launcher.domain.failures = [OSError(errno.EMFILE, "Too many open files") for _ in range(service.MAX_DEATHS)]
        launcher.domain.started[0].die()
        ended = await launcher.events.next()
        assert isinstance(ended, Ended)
        assert ended.instance_id == info.instance_id
        assert "no successor" in ended.how and "Too many open files" in ended.how
        assert await launcher.list() == ()
        await launcher.start("web1", info.vtpm_id)

    run(tmp_path, test)


def test_a_successor_comes_when_the_first_try_lacked_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "RETRY_S", 0)

    async def test(launcher: Launcher) -> None:
        info = await launcher.start("web1")
        launcher.domain.failures = [OSError(errno.EMFILE, "Too many open files")]
        launcher.domain.started[0].die()
        replaced = await launcher.events.next()
        assert isinstance(replaced, Replaced)
        assert replaced.dead_instance_id == info.instance_id
        assert is_successor(launcher.domain.started[-1])

    run(tmp_path, test)


def test_the_vtpm_is_forgotten_when_following_it_fails_with_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(launcher: Launcher) -> None:
        await launcher.start("web1")

        def fail(_slot: Slot, _role: object) -> None:
            raise RuntimeError("a defect")

        with monkeypatch.context() as context:
            context.setattr(Slot, "start_instance", fail)
            launcher.domain.started[0].die()
            assert isinstance(await launcher.events.next(), Ended)
        assert await launcher.list() == ()

    run(tmp_path, test)


def test_a_stop_ends_when_no_successor_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RETRY_S", 0.01)
    monkeypatch.setattr(service, "MAX_DEATHS", 1_000_000)

    async def test(launcher: Launcher) -> None:
        info = await launcher.start("web1")
        launcher.domain.failures = [ConfinementError("no namespace") for _ in range(1000)]
        launcher.domain.started[0].die()
        while len(launcher.domain.failures) > 995:
            await asyncio.sleep(0.001)
        await launcher.stop(info.vtpm_id)
        assert await launcher.list() == ()

    run(tmp_path, test)


def test_a_stop_fails_in_time_when_the_instance_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(launcher: Launcher) -> None:
        info = await launcher.start("web1")
        launcher.domain.started[0].dies_when_killed = False
        with monkeypatch.context() as context:
            context.setattr(service, "END_TIMEOUT_S", 0.05)
            with pytest.raises(DomainError, match="web1 did not end within"):
                await launcher.stop(info.vtpm_id)
        # It lives on, so no second one may be started.
        assert await launcher.list() == (info.vtpm_id,)
        with pytest.raises(ConflictError):
            await launcher.start("web1", info.vtpm_id)

    run(tmp_path, test)


def test_a_stop_ends_a_start_when_the_instance_is_not_confined_yet(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        starting = asyncio.create_task(launcher.start("web1"))
        while not launcher.domain.started:
            await asyncio.sleep(0)
        running = launcher.domain.started[0]
        (vtpm_id,) = await launcher.list()
        stopping = asyncio.create_task(launcher.stop(vtpm_id))
        running.fail()
        with pytest.raises(DomainError, match="web1 was not started"):
            await starting
        await stopping
        with pytest.raises(NotFoundError):
            await launcher.stop(vtpm_id)

    run(tmp_path, test, confines=False)


def test_a_start_is_refused_when_the_limit_of_open_files_allows_no_more(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        first = await launcher.start("web1")
        await launcher.start("web2")
        with pytest.raises(ConflictError, match="web3 is not started: 2 instances are running") as refused:
            await launcher.start("web3")
        assert "limit of open files" in refused.value.next_step
        await launcher.stop(first.vtpm_id)
        await launcher.start("web3")

    run(tmp_path, test, most=2)
