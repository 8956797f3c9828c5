"""Reading and extending PCRs. For platform_tpm alone; everything here runs in a connection's thread."""

from __future__ import annotations

from typing import Any

from tpm2_pytss import (
    ESYS_TR,
    TPM2_SE,
    TPMA_SESSION,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMT_HA,
)

from vtpm.errors import PlatformTpmError
from vtpm.platform_tpm.connection import Connection
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection

TRIES = 5
"""How often what PCRs changed under is begun again."""


def always_changing(connection: Connection) -> PlatformTpmError:
    """Return the error for PCRs that change under every try."""
    return PlatformTpmError(f"the PCRs of the platform TPM {connection.tcti!r} change all the time")


def read_pcrs(connection: Connection, selection: PcrSelection, session: Any = ESYS_TR.NONE) -> dict[int, bytes]:
    """Return the present value of each PCR of a selection, all of one moment.

    Args:
        session: an audit session, with which the answers are authenticated.
    Raises:
        PlatformTpmError: the TPM lacks the bank or a PCR.
    """
    for _ in range(TRIES):
        values: dict[int, bytes] = {}
        counters = set()
        while missing := [index for index in selection.indexes if index not in values]:
            # One answer holds at most eight digests.
            asked = TPML_PCR_SELECTION.parse(str(PcrSelection(selection.bank, tuple(missing[:8]))))
            counter, _, digests = connection.esapi.pcr_read(asked, session1=session)
            counters.add(counter)
            read = dict(zip(missing, (bytes(digest) for digest in digests), strict=False))
            if not read or any(len(value) != selection.bank.digest_bytes for value in read.values()):
                raise PlatformTpmError(
                    f"the platform TPM {connection.tcti!r} has no PCR {missing[0]} in the bank {selection.bank}",
                    next_step="Enable the bank in the firmware's settings, or name another with --pcrs",
                )
            values |= read
        if len(counters) == 1:
            return values
    raise always_changing(connection)


def extend_pcr(connection: Connection, index: int, bank: PcrBank, digest: bytes, srk_name: bytes | None = None) -> None:
    """Extend one PCR of one bank.

    Args:
        srk_name: of the TPM that it is to be; with it nobody else can have made the answer.
    """
    value = TPMT_HA(hashAlg=bank.algorithm_id)
    setattr(value.digest, str(bank), digest)
    with (
        connection.storage_primary(srk_name) as (srk, _),
        connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION(0)) as session,
    ):
        connection.esapi.pcr_extend(ESYS_TR.PCR0 + index, TPML_DIGEST_VALUES([value]), session1=session)
