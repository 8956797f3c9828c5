"""What a TPM that cannot answer for itself says: powered off, failed, busy with another client. Pure.

libtpms answers nothing before MainInit, yet QEMU probes the data channel before INIT and tells a 1.2 from a 2.0 by the
tag of the answer (QEMU 7.2, tpm_util_test_tpmdev); so these answers are made here. Imported by guest_link and instance.
"""

from __future__ import annotations

import enum

from vtpm.tpm.headers import failure_response
from vtpm.tpm.return_codes import Rc12, Rc20
from vtpm.tpm.types import TpmVersion


class Refusal(enum.Enum):
    """Why a command is not carried out; the values are the return codes of a 1.2 and a 2.0."""

    NOT_POWERED = (Rc12.TPM_INVALID_POSTINIT, Rc20.TPM_RC_INITIALIZE)
    """Powered off: wants TPM_Startup (TPM2_Startup) first, as a TPM does after power-on."""
    FAILED = (Rc12.TPM_FAIL, Rc20.TPM_RC_FAILURE)
    """Failed until the guest resets."""
    BAD_SIZE = (Rc12.TPM_SIZE, Rc20.TPM_RC_COMMAND_SIZE)
    """The size field cannot be true."""
    BAD_LOCALITY = (Rc12.TPM_BAD_LOCALITY, Rc20.TPM_RC_LOCALITY)
    """No TPM has this locality."""
    IN_USE = (Rc12.TPM_RETRY, Rc20.TPM_RC_RETRY)
    """Another client uses the TPM, or it may be on another host: nothing was begun, try again later."""


def refuse(version: TpmVersion, refusal: Refusal) -> bytes:
    """Return the whole response, ten bytes, with which a TPM of this version refuses."""
    return failure_response(version, refusal.value[0 if version is TpmVersion.V1_2 else 1])
