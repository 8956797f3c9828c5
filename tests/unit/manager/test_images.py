"""No vTPM is started, or gets its state, with an image that the host does not allow, or whose engine is too old."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest

from tests.unit.manager.test_replaced import RECORD, _storage
from tests.unit.vault.world import KEY
from vtpm.errors import (
    AccessDeniedError,
    ConflictError,
    NotFoundError,
    PlatformTpmError,
    StateError,
    UnavailableError,
    UsageError,
    VtpmError,
)
from vtpm.manager.access import Caller
from vtpm.manager.audit_log import AuditLog
from vtpm.manager.images import ImageService
from vtpm.manager.running import Running
from vtpm.manager.storage import VaultDoor
from vtpm.secret import Secret
from vtpm.tpm.types import StateKind, VtpmId
from vtpm.vault.contents import Contents, begin
from vtpm.vault.launch_policy import NewImages
from vtpm.vault.records import DomainKind, Event, VtpmRecord
from vtpm.wire.api_images import AllowImage, RetireImage
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.launcher import InstanceInfo, KindArgs, Measured

pytestmark = pytest.mark.timeout(30)
ONE, TWO = "ab" * 32, "cd" * 32
ROOT = Caller(0, 0, True, True)
RECORD_STOPPED = replace(RECORD, lifecycle="stopped")
OTHER_ID = VtpmId(uuid4())
USER = Caller(1000, 1000, False, False)


class World:
    """An image service over a real vault; launcher and keeper say what the test wants."""

    def __init__(self, folder: Path, new: NewImages) -> None:
        self.would_run = {"process": Measured(ONE, 0x000902, "first")}
        self.in_pcr: list[tuple[str, str]] = []
        self.keeper_fails: VtpmError | None = None
        self.running: dict[VtpmId, Running] = {}
        self.door = VaultDoor(lambda _: _storage(folder), self._nothing)
        self.service = ImageService(
            lambda: self,
            self,  # type: ignore[arg-type]
            CallThreads("keeper", 1),
            self.door,
            AuditLog(self.door),
            self.running,
            new,
        )

    async def _nothing(self) -> None:
        pass

    async def call(self, op: str, args: object, timeout_s: float = 1.0) -> tuple[Any, tuple[int, ...]]:
        assert op == "measure" and isinstance(args, KindArgs) and timeout_s > 0
        if args.kind not in self.would_run:
            raise UsageError(f"domains of the kind {args.kind} are not available on this host")
        return self.would_run[args.kind], ()

    def measure_launch(self, kind: str, measurement: str) -> None:
        if self.keeper_fails is not None:
            raise self.keeper_fails
        self.in_pcr.append((kind, measurement))

    async def start(self, record: VtpmRecord = RECORD) -> str:
        async with self.service.admitted(record) as measurement:
            return measurement

    async def events(self) -> list[Event]:
        return list(await self.door.run(lambda store: store.list_events()))

    def run(self, measurement: str) -> None:
        """Have a vTPM run this image."""
        self.running[RECORD.id] = Running(RECORD, info(measurement), Mock())


def info(measurement: str) -> InstanceInfo:
    return InstanceInfo(RECORD.id, Mock(), "web1", 1000, measurement, 1, "/c", "/d", ())


def run(folder: Path, test: Callable[[World], Awaitable[None]], new: NewImages = NewImages.REFUSE) -> None:
    async def in_world() -> None:
        world = World(folder / "vault", new)
        await world.door.open()
        try:
            await world.door.run(lambda store: store.create_vtpm(RECORD_STOPPED))
            await test(world)
        finally:
            await world.door.close()

    asyncio.run(in_world())


def test_first_image_of_a_kind_is_allowed_by_nobody_and_measured_when_it_starts(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        assert await world.start() == await world.start() == ONE
        assert world.in_pcr == [("process", ONE)] * 2
        (event,) = await world.events()
        assert (event.kind, event.actor_uid) == ("image_allowed", None)
        assert json.loads(event.detail)["measurement"] == ONE
        (image,) = await world.service.images(ROOT)
        assert (image.label, image.engine_version, image.state, image.vtpms) == ("first", "0.9.2", "allowed", [])

    run(tmp_path, test)


def test_new_image_is_refused_and_not_measured_until_it_is_allowed(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        world.would_run["process"] = Measured(TWO, 0x000902, "second")
        with pytest.raises(AccessDeniedError, match=f"{TWO} is new"):
            await world.start()
        assert world.in_pcr == [("process", ONE)]
        allowed = await world.service.allow(AllowImage(TWO, "next"), ROOT)
        assert (allowed.image.kind, allowed.image.engine_version, allowed.warnings) == ("process", "0.9.2", [])
        assert await world.start() == TWO
        assert [event.actor_uid for event in await world.events()] == [None, 0]

    run(tmp_path, test)


def test_new_image_is_allowed_by_itself_when_the_host_is_set_so(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        world.would_run["process"] = Measured(TWO, 0x000902, "second")
        assert await world.start() == TWO
        assert [event.kind for event in await world.events()] == ["image_allowed"] * 2

    run(tmp_path, test, NewImages.ALLOW)


@pytest.mark.parametrize("new", NewImages)
def test_retired_image_does_not_start_and_is_not_taken_up(tmp_path: Path, new: NewImages) -> None:
    async def test(world: World) -> None:
        await world.start()
        assert (await world.service.retire(RetireImage(ONE), ROOT)).state == "retired"
        assert (await world.service.retire(RetireImage(ONE), ROOT)).state == "retired"
        with pytest.raises(AccessDeniedError, match="is retired"):
            await world.start()
        with pytest.raises(AccessDeniedError, match="is retired"):
            await world.service.check_taken_up(RECORD, info(ONE))
        assert [event.kind for event in await world.events()] == ["image_allowed", "image_retired"]
        await world.service.allow(AllowImage(ONE, "back"), ROOT)
        assert await world.start() == ONE

    run(tmp_path, test, new)


@pytest.mark.parametrize("new", NewImages)
@pytest.mark.parametrize(
    ("own", "other"), [(DomainKind.QEMU, DomainKind.QEMU_SWTPM), (DomainKind.QEMU_SWTPM, DomainKind.QEMU)]
)
def test_image_of_another_make_is_not_started_not_taken_up_and_not_allowed(
    tmp_path: Path, new: NewImages, own: DomainKind, other: DomainKind
) -> None:
    async def test(world: World) -> None:
        world.would_run = {own.value: Measured(ONE, 0x000902, "first"), other.value: Measured(TWO, 0x000902, "second")}
        record, foreign = replace(RECORD, domain=own), replace(RECORD, domain=other)
        assert await world.start(record) == ONE
        # The launcher's image of the other make has been changed for one of this make.
        world.would_run[other.value] = Measured(ONE, 0x000902, "first")
        with pytest.raises(
            AccessDeniedError, match=f"is for vTPMs of the kind {own}; it runs none of the kind {other},"
        ):
            await world.start(foreign)
        # Nor when nothing is known of the other kind yet, whose images are its first.
        with pytest.raises(AccessDeniedError, match=f"it runs none of the kind {other},"):
            await world.service.check_taken_up(foreign, info(ONE))
        with pytest.raises(AccessDeniedError, match=f"it runs none of the kind {other},"):
            await world.service.allow(AllowImage(ONE, "mistaken", other.value), ROOT)
        assert world.in_pcr == [(own, ONE)]
        assert [image.kind for image in await world.service.images(ROOT)] == [own]

    run(tmp_path, test, new)


def test_retirement_is_refused_by_name_while_the_image_runs_or_is_being_started(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        async with world.service.admitted(RECORD):
            with pytest.raises(ConflictError, match="runs web1"):
                await world.service.retire(RetireImage(ONE), ROOT)
        world.run(ONE)
        with pytest.raises(ConflictError, match="runs web1"):
            await world.service.retire(RetireImage(ONE), ROOT)
        (image,) = await world.service.images(ROOT)
        assert image.vtpms == ["web1"]
        world.running.clear()
        await world.service.retire(RetireImage(ONE), ROOT)
        with pytest.raises(NotFoundError):
            await world.service.retire(RetireImage(TWO), ROOT)

    run(tmp_path, test)


def test_start_sees_the_retirement_when_both_are_asked_for_at_once(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        results = await asyncio.gather(
            world.service.retire(RetireImage(ONE), ROOT), world.start(), return_exceptions=True
        )
        # One of the two came first, and the other was refused.
        assert sum(isinstance(result, (AccessDeniedError, ConflictError)) for result in results) == 1

    run(tmp_path, test)


def test_start_is_refused_when_the_image_cannot_be_measured_into_the_pcr(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        for failure in (PlatformTpmError("it does not answer"), UnavailableError("no keeper")):
            world.keeper_fails = failure
            with pytest.raises(type(failure)):
                await world.start()
        # What runs was measured when it was started.
        await world.service.check_taken_up(RECORD, info(ONE))
        assert world.service._starting == {}

    run(tmp_path, test)


def test_instance_is_not_taken_up_when_its_image_is_not_allowed(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.start()
        await world.service.check_taken_up(RECORD, info(ONE))
        with pytest.raises(AccessDeniedError, match="is new"):
            await world.service.check_taken_up(RECORD, info(TWO))
        assert world.in_pcr == [("process", ONE)] * 2

    run(tmp_path, test)


def test_successor_is_refused_when_it_is_of_another_image(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        world.service.check_successor(info(ONE), info(ONE))
        with pytest.raises(AccessDeniedError, match="its successor is"):
            world.service.check_successor(info(ONE), info(TWO))

    run(tmp_path, test, NewImages.ALLOW)


def test_older_engine_does_not_start_a_vtpm_whose_state_needs_a_newer_one(tmp_path: Path) -> None:
    newer, older = Measured(ONE, 0x000A00, "newer"), Measured(TWO, 0x000902, "older")
    saved = replace(RECORD_STOPPED, id=OTHER_ID, name="saved")
    saved, states = begin(saved, Secret(KEY), Contents({StateKind.PERMANENT: b"state"}, newer.engine_version))

    async def test(world: World) -> None:
        await world.door.run(lambda store: store.create_vtpm(saved, states))
        world.would_run["process"] = older
        with pytest.raises(StateError, match=r"saved has state that needs libtpms 0\.10\.0; .* has 0\.9\.2"):
            await world.start(saved)
        assert await world.start(RECORD) == TWO
        world.would_run["process"] = newer
        assert await world.start(saved) == ONE
        world.would_run["process"] = older
        allowed = await world.service.allow(AllowImage(TWO, "old"), ROOT)
        assert allowed.warnings == ["its libtpms 0.9.2 does not read the state of saved (needs 0.10.0)"]
        with pytest.raises(StateError, match="saved has state"):
            await world.start(saved)

    run(tmp_path, test, NewImages.ALLOW)


def test_image_that_is_still_to_come_is_allowed_when_its_kind_is_told(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        with pytest.raises(UsageError, match="is not what any kind") as refused:
            await world.service.allow(AllowImage(TWO, "next"), ROOT)
        assert "--kind" in refused.value.next_step
        with pytest.raises(UsageError, match="is not what any kind"):
            await world.service.allow(AllowImage(TWO, "next", "floppy"), ROOT)
        with pytest.raises(UsageError, match="no measurement"):
            await world.service.allow(AllowImage("cd", "next", "qemu"), ROOT)
        allowed = await world.service.allow(AllowImage(TWO, "next", "qemu"), ROOT)
        assert (allowed.image.kind, allowed.image.engine_version) == ("qemu", "")

    run(tmp_path, test)


def test_images_are_administrators_alone(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        for asked in (
            world.service.images(USER),
            world.service.allow(AllowImage(ONE, "mine"), USER),
            world.service.retire(RetireImage(ONE), USER),
            world.service.launches(USER),
            world.service.launchable(USER),
        ):
            with pytest.raises(AccessDeniedError):
                await asked
        assert await world.service.images(ROOT) == []

    run(tmp_path, test)


def test_launchable_is_what_is_allowed_and_the_first_of_a_kind_that_is_not_known(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        assert await world.service.launchable(ROOT) == [("process", ONE)]
        await world.start()
        world.would_run |= {"process": Measured(TWO, 0x000902, "second"), "qemu": Measured(TWO, 0x000902, "machine")}
        assert sorted(await world.service.launchable(ROOT)) == [("process", ONE), ("qemu", TWO)]
        await world.service.retire(RetireImage(ONE), ROOT)
        assert await world.service.launchable(ROOT) == [("qemu", TWO)]

    run(tmp_path, test)
