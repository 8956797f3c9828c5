"""The launcher starts the image that it was told to, and nothing else, also in the place of an instance that died."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.launcher.fake_domain import MEASUREMENT, Launcher, run
from vtpm.errors import ConflictError, UsageError
from vtpm.wire.launcher import Ended, KindArgs, Measured, Replaced

pytestmark = pytest.mark.timeout(30)
OTHER = "11" * 32


def test_what_would_run_is_said_when_a_kind_is_measured(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        measured, fds = await launcher.call("measure", KindArgs("process"))
        assert (measured, fds) == (Measured(MEASUREMENT, 0x000902, "fake"), ())
        launcher.domain.measurement = OTHER
        measured, _ = await launcher.call("measure", KindArgs("process"))
        assert measured.measurement == OTHER
        with pytest.raises(UsageError, match="kind xen are not available"):
            await launcher.call("measure", KindArgs("xen"))

    run(tmp_path, test)


def test_a_start_is_refused_when_the_image_is_another_than_was_asked_for(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        launcher.domain.measurement = OTHER
        with pytest.raises(ConflictError, match=f"{MEASUREMENT}, and what is here now is {OTHER}"):
            await launcher.start("web1")
        assert launcher.domain.started == []
        assert await launcher.list() == ()
        assert list(tmp_path.iterdir()) == []

    run(tmp_path, test)


def test_no_successor_comes_when_the_image_has_changed_meanwhile(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        info = await launcher.start("web1")
        launcher.domain.measurement = OTHER
        # What runs is told by what it was started with.
        assert (await launcher.attach(info.vtpm_id)).measurement == MEASUREMENT
        launcher.domain.started[0].die()
        ended = await launcher.events.next()
        assert isinstance(ended, Ended)
        assert "signal SIGSEGV; no successor" in ended.how
        assert OTHER in ended.how
        assert len(launcher.domain.started) == 1
        assert await launcher.list() == ()

    run(tmp_path, test)


def test_a_successor_comes_when_the_image_is_still_the_same(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        await launcher.start("web1")
        launcher.domain.started[0].die()
        replaced = await launcher.events.next()
        assert isinstance(replaced, Replaced)
        assert replaced.instance.measurement == MEASUREMENT

    run(tmp_path, test)


def test_nothing_is_started_when_the_stop_comes_while_the_image_is_prepared(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        prepared = asyncio.Event()
        launcher.domain.prepared = prepared
        starting = asyncio.create_task(launcher.start("web1"))
        while not await launcher.list():
            await asyncio.sleep(0)
        (vtpm_id,) = await launcher.list()
        stopping = asyncio.create_task(launcher.stop(vtpm_id))
        await asyncio.sleep(0)
        prepared.set()
        with pytest.raises(ConflictError, match="was stopped while it was being started"):
            await starting
        await stopping
        assert launcher.domain.started == []

    run(tmp_path, test)
