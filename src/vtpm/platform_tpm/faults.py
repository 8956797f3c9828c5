"""What a TPM's or tss2's return code means for the operator. For platform_tpm alone.

Spec: TPM 2.0 Part 2 (revision 1.59), 6.6; TCG TSS 2.0 Overview, response codes by layer.
"""

from __future__ import annotations

from tpm2_pytss import TSS2_Exception

from vtpm.errors import PlatformTpmError

RC_INITIALIZE = 0x100
RC_FAILURE = 0x101
RC_REBOOT = 0x130
RC_PCR_CHANGED = 0x128
RC_AUTH_MISSING = 0x125
RC_AUTH_UNAVAILABLE = 0x12F
RC_OBJECT_MEMORY = 0x902
RC_SESSION_MEMORY = 0x903
RC_SESSION_HANDLES = 0x905
RC_OBJECT_HANDLES = 0x906
RC_LOCKOUT = 0x921
RC_VALUE = 0x084
RC_HANDLE = 0x08B
RC_AUTH_FAIL = 0x08E
RC_POLICY_FAIL = 0x09D
RC_INTEGRITY = 0x09F
RC_SIZE = 0x095
RC_INSUFFICIENT = 0x09A
RC_ECC_POINT = 0x0A7
RC_BAD_AUTH = 0x0A2
RC_COMMAND_CODE = 0x143
RC_NV_RANGE = 0x146
RC_NV_LOCKED = 0x148
RC_NV_AUTHORIZATION = 0x149
RC_NV_UNINITIALIZED = 0x14A

NO_ROOM = frozenset({RC_OBJECT_MEMORY, RC_SESSION_MEMORY, RC_SESSION_HANDLES, RC_OBJECT_HANDLES})

NOT_FOR_THIS = frozenset({RC_INTEGRITY, RC_VALUE, RC_SIZE, RC_INSUFFICIENT, RC_ECC_POINT})
"""A credential was made for other keys, or is none."""

NO_USE = frozenset({RC_FAILURE, RC_LOCKOUT, RC_REBOOT, RC_COMMAND_CODE})
"""Trying again does not help."""
NOT_OUR_INDEX = frozenset(
    {RC_AUTH_FAIL, RC_BAD_AUTH, RC_NV_RANGE, RC_NV_LOCKED, RC_NV_AUTHORIZATION, RC_NV_UNINITIALIZED}
)
"""What an NV index answers that has our Name and is not ours: an authValue, or never written."""

_LAYER_MASK = 0xFF0000
_TPM_LAYERS = (0x000000, 0x0B0000, 0x0C0000)
"""The TPM itself, and resource managers that answer in its place."""
_TCTI_LAYER = 0x0A0000
_TCTI_UNKNOWN = (0x000A0015, 0x000A0010)
"""Not supported and bad value: tctildr finds no such TCTI."""

_PASSWORD = (
    "its owner or endorsement hierarchy has a password",
    "Clear it: tpm2_changeauth -c owner -p OLD, tpm2_changeauth -c endorsement -p OLD",
)
_KNOWN = {
    RC_FAILURE: ("it is in failure mode", "Reboot the host; if that does not help, the TPM is broken"),
    RC_LOCKOUT: (
        "it is locked out after wrong passwords or hard power-offs",
        "Wait for its recovery time, or run tpm2_dictionarylockout --clear-lockout with the lockout password",
    ),
    RC_REBOOT: ("it wants a restart", "Reboot the host"),
    RC_BAD_AUTH: _PASSWORD,
    RC_AUTH_FAIL: _PASSWORD,
    RC_COMMAND_CODE: ("it lacks a command", "Update its firmware: TPM 2.0 revision 1.38 or later has what vtpm needs"),
    RC_INITIALIZE: ("it was not started by the firmware", "Enable the TPM in the firmware's settings"),
}


def tpm_code(error: TSS2_Exception) -> int | None:
    """Return the TPM's code without handle, parameter or session number; None when it is not the TPM's."""
    return int(error.error) & ~_LAYER_MASK if int(error.rc) & _LAYER_MASK in _TPM_LAYERS else None


def cannot_connect(tcti: str, error: TSS2_Exception) -> PlatformTpmError:
    """Return the error for a TCTI that does not open."""
    if int(error.rc) in _TCTI_UNKNOWN:
        return PlatformTpmError(
            f"the platform TPM {tcti!r} cannot be opened: tpm2-tss has no such TCTI",
            next_step="Name one, such as device:/dev/tpmrm0 or swtpm:path=SOCKET, or use embedded",
        )
    return PlatformTpmError(
        f"the platform TPM {tcti!r} cannot be reached: {error}",
        next_step="Check that it is there and that this user may open it, or use --platform-tpm embedded",
    )


def failed(tcti: str, doing: str, error: TSS2_Exception) -> PlatformTpmError:
    """Return the error for a command that failed.

    Args:
        doing: what was being done, such as "seal".
    """
    code = tpm_code(error)
    if code in _KNOWN:
        why, next_step = _KNOWN[code]
        return PlatformTpmError(f"the platform TPM {tcti!r} cannot {doing}: {why}", next_step=next_step)
    if int(error.rc) & _LAYER_MASK == _TCTI_LAYER:
        return PlatformTpmError(
            f"the platform TPM {tcti!r} went away while asked to {doing}: {error}", next_step="Start it again"
        )
    return PlatformTpmError(f"the platform TPM {tcti!r} cannot {doing}: {error} (0x{int(error.rc):x})")
