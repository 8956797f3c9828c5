"""The commands with which a host begins and ends a TPM's power cycle, whole. Pure; may be imported by everyone.

Source: TPM 2.0 Part 3 (revision 1.59), TPM2_Startup and TPM2_Shutdown; TPM Main Part 3 (1.2, revision 116),
TPM_Startup.
"""

from __future__ import annotations

from collections.abc import Mapping

from vtpm.tpm.types import Startup, TpmVersion

STARTUP: Mapping[tuple[TpmVersion, Startup], bytes] = {
    (TpmVersion.V2_0, Startup.CLEAR): bytes.fromhex("8001 0000000c 00000144 0000"),
    (TpmVersion.V2_0, Startup.STATE): bytes.fromhex("8001 0000000c 00000144 0001"),
    (TpmVersion.V1_2, Startup.CLEAR): bytes.fromhex("00c1 0000000c 00000099 0001"),
    (TpmVersion.V1_2, Startup.STATE): bytes.fromhex("00c1 0000000c 00000099 0002"),
}
SHUTDOWN_CLEAR = bytes.fromhex("8001 0000000c 00000145 0000")
"""TPM2_Shutdown(TPM_SU_CLEAR)."""
SHUTDOWN_CODE = bytes.fromhex("00000145")
