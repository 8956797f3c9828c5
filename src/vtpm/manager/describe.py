"""Turns what the manager knows into what the API shows. Pure."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vtpm.errors import VtpmError
from vtpm.vault.anchor import AnchorMode, AnchorStats
from vtpm.vault.records import Event, VtpmRecord
from vtpm.wire.api import (
    API_VERSION,
    AnchorStatus,
    AuditEvent,
    Client,
    DomainName,
    LifeState,
    Lockout,
    MeasuredServices,
    Owner,
    PlatformStatus,
    ProtectionStatus,
    ServiceStatus,
    Status,
    Vtpm,
)
from vtpm.wire.keeper import KeeperStatus
from vtpm.wire.launcher import LauncherStatus, ProtectionLine
from vtpm.wire.manager_link import ClientKind, LockoutChanged

if TYPE_CHECKING:
    from vtpm.manager.running import Running


def vtpm(record: VtpmRecord, state: LifeState, running: Running | None) -> Vtpm:
    """Describe one vTPM; `running` is None when it has no instance."""
    info = running.info if running else None
    told = running.link.facts.client if running else None
    client = None
    if told is not None and told.client is not ClientKind.NONE:
        client = Client(told.client.name.lower(), told.pid, told.uid)
    return Vtpm(
        name=record.name,
        uuid=record.id,
        owner=Owner(record.owner_uid, record.owner_gid),
        vm_uuid=record.vm_uuid,
        tpm_version=record.tpm_version,
        domain=DomainName(record.domain.place),
        make=record.domain.make,
        state=state,
        epoch=record.epoch,
        version=record.state_version,
        measurement=info.measurement if info else "",
        control_socket=info.control_socket if info else "",
        tcti=f"swtpm:path={info.data_socket}" if info else "",
        pid=info.pid if info else None,
        client=client,
        reason=running.reason if running and state is LifeState.FAILED else "",
        created_at=record.created_at.isoformat(),
        lockout=lockout(running.link.facts.lockout) if running and running.link.facts.lockout else None,
    )


def lockout(told: LockoutChanged) -> Lockout:
    """Describe the lockout of a TPM that is locked."""
    since = datetime.fromtimestamp(told.since, UTC).isoformat()
    return Lockout(since, told.failed_tries, told.max_tries, told.interval_s)


def audit_event(event: Event) -> AuditEvent:
    """Describe one line of the audit log."""
    return AuditEvent(
        event.event_id, event.time.isoformat(), event.actor_uid, event.kind, event.vtpm_name, json.loads(event.detail)
    )


def status(
    run_dir: Path,
    state_dir: Path,
    vtpms: int,
    running: int,
    keeper: KeeperStatus | VtpmError,
    launcher: LauncherStatus | VtpmError,
    protections: Sequence[ProtectionLine],
    stats: AnchorStats | None,
    trouble: VtpmError | None,
    measured: MeasuredServices,
) -> Status:
    """Describe the host; a service that does not answer, and a vault that is not open, are given as their errors."""
    warnings = [f"The vault is not open: {trouble}"] if trouble else []
    platform = None
    services = []
    if isinstance(keeper, VtpmError):
        services.append(ServiceStatus("vtpm-keeper", False, None, str(keeper)))
        warnings.append("The keeper does not answer: running vTPMs go on, none can be started")
    else:
        services.append(ServiceStatus("vtpm-keeper", True, None, ""))
        platform = PlatformStatus(
            keeper.kind,
            keeper.tcti,
            keeper.manufacturer,
            keeper.pcr_selection,
            keeper.protection,
            keeper.reachable,
            keeper.locked,
            keeper.recovery,
            keeper.resets,
        )
        if not keeper.locked and not keeper.recovery:
            warnings.append(
                "There is no recovery key: with this platform TPM every vTPM would be lost. Make one: vtpm recovery-key"
            )
        if not keeper.reachable:
            warnings.append("The platform TPM does not answer: the keeper could not start again now")
        warnings.extend(keeper.warnings)
    if isinstance(launcher, VtpmError):
        services.append(ServiceStatus("vtpm-launcher", False, None, str(launcher)))
        warnings.append("The launcher does not answer: no vTPM can run")
    else:
        services.append(ServiceStatus("vtpm-launcher", True, launcher.pid, ""))
        if not launcher.privileged:
            warnings.append("The launcher is not root: all vTPMs run under one user id, in namespaces of their own")
    if stats is not None and stats.failure:
        warnings.append(f"The anchor could not be moved: {stats.failure}")
    if measured.note.startswith("NOT MEASURED") or (measured.pcr and measured.note):
        warnings.append(f"The services are not vouched for: {measured.note}")
    elif measured.count > 1:
        warnings.append(
            "The services were upgraded in this boot: once the keeper ends, the root key opens only if that is "
            "allowed. Before a reboot: vtpm policy allow LABEL --services"
        )
    return Status(
        version=importlib.metadata.version("vtpm"),
        api_version=API_VERSION,
        state_dir=str(state_dir),
        run_dir=str(run_dir),
        vtpms=vtpms,
        running=running,
        platform=platform,
        anchor=_anchor(stats) if stats is not None else None,
        services=services,
        confinement=[ProtectionStatus(line.step, line.status, line.why) for line in protections],
        warnings=list(dict.fromkeys(warnings)),
        measured=measured,
    )


def _anchor(stats: AnchorStats) -> AnchorStatus:
    if stats.mode is AnchorMode.EACH_COMMIT:
        window = "none: whatever was answered is anchored"
    else:
        window = f"what was answered in the last {stats.window_s:g} s before the host lost its power"
    return AnchorStatus(
        mode=stats.mode.value,
        interval_s=int(stats.window_s),
        commits=stats.transactions,
        writes=stats.anchor_writes,
        unanchored_s=int(stats.oldest_unanchored_s or 0),
        window=window,
    )
