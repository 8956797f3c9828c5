"""What an instance is started with: its descriptors by number, and what it is told about itself.

The contract between the launcher's domains and vtpmd, which never import one another. Pure.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vtpm.errors import ProtocolError
from vtpm.tpm.types import TpmVersion

JOURNAL_BYTES = 4096 + 8192
"""Size of a link journal, which the launcher makes and the instance lays out (vtpm.guest_link.journal)."""


class InstanceFd(enum.IntEnum):
    """Descriptors of a vtpmd in a process domain. The last two are there for a successor that takes a guest over."""

    HOLD = 3
    MANAGER_LINK = 4
    DATA_LISTENER = 5
    CONTROL_LISTENER = 6
    CONTROL_JOURNAL = 7
    DATA_JOURNAL = 8
    CONTROL = 9
    DATA = 10


class RelayFd(enum.IntEnum):
    """Descriptors of the relay in front of a virtual machine: those of a vtpmd, but for the link that they share.

    The manager link goes to the virtual machine itself.
    """

    HOLD = InstanceFd.HOLD
    GUEST_PORT = InstanceFd.MANAGER_LINK
    """Stream socket; its other end is the character device behind the port `guest_port.GUEST_PORT`."""
    DATA_LISTENER = InstanceFd.DATA_LISTENER
    CONTROL_LISTENER = InstanceFd.CONTROL_LISTENER
    CONTROL_JOURNAL = InstanceFd.CONTROL_JOURNAL
    DATA_JOURNAL = InstanceFd.DATA_JOURNAL
    CONTROL = InstanceFd.CONTROL
    DATA = InstanceFd.DATA


class RelayExit(enum.IntEnum):
    """Exit statuses of a relay that its virtual machine did not tell it; any other is the vtpmd's."""

    LAUNCHER_GONE = 71
    VM_GONE = 73
    """The virtual machine ended, or broke its port, without having said so."""
    NOT_READY = 74
    """The vtpmd did not become ready in time."""
    BROKEN = 75
    """The virtual machine says what no vtpmd says."""


class Role(enum.StrEnum):
    """Whether an instance is a vTPM's first since it was started, or takes the place of one that died."""

    FIRST = "first"
    SUCCESSOR = "successor"


@dataclass(frozen=True)
class InstanceArgs:
    """What a vtpmd is told about itself.

    Args:
        tpm_version: fixed at creation of the vTPM.
        role: see Role.
    """

    tpm_version: TpmVersion
    role: Role

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, for ConfinementSpec.target_args."""
        return {"tpm_version": self.tpm_version.value, "role": self.role.value}

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> Self:
        """Read what to_json wrote.

        Raises:
            ProtocolError: anything else.
        """
        if set(members) != {"tpm_version", "role"}:
            raise ProtocolError("the arguments of an instance are not tpm_version and role")
        try:
            return cls(TpmVersion(members["tpm_version"]), Role(members["role"]))
        except ValueError as error:
            raise ProtocolError(f"the arguments of an instance are not valid: {error}") from None
