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
