"""Where a TPM's state comes from and goes to, as the TPM thread sees it. Implemented by the manager link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from vtpm.errors import ConflictError
from vtpm.tpm.types import StateKind


class MoveRefusedError(ConflictError):
    """The manager refuses a step of a move, for good."""

    code = "migration"


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

    def depart(self, volatile: bytes) -> bytes:
        """Return all state, sealed for the host that the vTPM goes to, of 1 to MAX_SEALED_BYTES bytes.

        Raises:
            UnavailableError: no answer; nobody knows whether the vTPM is on its way.
            MoveRefusedError: it is refused, and the vTPM has not left.
        """
        ...

    def take_back(self, timeout_s: float) -> None:
        """Return once the departure is taken back.

        Raises:
            UnavailableError: no answer in this time, or not yet.
            MoveRefusedError: it cannot be: the vTPM has moved.
        """
        ...

    def arrive(self, sealed: bytes, begun: Callable[[int], None]) -> Mapping[StateKind, bytes]:
        """Return the state that was sealed for this host.

        Args:
            begun: called before anything is asked, with the number by which the vTPM is activated.
        Raises:
            UnavailableError: no answer.
            MoveRefusedError: it is refused.
        """
        ...
