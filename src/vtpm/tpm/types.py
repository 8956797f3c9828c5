"""Words that every part shares: TPM versions, kinds of state, localities, uuids of vTPMs.

Pure; may be imported by everyone.
"""

from __future__ import annotations

import enum
from typing import NewType
from uuid import UUID

VtpmId = NewType("VtpmId", UUID)
"""Identity of a vTPM for its whole life."""

InstanceId = NewType("InstanceId", UUID)
"""Identity of one started vtpmd; a replacement under the same guest is another instance."""

Locality = NewType("Locality", int)
"""0 to 4, as in TCG PC Client Platform TPM Profile, "Locality"."""

MAX_LOCALITY = 4

MAX_SEALED_BYTES = 1024 * 1024
"""Most of a state that is sealed for another host, and so of the blob that QEMU carries there."""
MAX_STATE_BYTES = 2 * 1024 * 1024
"""Bound on one state blob. libtpms 0.9's largest (TPM 2.0 permanent, NV full) is under 300 KiB."""


class TpmVersion(enum.StrEnum):
    """TPM library specification that a vTPM follows; fixed at creation."""

    V1_2 = "1.2"
    V2_0 = "2.0"


class Make(enum.StrEnum):
    """Whose program carries a vTPM's commands out; fixed at creation, for none reads another's state."""

    LIBTPMS = "libtpms"
    """The vtpmd, with libtpms inside."""
    SWTPM = "swtpm"


class StateKind(enum.IntEnum):
    """Kinds of TPM state, numbered as in QEMU's emulator protocol (PTM_BLOB_TYPE_*)."""

    PERMANENT = 1
    VOLATILE = 2
    SAVESTATE = 3


class Startup(enum.StrEnum):
    """What TPM2_Startup (TPM_Startup) a vTPM is to be given by its host when powered on."""

    NONE = "none"
    CLEAR = "clear"
    STATE = "state"
