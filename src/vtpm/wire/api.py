"""The manager's HTTP API as data: what requests carry and replies hold. For manager and client.

HTTP/1.1 with JSON on the unix socket RUN_DIR/manager.sock; the OpenAPI document is at /openapi.json. Who asks is what
the kernel says of the connection (SO_PEERCRED). Errors are an ApiError with the status of HTTP_STATUS.

    GET    /v1/status                    Status
    GET    /v1/vtpms?after=NAME&limit=N  list of Vtpm (those that the caller may see), by name, MAX_VTPMS at most
    POST   /v1/vtpms                     CreateVtpm -> Vtpm (201)
    GET    /v1/vtpms/{name}              Vtpm
    DELETE /v1/vtpms/{name}              (204)
    POST   /v1/vtpms/{name}/start        StartVtpm -> Vtpm
    POST   /v1/vtpms/{name}/stop         StopVtpm -> Vtpm
    POST   /v1/vtpms/{name}/export       ExportVtpm -> ExportedVtpm
    POST   /v1/vtpms/{name}/migrate      MigrateVtpm -> Migration; returns once it is there, or is not to be
    POST   /v1/vtpms/{name}/migrate/abort  Migration
    POST   /v1/vtpms/{name}/migrate/discard  Migration
    POST   /v1/vtpms/{name}/adopt        AdoptVtpm -> Migration
    GET    /v1/migrations                list of Migration: what has moved, or is moving
    GET    /v1/certificate               HostCertificate
    GET    /v1/peers                     list of PeerInfo
    POST   /v1/peers                     AddPeer -> PeerInfo (201)
    DELETE /v1/peers/{name}              (204)
    GET    /v1/platform                  EnrolledPlatform: as what the platform is enrolled
    POST   /v1/platform/enrolment        NewEnrolment -> Enrolment
    POST   /v1/platform/evidence         PlatformFile: this platform's evidence, fresh
    GET    /v1/platform/policy           PlatformFile: a policy that it passes now
    POST   /v1/platform/certificate      KeepCertificate -> EnrolledPlatform (201)
    POST   /v1/import                    ImportBackup -> Vtpm (201); bodies up to 10 MiB, as the next
    POST   /v1/import/swtpm              ImportSwtpm -> Vtpm (201)
    GET    /v1/events?after=N&limit=N&wait_s=N   list of AuditEvent; waits up to wait_s (30 at most) for the first one
    GET    /v1/policy                    Policy: the PCR values that the root key opens under
    POST   /v1/policy                    AllowPcrs -> Policy (201)
    DELETE /v1/policy/{label}            Policy
    GET    /v1/images                    list of Image: software that may run vTPMs, or may no more
    POST   /v1/images                    AllowImage -> AllowedImage (201)
    POST   /v1/images/retire             RetireImage -> Image
    GET    /v1/launches                  Launches: what was launched in this boot
    POST   /v1/recovery-key              NewRecoveryKey (201); an earlier recovery key counts until this is confirmed
    POST   /v1/recovery-key/confirm      ConfirmRecoveryKey (204)
    POST   /v1/recover                   RecoveryKeyText -> Status
    POST   /v1/shutdown                  ShutDown (services end after the reply)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from vtpm.tpm.types import Make, Startup, TpmVersion

MANAGER_SOCKET = "manager.sock"
API_VERSION = 1
MAX_VTPMS = 100
"""In one answer; the rest is asked for by the last name."""

HTTP_STATUS: Mapping[str, int] = {
    "usage": 400,
    "access_denied": 403,
    "not_found": 404,
    "conflict": 409,
    "unavailable": 503,
    "platform_tpm": 503,
    "store": 507,
}
"""Status by error code; 500 for all others."""


class DomainName(enum.StrEnum):
    """Kinds of domain that can be asked for."""

    PROCESS = "process"
    QEMU = "qemu"
    XEN = "xen"


class LifeState(enum.StrEnum):
    """State of a vTPM, as `vtpm show` prints it."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    FROZEN = "frozen"
    INERT = "inert"
    FAILED = "failed"


@dataclass(frozen=True)
class CreateVtpm:
    """What a new vTPM is to be."""

    name: str
    tpm_version: TpmVersion = TpmVersion.V2_0
    domain: DomainName = DomainName.PROCESS
    vm_uuid: UUID | None = None
    make: Make = Make.LIBTPMS


@dataclass(frozen=True)
class StartVtpm:
    """How to start a vTPM; `startup` is what TPM2_Startup it is given, none as hardware leaves it to firmware."""

    startup: Startup = Startup.NONE


@dataclass(frozen=True)
class StopVtpm:
    """How to stop a vTPM; one that a virtual machine uses is stopped only with `force`."""

    force: bool = False


@dataclass(frozen=True)
class Owner:
    """Who a vTPM belongs to."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Client:
    """Who uses the guest link now: kind is "emulator" or "data"; pid and uid are 0 where the kernel does not say."""

    kind: str
    pid: int
    uid: int


@dataclass(frozen=True)
class Lockout:
    """Dictionary-attack lockout of a TPM 2.0; docs/lockout.md.

    Args:
        since: when it was first seen, ISO 8601 in UTC.
        failed_tries, max_tries: how many failures count now, and at how many it locks.
        interval_s: seconds of power after which one of them is forgiven.
    """

    since: str
    failed_tries: int
    max_tries: int
    interval_s: int


@dataclass(frozen=True)
class Vtpm:
    """One vTPM.

    Args:
        version: counts up with each committed change of state.
        measurement: of the running instance's domain, SHA-256 in hex; empty when stopped.
        control_socket: what QEMU's -chardev socket,path= takes; empty when stopped.
        tcti: what tpm2-tools take with -T; empty when stopped.
        reason: why it is failed, if it is.
        lockout: of the running instance's TPM, while it is locked.
        make: whose program it runs.
    """

    name: str
    uuid: UUID
    owner: Owner
    vm_uuid: UUID | None
    tpm_version: TpmVersion
    domain: DomainName
    state: LifeState
    epoch: int
    version: int
    measurement: str
    control_socket: str
    tcti: str
    pid: int | None = None
    client: Client | None = None
    reason: str = ""
    created_at: str = ""
    lockout: Lockout | None = None
    make: Make = Make.LIBTPMS


@dataclass(frozen=True)
class ServiceStatus:
    """One host service: whether it answers, and what is to be said of it."""

    name: str
    reachable: bool
    pid: int | None
    detail: str


@dataclass(frozen=True)
class PlatformStatus:
    """The platform TPM and what protects the root key.

    Args:
        kind: embedded or hardware.
        protection: unprotected or sealed.
        locked: why the root key is not open; empty when it is.
        recovery: fingerprint of the recovery key, empty when none was made.
        resets: how often the TPM was reset or started again under the keeper.
    """

    kind: str
    tcti: str
    manufacturer: str
    pcrs: str
    protection: str
    reachable: bool
    locked: str = ""
    recovery: str = ""
    resets: int = 0


@dataclass(frozen=True)
class AnchorStatus:
    """What keeps an older store from being put back.

    Args:
        mode: "each-commit" or "interval".
        interval_s: of interval mode, seconds; 0 otherwise.
        commits: transactions since the manager started.
        writes: anchor writes to the platform TPM since the manager started.
        unanchored_s: age of the oldest commit that is not anchored yet, seconds; 0 when all are.
        window: which older store would be accepted, in words.
    """

    mode: str
    interval_s: int
    commits: int
    writes: int
    unanchored_s: int
    window: str


@dataclass(frozen=True)
class PcrSet:
    """PCR values (hex, in the selection's order) under which the root key opens, and whether they are those of now."""

    label: str
    values: list[str]
    matches: bool


@dataclass(frozen=True)
class Policy:
    """What the root key opens under: at least one of `sets`. `current` is what the PCRs hold now."""

    selection: str
    sets: list[PcrSet]
    current: list[str]


@dataclass(frozen=True)
class AllowPcrs:
    """PCR values to allow, under a label of their own."""

    label: str
    values: list[str]


@dataclass(frozen=True)
class RecoveryKeyText:
    """A recovery key as it is written down."""

    recovery_key: str = field(repr=False)


@dataclass(frozen=True)
class NewRecoveryKey:
    """A recovery key as it is written down, the text of its public half, and the fingerprint of both."""

    recovery_key: str = field(repr=False)
    public_key: str
    fingerprint: str


@dataclass(frozen=True)
class ConfirmRecoveryKey:
    """The text of the public half of a recovery key whose private half somebody has."""

    public_key: str


@dataclass(frozen=True)
class ExportVtpm:
    """Whom a backup is sealed to; to this host's recovery key when nothing is given.

    Args:
        recovery_key: text of a public recovery key.
        passphrase: 12 to 1024 characters.
    """

    recovery_key: str | None = None
    passphrase: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ExportedVtpm:
    """A backup.

    Args:
        exported_at: ISO 8601 in UTC.
        sealed_to: fingerprint of the recovery key that opens it; empty: a passphrase does.
        backup: the file's content in base64.
    """

    name: str
    uuid: UUID
    epoch: int
    exported_at: str
    sealed_to: str
    backup: str = field(repr=False)


@dataclass(frozen=True)
class ImportBackup:
    """A backup, and the one thing that opens it.

    Args:
        backup: the file's content in base64.
        original_is_dead: the operator's word that what was backed up runs nowhere, and never will again.
        name: in place of that in the backup.
        recovery_key: its text, the private one.
    """

    backup: str = field(repr=False)
    original_is_dead: bool
    name: str | None = None
    recovery_key: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ImportSwtpm:
    """State of an swtpm, in the clear, for a new vTPM.

    Args:
        permanent, savestate: as libtpms wrote it, in base64; the latter of a TPM 1.2, empty where there is none.
        source: where it was read, for the audit log.
    """

    name: str
    tpm_version: TpmVersion
    permanent: str = field(repr=False)
    savestate: str = field(default="", repr=False)
    vm_uuid: UUID | None = None
    source: str = ""


@dataclass(frozen=True)
class ProtectionStatus:
    """One step of the confinement that instances get on this host: in_force, weaker or absent, and why."""

    step: str
    status: str
    why: str


@dataclass(frozen=True)
class MeasuredServices:
    """What was measured of the services into the platform TPM, before they ran.

    Args:
        bank, pcr: where to; empty and 0 when they were not measured.
        measurement: SHA-256 in hex, over all that they execute; the manager that answers is part of it.
        start: what the PCR held before, in hex.
        count: how many kinds of services were measured in this boot: 2 after one upgrade.
        note: why they were not measured, or what is wrong.
    """

    bank: str = ""
    pcr: int = 0
    measurement: str = ""
    start: str = ""
    count: int = 0
    note: str = ""


@dataclass(frozen=True)
class Status:
    """What `vtpm status` shows. `platform` is None when the keeper does not answer, `anchor` when no store is open."""

    version: str
    api_version: int
    state_dir: str
    run_dir: str
    vtpms: int
    running: int
    platform: PlatformStatus | None
    anchor: AnchorStatus | None = None
    services: list[ServiceStatus] = field(default_factory=list)
    confinement: list[ProtectionStatus] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    measured: MeasuredServices | None = None


@dataclass(frozen=True)
class AuditEvent:
    """One line of the audit log; time is ISO 8601 in UTC."""

    id: int
    time: str
    actor_uid: int | None
    kind: str
    vtpm: str | None
    detail: dict[str, Any]


@dataclass(frozen=True)
class ShutDown:
    """What a shutdown stopped."""

    stopped: list[str]


@dataclass(frozen=True)
class ApiError:
    """An error as the API reports it; see vtpm.errors."""

    code: str
    message: str
    next_step: str
