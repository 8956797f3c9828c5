"""What the installed libtpms lacks, as data: one line for each feature that some version does not have.

Pure. May be imported by `engine`, `instance` and whatever explains an instance to people.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Feature(enum.StrEnum):
    """What not every libtpms has."""

    TPM_1_2 = "tpm-1.2"
    TPM_2_0 = "tpm-2.0"
    CANCEL_1_2 = "cancel-1.2"
    SET_PROFILE = "set-profile"
    PROFILE_INFO = "profile-info"
    WAS_MANUFACTURED = "was-manufactured"


ABSENCE: dict[Feature, str] = {
    Feature.TPM_1_2: "built without TPM 1.2 (the default after 0.10): a vTPM of version 1.2 cannot run",
    Feature.TPM_2_0: "built without TPM 2.0: a vTPM of version 2.0 cannot run",
    Feature.CANCEL_1_2: "no version of libtpms cancels TPM 1.2 commands: they run to their end",
    Feature.SET_PROFILE: "before 0.10, no TPMLIB_SetProfile: a new TPM 2.0 always has every algorithm",
    Feature.PROFILE_INFO: "before 0.10, TPMLIB_GetInfo names no profile and no runtime algorithms",
    Feature.WAS_MANUFACTURED: "before 0.10, no TPMLIB_WasManufactured: libtpms does not say it began blank",
}
"""What it means that a feature is absent; one line each."""


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """What was seen of the loaded libtpms.

    Fields: version (major, minor, micro); whether it lets TPM 1.2 and TPM 2.0 be chosen; whether the optional
    symbols are there.
    """

    version: tuple[int, int, int]
    has_tpm_1_2: bool
    has_tpm_2_0: bool
    has_set_profile: bool
    has_was_manufactured: bool


def lacking(facts: LibraryFacts) -> dict[Feature, str]:
    """Return the features that are absent, each with the line that says what follows from it."""
    present = {
        Feature.TPM_1_2: facts.has_tpm_1_2,
        Feature.TPM_2_0: facts.has_tpm_2_0,
        Feature.CANCEL_1_2: False,
        Feature.SET_PROFILE: facts.has_set_profile,
        Feature.PROFILE_INFO: facts.version >= (0, 10, 0),
        Feature.WAS_MANUFACTURED: facts.has_was_manufactured,
    }
    return {feature: line for feature, line in ABSENCE.items() if not present[feature]}
