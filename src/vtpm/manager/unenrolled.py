"""Stands for evidence on a host that is not enrolled: nothing leaves, and nothing is taken in. The manager's alone."""

from __future__ import annotations

from vtpm.errors import AttestationError

_WHY = "this host's platform is not enrolled: no vTPM leaves it, and it takes none in"


class Unenrolled:
    """See the module, and migration.guards.Attester."""

    def evidence(self, extra: bytes) -> bytes:
        """Raise AttestationError: there is none."""
        raise AttestationError(_WHY)

    def verify(self, evidence: bytes, extra: bytes) -> None:
        """Raise AttestationError: nobody is believed."""
        raise AttestationError(_WHY)
