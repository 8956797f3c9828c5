"""One running vTPM as the launcher holds it: its instance, its links' descriptors, and what its successor needs.

Decision record 1 says why. Everything here is descriptors; no byte of a guest is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import uuid4

from vtpm.confine.report import Report
from vtpm.domains.base import Domain, DomainPlan, RunningDomain
from vtpm.errors import DomainError, ProtocolError
from vtpm.launcher.guest_sockets import GuestSockets
from vtpm.launcher.instance_log import InstanceLog, log_lines
from vtpm.tpm.types import InstanceId
from vtpm.wire.hold import HoldType, ParkedKind, decode_hold
from vtpm.wire.instance_spec import JOURNAL_BYTES, InstanceArgs, InstanceFd, Role
from vtpm.wire.launcher import InstanceInfo, ProtectionLine, StartArgs
from vtpm.wire.packet_stream import receive_packet
from vtpm.wire.unix_socket import enter_socket_pair

_PARKED_AS = {ParkedKind.CONTROL: InstanceFd.CONTROL, ParkedKind.DATA: InstanceFd.DATA}


@dataclass
class Instance:
    """One started domain and the launcher's ends of its links."""

    instance_id: InstanceId
    domain: RunningDomain
    hold: socket.socket
    manager_end: socket.socket
    log: InstanceLog
    report: Report = ()

    def close(self) -> None:
        """Close the launcher's ends; the domain has been reaped."""
        self.log.close()
        self.hold.close()
        self.manager_end.close()


class Slot:
    """See the module.

    Args:
        args: what was asked to be started.
        domain: kind of domain.
        uid: user id of its instances.
        sockets: the guest link's; the slot's from now on.
    Raises:
        DomainError: memory or descriptors are lacking; the sockets are still the caller's.
    """

    def __init__(self, args: StartArgs, domain: Domain, uid: int, sockets: GuestSockets) -> None:
        self.args = args
        self.uid = uid
        self.deaths: list[float] = []
        """Monotonic times of recent deaths."""
        self.stopping = False
        self.confined = asyncio.Event()
        """Set while there is an instance that is confined; in the end too, for those who wait."""
        self.ended = asyncio.Event()
        """Set when no instance is left and none will follow."""
        self.instance: Instance | None = None
        self._log_lines = log_lines()
        self.domain = domain
        self._sockets = sockets
        self._journals: dict[InstanceFd, int] = {}
        try:
            for kind in (InstanceFd.CONTROL_JOURNAL, InstanceFd.DATA_JOURNAL):
                self._journals[kind] = create_journal()
        except OSError as error:
            _close_all(list(self._journals.values()))
            raise _no_resources(args, error) from error
        self._parked: dict[ParkedKind, int] = {}

    def start_instance(self, role: Role) -> Instance:
        """Start an instance, with all that is parked. Raises VtpmError: it could not be, and nothing is left of it."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                hold, their_hold = enter_socket_pair(ours, theirs, socket.SOCK_SEQPACKET)
                manager_end, their_link = enter_socket_pair(ours, theirs, socket.SOCK_STREAM)
                log_read, log_write = os.pipe()
                ours.callback(os.close, log_read)
                theirs.callback(os.close, log_write)
                fds: dict[InstanceFd, int] = {
                    InstanceFd.HOLD: their_hold.fileno(),
                    InstanceFd.MANAGER_LINK: their_link.fileno(),
                    InstanceFd.DATA_LISTENER: self._sockets.data.fileno(),
                    InstanceFd.CONTROL_LISTENER: self._sockets.control.fileno(),
                    **self._journals,
                    **{_PARKED_AS[kind]: fd for kind, fd in self._parked.items()},
                }
                running = self.domain.start(
                    DomainPlan(self.args.name, self.uid, InstanceArgs(self.args.tpm_version, role), fds, log_write)
                )
            except OSError as error:
                raise _no_resources(self.args, error) from error
            ours.pop_all()
        hold.setblocking(False)
        log = InstanceLog(self.args.name, log_read, self._log_lines)
        self.instance = Instance(InstanceId(uuid4()), running, hold, manager_end, log)
        return self.instance

    def take_hold_message(self, instance: Instance) -> bool:
        """Take one message of the hold; False when the hold has ended.

        Raises:
            ProtocolError: what came is not a message; its sender is not to be trusted any more.
        """
        try:
            packet, received = receive_packet(instance.hold)
        except BlockingIOError:
            return True
        except OSError:
            return False
        fds = list(received)
        try:
            if not packet and not fds:
                return False
            message = decode_hold(packet, len(fds))
        except ProtocolError:
            _close_all(fds)
            raise
        self._drop(message.kind)
        if message.type is HoldType.PARK:
            self._parked[message.kind] = fds[0]
        return True

    def info(self) -> InstanceInfo:
        """Describe the instance for the manager."""
        instance = self.instance
        assert instance is not None
        return InstanceInfo(
            vtpm_id=self.args.vtpm_id,
            instance_id=instance.instance_id,
            name=self.args.name,
            pid=instance.domain.pid,
            measurement=self.args.measurement,
            ready_within_s=self.domain.ready_within_s,
            control_socket=str(self._sockets.control_path),
            data_socket=str(self._sockets.data_path),
            protections=tuple(ProtectionLine(p.step[:512], p.status.value, p.why[:512]) for p in instance.report),
        )

    def close(self) -> None:
        """Close and remove everything; no instance is left."""
        for kind in list(self._parked):
            self._drop(kind)
        _close_all(list(self._journals.values()))
        self._sockets.close()

    def _drop(self, kind: ParkedKind) -> None:
        fd = self._parked.pop(kind, None)
        if fd is not None:
            _close_all([fd])


def create_journal() -> int:
    """Make an empty link journal and return its descriptor."""
    fd = os.memfd_create("vtpm-link-journal", os.MFD_CLOEXEC)
    os.ftruncate(fd, JOURNAL_BYTES)
    return fd


def _no_resources(args: StartArgs, error: OSError) -> DomainError:
    return DomainError(f"the instance of {args.name} cannot be started: {error.strerror or error}")


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def uid_for(taken: Mapping[int, object] | set[int], base: int, most: int) -> int | None:
    """Return the lowest user id from base on that is not taken, or None."""
    return next((uid for uid in range(base, base + most) if uid not in taken), None)
