"""What becomes of a vTPM whose instance has ended while a move decided about it: nobody is stuck."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.unit.manager.test_replaced import DEAD, RECORD, _storage
from tests.unit.vault.world import HELD, LEAVING
from vtpm.errors import ConflictError, NotFoundError
from vtpm.manager.access import Caller
from vtpm.manager.service import ManagerService
from vtpm.vault.holding import Holding, Right
from vtpm.vault.launch_policy import NewImages
from vtpm.wire.api import LifeState, MeasuredServices

pytestmark = pytest.mark.timeout(30)
ROOT = Caller(0, 0, is_admin=True)


def settled(folder: Path, test: Callable[[ManagerService], Awaitable[None]]) -> None:
    """Have a manager whose store has a running vTPM, bound to an instance that is no more."""

    async def run() -> None:
        service = ManagerService(folder, folder, Mock(), MeasuredServices(), NewImages.REFUSE)
        service.door._storage = _storage(folder / "vault")

        async def call(*_: object) -> None:
            raise NotFoundError("there is no such instance")

        service.launcher = Mock(call=call)
        try:
            await service._store(lambda store: store.create_vtpm(replace(RECORD, lifecycle="stopped")))
            await service._store(lambda store: store.bind_instance(RECORD.id, DEAD.instance_id))
            await service._store(lambda store: store.set_lifecycle(RECORD.id, "running"))
            await test(service)
        finally:
            await service.door.close()

    asyncio.run(run())


async def state_of(service: ManagerService) -> tuple[str, object]:
    record = await service._store(lambda store: store.get_vtpm(RECORD.id))
    return record.lifecycle, record.instance_id


def test_vtpm_is_stopped_when_its_instance_ended_as_it_was_being_frozen(tmp_path: Path) -> None:
    async def test(service: ManagerService) -> None:
        # As this manager thinks; the store has not heard of it yet, and never will.
        service._states[RECORD.id] = LifeState.FROZEN
        await service._settle_record(RECORD, "it was killed")
        assert await state_of(service) == ("stopped", None)
        assert (await service.show("web1", ROOT)).state == "stopped"

    settled(tmp_path, test)


def test_vtpm_is_settled_as_it_is_when_its_instance_is_unbound_and_not_as_it_was_read(tmp_path: Path) -> None:
    async def test(service: ManagerService) -> None:
        await service._store(lambda store: store.record_move(RECORD.id, HELD, LEAVING))
        read = await service._store(lambda store: store.get_vtpm(RECORD.id))
        # Aborted meanwhile, by the word of the destination.
        await service._store(lambda store: store.record_move(RECORD.id, LEAVING, Holding(Right.HELD, 3)))
        await service._settle_read(read, "it was killed")
        assert await state_of(service) == ("stopped", None)

    settled(tmp_path, test)


def test_frozen_vtpm_stays_frozen_without_its_instance_and_is_stopped_when_it_is_taken_back(tmp_path: Path) -> None:
    async def test(service: ManagerService) -> None:
        service._states[RECORD.id] = LifeState.FROZEN
        await service._store(lambda store: store.record_move(RECORD.id, HELD, LEAVING))
        await service._settle_record(RECORD, "it was killed")
        assert await state_of(service) == ("frozen", None)
        await service._store(lambda store: store.record_move(RECORD.id, LEAVING, Holding(Right.HELD, 3)))
        assert (await service.show("web1", ROOT)).state == "stopped"

    settled(tmp_path, test)


def test_vtpm_that_runs_nowhere_can_be_stopped(tmp_path: Path) -> None:
    async def test(service: ManagerService) -> None:
        assert (await service.stop("web1", ROOT)).state == "stopped"
        assert await state_of(service) == ("stopped", None)
        with pytest.raises(ConflictError, match="nothing to stop"):
            await service.stop("web1", ROOT)

    settled(tmp_path, test)


def test_vtpm_is_stopped_when_it_is_held_again_and_its_instance_ended_meanwhile(tmp_path: Path) -> None:
    async def test(service: ManagerService) -> None:
        await service.settle_ended(RECORD.id)
        assert await state_of(service) == ("stopped", None)

    settled(tmp_path, test)


def test_session_goes_on_under_the_new_epoch_without_the_key_being_asked_for(tmp_path: Path) -> None:
    async def test(service: ManagerService) -> None:
        vault = service.door.vault
        await asyncio.to_thread(vault.open_vtpm, RECORD.id, bytes(32))
        await service._store(lambda store: store.record_move(RECORD.id, HELD, LEAVING))
        await service._store(lambda store: store.record_move(RECORD.id, LEAVING, Holding(Right.HELD, 3)))
        running = Mock(record=RECORD)
        record = await service._store(lambda store: store.get_vtpm(RECORD.id))
        await service.go_on(running, record)
        assert vault._session(RECORD.id).epoch == 3
        assert (running.record, service._states[RECORD.id]) == (record, LifeState.RUNNING)
        vault.close_vtpm(RECORD.id)
        with pytest.raises(ConflictError, match="not open"):
            await service.go_on(running, record)

    settled(tmp_path, test)
