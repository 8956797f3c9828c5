"""A manager that takes up what runs gets instances that are confined, and no other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.launcher.fake_domain import Launcher, run
from vtpm.errors import ConflictError, NotFoundError
from vtpm.launcher import service
from vtpm.wire.launcher import InstanceInfo, Replaced

pytestmark = pytest.mark.timeout(30)


async def _dead_under_its_guest(launcher: Launcher) -> InstanceInfo:
    """Start a vTPM whose successor is not confined yet."""
    launcher.domain.confines = True
    info = await launcher.start("web1")
    launcher.domain.confines = False
    launcher.domain.started[0].die()
    while len(launcher.domain.started) < 2:
        await asyncio.sleep(0)
    return info


def test_attach_waits_when_the_successor_is_not_confined_yet(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        dead = await _dead_under_its_guest(launcher)
        attaching = asyncio.create_task(launcher.attach(dead.vtpm_id))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not attaching.done()
        launcher.domain.started[1].confine()
        info = await attaching
        replaced = await launcher.events.next()
        assert isinstance(replaced, Replaced)
        assert info == replaced.instance
        assert info.pid == launcher.domain.started[1].pid
        assert info.protections

    run(tmp_path, test)


def test_attach_is_refused_when_the_successor_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ATTACH_TIMEOUT_S", 0.05)

    async def test(launcher: Launcher) -> None:
        dead = await _dead_under_its_guest(launcher)
        with pytest.raises(ConflictError, match="web1 is being started or replaced"):
            await launcher.attach(dead.vtpm_id)
        launcher.domain.started[1].confine()
        await launcher.attach(dead.vtpm_id)

    run(tmp_path, test)


def test_attach_is_refused_when_no_successor_comes(tmp_path: Path) -> None:
    async def test(launcher: Launcher) -> None:
        dead = await _dead_under_its_guest(launcher)
        attaching = asyncio.create_task(launcher.attach(dead.vtpm_id))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(launcher.stop(dead.vtpm_id))
        await asyncio.sleep(0)
        launcher.domain.started[1].fail()
        with pytest.raises(NotFoundError, match="web1 has ended"):
            await attaching
        await stopping

    run(tmp_path, test)
