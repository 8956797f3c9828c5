"""What the manager may ask of the launcher, and what the launcher tells, as data. For launcher, manager and tests.

Descriptors travel beside: `start` and `attach` give one, the manager's end of the instance's manager link; so does the
event `replaced`. Who an instance is follows from that descriptor alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from vtpm.tpm.types import InstanceId, TpmVersion, VtpmId
from vtpm.wire.service import Interface, MaxLength, Operation

LAUNCHER_SOCKET = "launcher.sock"
"""Name of the launcher's socket in the run directory."""
GUESTS_DIR = "guests"
"""Folder in the run directory that holds the vTPMs' sockets."""
MAX_INSTANCES = 1500
"""Their ids fit one packet."""

Text = Annotated[str, MaxLength(512)]


@dataclass(frozen=True)
class NoArgs:
    """An operation without arguments, or without a result."""


@dataclass(frozen=True)
class StartArgs:
    """What to start.

    Args:
        name: the vTPM's; also names its sockets.
        domain: kind of domain.
        owner_uid, owner_gid: who may connect to the guest link, besides root.
        measurement: of what is to run; nothing else is started, also when an instance has to be replaced.
    """

    vtpm_id: VtpmId
    name: Annotated[str, MaxLength(63)]
    tpm_version: TpmVersion
    domain: Annotated[str, MaxLength(16)]
    owner_uid: int
    owner_gid: int
    measurement: Annotated[str, MaxLength(64)]


@dataclass(frozen=True)
class KindArgs:
    """Which kind of domain is meant."""

    kind: Annotated[str, MaxLength(16)]


@dataclass(frozen=True)
class Measured:
    """What a domain of some kind would run if it were started now.

    Args:
        measurement: SHA-256, in hex, over all of it.
        engine_version: of the engine in it, MAJOR<<16 | MINOR<<8 | MICRO; 0: not known.
        label: what it is, in a few words.
    """

    measurement: Annotated[str, MaxLength(64)]
    engine_version: int
    label: Annotated[str, MaxLength(64)]


@dataclass(frozen=True)
class VtpmArgs:
    """Which vTPM's instance is meant."""

    vtpm_id: VtpmId


@dataclass(frozen=True)
class ProtectionLine:
    """One step of confinement: how far it holds (in_force, weaker, absent) and why."""

    step: Text
    status: Annotated[str, MaxLength(16)]
    why: Text


@dataclass(frozen=True)
class InstanceInfo:
    """One instance, as the launcher knows it.

    Args:
        pid: of the vtpmd, or of its virtual machine.
        measurement: that of its StartArgs: SHA-256, in hex, over all that its domain runs.
        ready_within_s: how long it may take from its start until it answers the manager.
        control_socket, data_socket: paths of the guest link.
    """

    vtpm_id: VtpmId
    instance_id: InstanceId
    name: Annotated[str, MaxLength(63)]
    pid: int
    measurement: Annotated[str, MaxLength(64)]
    ready_within_s: int
    control_socket: Text
    data_socket: Text
    protections: tuple[ProtectionLine, ...]


@dataclass(frozen=True)
class Instances:
    """Ids of all vTPMs that have an instance."""

    vtpm_ids: Annotated[tuple[VtpmId, ...], MaxLength(MAX_INSTANCES)]


@dataclass(frozen=True)
class LauncherStatus:
    """What `vtpm status` says of the launcher.

    Args:
        boot_id: of the host's kernel; instances of another boot are gone.
        privileged: whether it can give each instance a user id of its own.
        domains: kinds of domain that it starts.
    """

    pid: int
    boot_id: Text
    privileged: bool
    domains: Annotated[tuple[Annotated[str, MaxLength(16)], ...], MaxLength(8)]


@dataclass(frozen=True)
class Replaced:
    """An instance died and another has taken over its guest (event, with a descriptor)."""

    dead_instance_id: InstanceId
    how: Text
    instance: InstanceInfo


@dataclass(frozen=True)
class Ended:
    """An instance ended and no other takes its place (event)."""

    vtpm_id: VtpmId
    instance_id: InstanceId
    how: Text


OPERATIONS: Mapping[str, Operation] = {
    "status": Operation(args=NoArgs, result=LauncherStatus),
    "measure": Operation(args=KindArgs, result=Measured),
    "start": Operation(args=StartArgs, result=InstanceInfo),
    "attach": Operation(args=VtpmArgs, result=InstanceInfo),
    "list": Operation(args=NoArgs, result=Instances),
    "stop": Operation(args=VtpmArgs, result=NoArgs),
    "end": Operation(args=NoArgs, result=NoArgs),
}
EVENTS: Mapping[str, type] = {"replaced": Replaced, "ended": Ended}
LAUNCHER = Interface("vtpm-launcher", OPERATIONS, EVENTS)
