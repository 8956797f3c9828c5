"""Which software may run vTPMs: decided before an instance is started, and before it is given state.

The launcher says what would run, the vault keeps what is allowed, the keeper has it in the platform TPM's PCR. Nothing
here depends on the kind of domain. The manager's alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from vtpm.errors import AccessDeniedError, ConflictError, UsageError, VtpmError
from vtpm.manager.access import Caller
from vtpm.manager.audit_log import AuditLog
from vtpm.manager.running import Running
from vtpm.manager.storage import VaultDoor
from vtpm.tpm.types import VtpmId
from vtpm.vault.envelope import least_engine_version
from vtpm.vault.launch_policy import (
    ImageState,
    LaunchImage,
    NewImages,
    admit,
    check_engine,
    check_kind,
    find,
    retired,
    version_text,
)
from vtpm.vault.records import DomainKind, Event, VtpmRecord
from vtpm.vault.rules import INERT
from vtpm.vault.store import Store
from vtpm.wire.api_images import AllowedImage, AllowImage, Image, Launch, Launches, RetireImage
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.launcher import InstanceInfo, KindArgs, Measured

MEASURE_TIMEOUT_S = 60.0
"""Of a kind's preparation, which may try out how virtual machines run on this host."""
MAX_NAMED = 5
_Key = tuple[str, str]
_log = logging.getLogger("vtpm.manager.images")


class Launcher(Protocol):
    """What is asked of the launcher; see LauncherLink."""

    async def call(self, op: str, args: object, timeout_s: float = ...) -> tuple[Any, tuple[int, ...]]:
        """See LauncherLink."""
        ...


class ImageService:
    """See the module.

    Args:
        launcher: says what would run.
        keeper: asked in `threads`, for it blocks.
        door: the vault.
        running: what runs, by vTPM.
        new: what becomes of an image that was never seen.
    """

    def __init__(
        self,
        launcher: Callable[[], Launcher],
        keeper: KeeperClient,
        threads: CallThreads,
        door: VaultDoor,
        audit: AuditLog,
        running: Mapping[VtpmId, Running],
        new: NewImages,
    ) -> None:
        self._launcher = launcher
        self._keeper = keeper
        self._threads = threads
        self._door = door
        self._audit = audit
        self._running = running
        self._new = new
        self._starting: dict[VtpmId, tuple[str, _Key]] = {}
        self.waiting: Callable[[], Iterable[tuple[str, str, str]]] = tuple
        """Name, kind and measurement of each vTPM whose instance waits for it to arrive. Set once."""

    # -- before state is handed out ---------------------------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def admitted(self, record: VtpmRecord) -> AsyncIterator[str]:
        """Give the measurement of what is to be started for a vTPM, once it may run; not to be retired meanwhile.

        Raises:
            AccessDeniedError: the image is retired, or new and not allowed.
            StateError: its engine is older than the vTPM's state needs.
            PlatformTpmError, UnavailableError: it is not in the platform TPM's PCR, and cannot be brought there.
            VtpmError: domains of this kind cannot be started.
        """
        measured = await self._measure(record.domain)
        image = _image(record.domain, measured.measurement, measured.label, measured.engine_version)
        # Before the store is asked, which does one thing after the other: a retirement that comes later sees it.
        self._starting[record.id] = (record.name, _key(image))
        try:
            await self._enter(image, partial(_admit, record, image, self._new))
            await self._threads.run(self._keeper.measure_launch, image.kind, image.measurement)
            yield image.measurement
        finally:
            del self._starting[record.id]

    async def check_taken_up(self, record: VtpmRecord, info: InstanceInfo) -> None:
        """Check that an instance that ran before this manager may have its state. Raises AccessDeniedError."""
        image = _image(record.domain, info.measurement, "found running", 0)
        await self._enter(image, partial(_admit_running, image, self._new))
        try:
            await self._threads.run(self._keeper.measure_launch, record.domain.value, info.measurement)
        except VtpmError as error:
            # It was measured when it was started; its guest must not pay for a TPM that does not answer now.
            _log.warning("%s: whether its image is in the PCR is not known: %s", record.name, error)

    def check_successor(self, dead: InstanceInfo, successor: InstanceInfo) -> None:
        """Check that an instance is of the same image as the one that it replaces. Raises AccessDeniedError."""
        if successor.measurement != dead.measurement:
            raise AccessDeniedError(
                f"the instance of {dead.name} ran the image {dead.measurement}, and its successor is"
                f" {successor.measurement}"
            )

    async def _enter(self, image: LaunchImage, admit_it: Callable[[Store], bool]) -> None:
        if await self._door.run(admit_it):
            _log.warning("the %s image %s (%s) is new, and allowed", image.kind, image.measurement[:16], image.label)
            await self._audit.came()

    async def _measure(self, kind: DomainKind) -> Measured:
        measured: Measured = (await self._launcher().call("measure", KindArgs(kind.value), MEASURE_TIMEOUT_S))[0]
        return measured

    # -- what administrators ask ------------------------------------------------------------------------------------
    async def images(self, caller: Caller) -> list[Image]:
        """Return all images that are known to this host."""
        caller.require_admin("see the images that may run vTPMs")
        return [self._describe(image) for image in await self._door.run(lambda store: store.list_images())]

    async def launchable(self, caller: Caller) -> list[tuple[str, str]]:
        """Return kind and measurement of what may run vTPMs: what is allowed, and the first of a kind that would be."""
        images = await self.images(caller)
        found = [(image.kind, image.measurement) for image in images if image.state == ImageState.ALLOWED.value]
        known = {image.kind for image in images}
        for kind in (kind for kind in DomainKind if kind.value not in known):
            with contextlib.suppress(VtpmError):  # this host has no such domains
                found.append((kind.value, (await self._measure(kind)).measurement))
        return found

    async def allow(self, wanted: AllowImage, caller: Caller) -> AllowedImage:
        """Let an image run vTPMs, also one that is not here yet."""
        caller.require_admin("allow images to run vTPMs")
        kind, engine_version = await self._what_is(wanted)
        image = _image(kind, wanted.measurement, wanted.label, engine_version)
        event = _event(caller.uid, "image_allowed", image)
        await self._door.run(partial(_allow, image, event))
        await self._audit.came()
        return AllowedImage(self._describe(image), await self._warnings(image))

    async def retire(self, wanted: RetireImage, caller: Caller) -> Image:
        """Let an image run no vTPM any more."""
        caller.require_admin("retire images")
        images = await self._door.run(lambda store: store.list_images())
        kinds = {found.kind for found in images if found.measurement == wanted.measurement}
        kind = wanted.kind or next(iter(kinds), "")
        users = self._users((kind, wanted.measurement))
        if users:
            raise ConflictError(
                f"the {kind} image {wanted.measurement} runs {_named(users)}",
                next_step="Start them with another image first: `vtpm stop`, then `vtpm start`",
            )
        image = await self._door.run(partial(_retire, kind, wanted.measurement, caller.uid))
        await self._audit.came()
        return self._describe(image)

    async def launches(self, caller: Caller) -> Launches:
        """Return what was launched in this boot, by the keeper's log, and whether the PCR says so too."""
        caller.require_admin("see what was launched")
        state = await self._threads.run(self._keeper.launches)
        images = await self._door.run(lambda store: store.list_images())
        labels = {_key(image): image.label for image in images}
        return Launches(
            bank=state.bank,
            pcr=state.pcr,
            value=state.value,
            start=state.start,
            replays=state.replays,
            doubt=state.doubt,
            log=state.log,
            entries=[
                Launch(entry.kind, entry.measurement, labels.get((entry.kind, entry.measurement), ""), entry.held)
                for entry in state.entries
            ],
        )

    async def _what_is(self, wanted: AllowImage) -> tuple[DomainKind, int]:
        """Return kind and engine version of an image; the latter is 0 for one that is not what would be started now."""
        kinds = [kind for kind in DomainKind if wanted.kind in (None, kind)]
        for kind in kinds:
            try:
                measured = await self._measure(kind)
            except VtpmError as error:
                _log.info("what %s domains would run is not known: %s", kind, error)
                continue
            if measured.measurement == wanted.measurement:
                return kind, measured.engine_version
        if wanted.kind is None or not kinds:
            raise UsageError(
                f"{wanted.measurement[:80]!r} is not what any kind of domain would run now",
                next_step="To allow an image that is still to come, say --kind: "
                + ", ".join(kind.value for kind in DomainKind),
            )
        return kinds[0], 0

    async def _warnings(self, image: LaunchImage) -> list[str]:
        """Say which vTPMs cannot be started with an image."""
        records = await self._door.run(lambda store: store.list_vtpms())
        found = []
        for record in records:
            if record.domain == image.kind and image.engine_version:
                # One at a time, so that nobody's save waits for long.
                needs = await self._door.run(partial(_needs, record.id))
                if needs > image.engine_version:
                    found.append(f"{record.name} (needs {version_text(needs)})")
        if not found:
            return []
        return [f"its libtpms {version_text(image.engine_version)} does not read the state of {_named(found)}"]

    def _users(self, key: _Key) -> list[str]:
        running = [
            running.record.name
            for running in self._running.values()
            if (running.record.domain.value, running.info.measurement) == key
        ]
        starting = (name for name, starting in self._starting.values() if starting == key)
        waiting = (name for name, *waiting in self.waiting() if tuple(waiting) == key)
        return sorted({*running, *starting, *waiting})

    def _describe(self, image: LaunchImage) -> Image:
        return Image(
            kind=image.kind,
            measurement=image.measurement,
            label=image.label,
            engine_version=version_text(image.engine_version) if image.engine_version else "",
            state=image.state.value,
            changed_at=image.changed_at.isoformat(),
            vtpms=self._users(_key(image)),
        )


def _admit(record: VtpmRecord, image: LaunchImage, new: NewImages, store: Store) -> bool:
    """Let an image run a vTPM; return whether it was put into the list for that."""
    if record.lifecycle != INERT:
        # Of one that is to arrive nothing is here yet; its engine is held against it when it comes.
        check_engine(record.name, _needs(record.id, store), image)
    return _put_unknown(image, new, store)


def _admit_running(image: LaunchImage, new: NewImages, store: Store) -> bool:
    """Let an image go on; return whether it was put into the list for that.

    Of a kind that no start was decided about (an older manager started it) any goes on: the first start is the first.
    """
    images = store.list_images()
    check_kind(images, image.kind, image.measurement)
    return any(known.kind == image.kind for known in images) and _put_unknown(image, new, store)


def _allow(image: LaunchImage, event: Event, store: Store) -> None:
    check_kind(store.list_images(), image.kind, image.measurement)
    store.put_image(image, event=event)


def _put_unknown(image: LaunchImage, new: NewImages, store: Store) -> bool:
    unknown = admit(store.list_images(), image, new)
    if unknown is not None:
        store.put_image(unknown, event=_event(None, "image_allowed", unknown))
    return unknown is not None


def _needs(vtpm_id: VtpmId, store: Store) -> int:
    """Return the least engine version that reads all that is saved of a vTPM; 0 when any does."""
    return max((least_engine_version(state.envelope) for state in store.read_state(vtpm_id)), default=0)


def _retire(kind: str, measurement: str, actor_uid: int, store: Store) -> LaunchImage:
    images = store.list_images()
    before = find(images, kind, measurement)
    image = retired(images, kind, measurement, datetime.now(UTC))
    if before is not None and before.state is ImageState.RETIRED:
        return before
    store.put_image(image, event=_event(actor_uid, "image_retired", image))
    return image


def _image(kind: DomainKind, measurement: str, label: str, engine_version: int) -> LaunchImage:
    return LaunchImage(kind.value, measurement, label, engine_version, ImageState.ALLOWED, datetime.now(UTC))


def _key(image: LaunchImage) -> _Key:
    return image.kind, image.measurement


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _event(actor_uid: int | None, kind: str, image: LaunchImage) -> Event:
    shown = asdict(image)
    detail = {name: str(shown[name]) for name in ("kind", "measurement", "label", "engine_version")}
    return Event(datetime.now(UTC), actor_uid, kind, detail=json.dumps(detail))
