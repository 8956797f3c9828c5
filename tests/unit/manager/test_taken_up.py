"""What a manager that starts does with an instance that runs: it hands state to those of allowed images alone."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest

from tests.unit.manager.test_replaced import DEAD, RECORD, _storage
from tests.unit.vault.world import FROZEN, HELD, MOVED
from vtpm.errors import UnavailableError
from vtpm.manager.service import ManagerService
from vtpm.tpm.types import VtpmId
from vtpm.vault.holding import Holding
from vtpm.vault.launch_policy import ImageState, LaunchImage, NewImages
from vtpm.wire.api import LifeState, MeasuredServices
from vtpm.wire.launcher import Instances, NoArgs, VtpmArgs

pytestmark = pytest.mark.timeout(30)
IMAGE = LaunchImage("process", DEAD.measurement, "it", 0, ImageState.ALLOWED, datetime.now(UTC))


class _Launcher:
    """Has one instance."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []
        self.theirs: socket.socket | None = None

    async def call(self, op: str, args: object, timeout_s: float = 10.0) -> tuple[Any, tuple[int, ...]]:
        assert timeout_s > 0
        self.asked.append((op, args))
        if op == "list":
            return Instances((RECORD.id,)), ()
        if op == "attach":
            ours, self.theirs = socket.socketpair()
            return DEAD, (ours.detach(),)
        return NoArgs(), ()


def _taken_up(folder: Path, *images: LaunchImage) -> tuple[_Launcher, Mock, list[str]]:
    """Start a manager; return what it asked of launcher and keeper, and why it says that the instance has ended."""
    launcher, keeper = _Launcher(), Mock()
    keeper.unwrap_key.side_effect = UnavailableError("the keeper does not answer")

    async def run() -> list[str]:
        service = ManagerService(
            folder, folder, lambda _: _storage(folder / "vault"), MeasuredServices(), NewImages.REFUSE
        )
        service.launcher = launcher  # type: ignore[assignment]
        service._keeper = service.images._keeper = keeper
        try:
            service.door._taken_up = True
            service.door._storage = _storage(folder / "vault")
            await service._store(lambda store: store.create_vtpm(replace(RECORD, lifecycle="running")))
            for image in images:
                await service._store(lambda store, image=image: store.put_image(image))  # type: ignore[misc]
            await service._reconcile()
            assert service._states[RECORD.id] is LifeState.STOPPED
            assert service.running == {}
            events = await service._store(lambda store: store.list_events())
            assert len(await service._store(lambda store: store.list_images())) == len(images)
            return [json.loads(event.detail)["how"] for event in events if event.kind == "instance_ended"]
        finally:
            await service.door.close()
            if launcher.theirs is not None:
                launcher.theirs.close()

    return launcher, keeper, asyncio.run(run())


@pytest.mark.parametrize(
    "image",
    [replace(IMAGE, state=ImageState.RETIRED), replace(IMAGE, measurement="11" * 32)],
    ids=["retired", "never allowed"],
)
def test_instance_is_ended_and_gets_no_state_when_its_image_is_not_allowed_any_more(
    tmp_path: Path, image: LaunchImage
) -> None:
    launcher, keeper, (how,) = _taken_up(tmp_path, image)
    assert ("stop", VtpmArgs(RECORD.id)) in launcher.asked
    assert not keeper.unwrap_key.called
    assert how.startswith("it was ended when the manager started: the process image 0000")


@pytest.mark.parametrize("images", [(IMAGE,), ()], ids=["allowed", "started by a manager that kept no list"])
def test_key_is_asked_for_once_the_image_is_known_to_be_allowed(tmp_path: Path, images: tuple[LaunchImage]) -> None:
    _, keeper, (how,) = _taken_up(tmp_path, *images)
    keeper.measure_launch.assert_called_once_with("process", DEAD.measurement)
    assert keeper.unwrap_key.called
    assert "the keeper does not answer" in how


@pytest.mark.parametrize("state", LifeState)
def test_state_is_looked_for_in_the_store_again_only_where_a_move_may_have_changed_it(
    tmp_path: Path, state: LifeState
) -> None:
    service = ManagerService(tmp_path, tmp_path, Mock(), MeasuredServices(), NewImages.REFUSE)
    service._states[RECORD.id] = state
    service.look_again(RECORD.id)
    kept = state not in (LifeState.STOPPED, LifeState.FROZEN, LifeState.INERT)
    assert (RECORD.id in service._states) is kept


@pytest.mark.parametrize("after", [FROZEN, MOVED], ids=["frozen", "moved"])
def test_what_moved_while_the_launcher_was_asked_is_as_it_is_by_now_and_the_others_are_settled(
    tmp_path: Path, after: Holding
) -> None:
    other = replace(RECORD, id=VtpmId(uuid4()), name="zz", lifecycle="running")

    async def run() -> None:
        service = ManagerService(tmp_path, tmp_path, Mock(), MeasuredServices(), NewImages.REFUSE)

        async def call(op: str, args: object, timeout_s: float = 10.0) -> tuple[Any, tuple[int, ...]]:
            assert op == "list"
            await service._store(lambda store: store.record_move(RECORD.id, HELD, FROZEN))
            if after is MOVED:
                await service._store(lambda store: store.record_move(RECORD.id, FROZEN, MOVED))
            return Instances(()), ()

        service.launcher = Mock(call=call)
        service.door._storage = _storage(tmp_path / "vault")
        try:
            for record in (replace(RECORD, lifecycle="stopped"), other):
                await service._store(lambda store, record=record: store.create_vtpm(record))  # type: ignore[misc]
            await service._reconcile()
            assert RECORD.id not in service._states
            assert service._states[other.id] is LifeState.STOPPED
        finally:
            await service.door.close()

    asyncio.run(run())
