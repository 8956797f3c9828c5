"""Whether a guest can be moved with its vTPM from one QEMU to another: asked before anything is changed.

For live_migration alone.
"""

from __future__ import annotations

from uuid import UUID

from vtpm.client.qemu_monitor import Monitor
from vtpm.errors import ConflictError

COMPLETED = "completed"
AT_REST = frozenset({"none", "failed", "cancelled"})
"""States of a migration in which nothing is under way, and nothing has left."""
ENDS = AT_REST | {COMPLETED}


async def check_fit(source: Monitor, destination: Monitor, vm_uuid: UUID | None) -> None:
    """Return if the guest of one QEMU can be moved, with its vTPM, to the other.

    Args:
        vm_uuid: None, or what the guest's uuid has to be.
    Raises:
        ConflictError: it cannot, and why. MonitorLost: one does not answer.
    """
    await _check_source(source)
    await _check_destination(destination)
    await _check_pair(source, destination, vm_uuid)


async def _check_source(source: Monitor) -> None:
    state, migration = await source.run_state(), await source.migration()
    # Also where somebody let it go on after that, as QEMU does not prevent. The QEMU of a guest that came by migration
    # says completed too, and has no figures.
    if migration.status == COMPLETED and migration.total_bytes:
        raise ConflictError(
            f"{source.who} has given its guest away already: its migration has completed",
            next_step="It must not run any more; migrate the guest from where it is now",
        )
    if migration.status not in ENDS:
        raise ConflictError(
            f"{source.who} is migrating already: {migration.status}",
            next_step="Wait for its end, or end it with migrate_cancel",
        )
    if state.status != "running":
        raise ConflictError(
            f"the guest of {source.who} does not run: it is {state.status}",
            next_step="A guest that does not run is moved switched off, its vTPM stopped",
        )
    if migration.blocked:
        raise ConflictError(f"{source.who} cannot be migrated: {migration.blocked}")


async def _check_destination(destination: Monitor) -> None:
    state = await destination.run_state()
    migration = await destination.migration()
    if state.status != "inmigrate" or migration.status != "none":
        raise ConflictError(
            f"{destination.who} does not wait for a guest: it is {state.status}, migration {migration.status}",
            next_step="Start it anew, with -incoming defer",
        )


async def _check_pair(source: Monitor, destination: Monitor, vm_uuid: UUID | None) -> None:
    models = []
    for monitor in (source, destination):
        tpms = await monitor.emulated_tpms()
        if len(tpms) != 1:
            raise ConflictError(
                f"{monitor.who} has {len(tpms)} TPMs of an emulator, and not one: a guest moves with its vTPM",
                next_step="See its options -tpmdev emulator and -device",
            )
        models += tpms
    if models[0] != models[1]:
        raise ConflictError(
            f"{source.who} has a {models[0]}, {destination.who} a {models[1]}",
            next_step="Start the destination's with the source's -device",
        )
    here, there = await source.machine_uuid(), await destination.machine_uuid()
    if here != there:
        raise ConflictError(
            f"{source.who} has the machine {here}, {destination.who} the machine {there}",
            next_step="Start the destination's with the source's -uuid",
        )
    if vm_uuid not in (None, here):
        raise ConflictError(
            f"{source.who} has the machine {here}; the vTPM belongs to {vm_uuid}",
            next_step="Give the monitor of that machine's QEMU",
        )
