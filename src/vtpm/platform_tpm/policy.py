"""The policy that sealed objects open under, as commands on a session. For platform_tpm alone.

Today PolicyPCR alone. PolicyAuthorizeNV, with the allowed PCR digests in an NV index, belongs here.
"""

from __future__ import annotations

from tpm2_pytss import ESAPI, ESYS_TR, TPM2B_DIGEST, TPML_PCR_SELECTION

from vtpm.platform_tpm.pcrs import PcrSelection


def apply_pcr_policy(esapi: ESAPI, session: ESYS_TR, selection: PcrSelection) -> None:
    """Bring a policy session to the digest of PolicyPCR over the PCRs as they are now.

    Raises:
        TSS2_Exception: the TPM's refusal.
    """
    esapi.policy_pcr(session, TPM2B_DIGEST(), TPML_PCR_SELECTION.parse(str(selection)))
