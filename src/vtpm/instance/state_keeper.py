"""Where a TPM's state comes from and goes to, as the TPM thread sees it. Implemented by the manager link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from vtpm.tpm.types import StateKind


@dataclass(frozen=True)
class Permit:
    """The manager's one-time permit to manufacture; answers a load when no state was ever saved."""

    permit_id: bytes


class StateKeeper(Protocol):
    """Where state comes from and goes to: the manager link. Both calls block, bounded, in the TPM thread."""

    def load(self) -> Mapping[StateKind, bytes] | Permit:
        """Return the vTPM's state, or a permit to manufacture. Raises VtpmError: neither is to be had."""
        ...

    def save(self, kind: StateKind, data: bytes, permit: Permit | None) -> None:
        """Return once the state is durable; empty data deletes this kind. Raises VtpmError: it is not durable."""
        ...
