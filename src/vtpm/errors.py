"""One root exception with a stable code and exit status for everything that vtpm raises on purpose.

Every module may import this one; it imports nothing of vtpm. A message names the object, the cause and, where there is
one, the next step. Codes and exit statuses are stable: scripts rely on them.
"""

from __future__ import annotations

from typing import ClassVar


class VtpmError(Exception):
    """Root of all errors that vtpm raises on purpose.

    Args:
        message: what failed and why, naming the object.
        next_step: what the reader can do about it, or empty.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}. {self.next_step}" if self.next_step else self.message


class UsageError(VtpmError):
    """A name, option or setting is not of the form it must have. Nothing was done."""

    code = "usage"
    exit_status = 2


class NotFoundError(VtpmError):
    """The named vTPM does not exist, or is not the caller's to see."""

    code = "not_found"
    exit_status = 3


class ConflictError(VtpmError):
    """The object is in a state in which this cannot be done (exists already, is running, is in use)."""

    code = "conflict"
    exit_status = 4


class AccessDeniedError(VtpmError):
    """The caller's uid or gid may not do this."""

    code = "access_denied"
    exit_status = 5


class UnavailableError(VtpmError):
    """A service or device that is needed does not answer; the same call may go through later."""

    code = "unavailable"
    exit_status = 6


class PlatformTpmError(VtpmError):
    """The platform TPM refuses or cannot be reached: wrong PCRs, another TPM, no device."""

    code = "platform_tpm"
    exit_status = 7


class StateError(VtpmError):
    """Saved state is missing, damaged, foreign or of a version that cannot be read. It is kept as evidence."""

    code = "state"
    exit_status = 8


class StoreError(VtpmError):
    """The store could not make something durable (full disk, I/O error). Nothing was acknowledged."""

    code = "store"
    exit_status = 9


class ProtocolError(VtpmError):
    """A peer sent something that is malformed, too large or out of order. It is refused, never followed."""

    code = "protocol"
    exit_status = 10


class EngineError(VtpmError):
    """libtpms is absent or failed as a library; the engine cannot be used again."""

    code = "engine"
    exit_status = 11


class ConfinementError(VtpmError):
    """A confinement step failed; the process must not go on."""

    code = "confinement"
    exit_status = 12


class DomainError(VtpmError):
    """A domain could not be started, or ended when it should not have."""

    code = "domain"
    exit_status = 13


class ImageError(VtpmError):
    """The image of a vTPM's virtual machine is not what it must be, or cannot be built."""

    code = "image"
    exit_status = 14


class AttestationError(VtpmError):
    """Another platform has not proven what it must: its evidence is false, foreign, stale or against policy."""

    code = "attestation"
    exit_status = 15
