"""The fence: a PCR of the policy that is extended after opening, so that nothing opens again before a reset.

Pure. For platform_tpm alone.
"""

from __future__ import annotations

import hashlib

from vtpm.errors import UsageError
from vtpm.platform_tpm.pcrs import PcrBank, PcrValues, predict_pcr
from vtpm.platform_tpm.root_policy import PcrSet, PcrSets

FENCE_LABEL = b"vtpm: the root key was opened"
_NEVER_RESET = range(16)
"""PCRs that only a reset of the platform resets. 16 and 23 anybody resets, 17 to 22 a dynamic launch.
Spec: TCG PC Client Platform TPM Profile, PCR attributes."""


def fence_digest(bank: PcrBank) -> bytes:
    """Return what the fence extends into a PCR of this bank."""
    return hashlib.new(bank, FENCE_LABEL).digest()


def check_fence_pcr(index: int) -> int:
    """Return the PCR.

    Raises:
        UsageError: it can be reset without a reset of the platform.
    """
    if index not in _NEVER_RESET:
        raise UsageError(
            f"PCR {index} cannot be the fence: it can be reset while the platform runs",
            next_step="Choose one from 0 to 15 that nothing else extends, such as 14",
        )
    return index


def check_fence_covers(index: int, sets: PcrSets) -> None:
    """Check that the fence would close every way in.

    Raises:
        UsageError: one of the sets does not have the PCR.
    """
    for one in sets:
        if index not in one.selection.indexes:
            raise UsageError(
                f"PCR {index} cannot be the fence: the allowed set {one.label!r} does not have it",
                next_step=f"Set pcrs in the configuration so that PCR {index} is one of them; where there is a root key"
                " already, start the services anew and run `vtpm recover` with the recovery key",
            )


def is_fenced(one: PcrSet, now: PcrValues) -> bool:
    """Whether the one thing that keeps a set from opening is the fence."""
    changed = one.differing(now)
    if len(changed) != 1:
        return False
    bank = one.selection.bank
    return now[changed[0]] == predict_pcr(bank, one.by_index[changed[0]], [fence_digest(bank)])
