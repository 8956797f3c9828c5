"""Dictionary-attack lockout of a TPM 2.0: the question a TPM answers about it, and the answer.

Pure; may be imported by everyone. docs/lockout.md says what the numbers mean.
Source: TPM 2.0 Part 1 (revision 1.59), "Dictionary Attack Protection"; Part 2, TPM_PT and TPMA_PERMANENT; Part 3,
TPM2_GetCapability.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vtpm.errors import ProtocolError
from vtpm.tpm.headers import HEADER_BYTES, TAG_NO_SESSIONS_20, ResponseHeader
from vtpm.tpm.return_codes import Rc20, describe_20

_CC_GET_CAPABILITY = 0x17A
_CAP_TPM_PROPERTIES = 6
_PT_PERMANENT = 0x200
_PT_LOCKOUT_COUNTER = 0x20E
_PT_MAX_AUTH_FAIL = 0x20F
_PT_LOCKOUT_INTERVAL = 0x210
_MAX_PROPERTIES = _PT_LOCKOUT_INTERVAL - _PT_PERMANENT + 1
_IN_LOCKOUT = 1 << 9
"""Of TPMA_PERMANENT."""

_ANSWER = struct.Struct(">BII")
"""moreData, capability, number of properties."""
_PROPERTY = struct.Struct(">II")

GET_LOCKOUT: Final = struct.pack(
    ">HIIIII", TAG_NO_SESSIONS_20, 22, _CC_GET_CAPABILITY, _CAP_TPM_PROPERTIES, _PT_PERMANENT, _MAX_PROPERTIES
)
"""TPM2_GetCapability(TPM_CAP_TPM_PROPERTIES) of all that `parse_lockout` reads; needs no authorisation."""


@dataclass(frozen=True, slots=True)
class Lockout:
    """What a TPM says of its dictionary-attack protection.

    Fields: locked (inLockout: what is protected cannot be authorised now), failed_tries and max_tries (u32),
    interval_s (u32, seconds of power after which one failed try is forgiven).
    """

    locked: bool
    failed_tries: int
    max_tries: int
    interval_s: int


def parse_lockout(response: bytes) -> Lockout:
    """Read the response to GET_LOCKOUT.

    Raises:
        ProtocolError: the TPM answers something else, such as TPM_RC_INITIALIZE before TPM2_Startup.
    """
    header = ResponseHeader.parse(response)
    if header.return_code != Rc20.TPM_RC_SUCCESS:
        raise ProtocolError(f"the TPM does not tell its lockout: {describe_20(header.return_code)}")
    start = HEADER_BYTES + _ANSWER.size
    if header.tag != TAG_NO_SESSIONS_20 or header.size_bytes != len(response) or len(response) < start:
        raise ProtocolError("the TPM's answer about its lockout is not whole")
    _, capability, count = _ANSWER.unpack_from(response, HEADER_BYTES)
    if capability != _CAP_TPM_PROPERTIES or count > _MAX_PROPERTIES or len(response) != start + count * _PROPERTY.size:
        raise ProtocolError(f"the TPM's answer about its lockout has {count} properties in {len(response)} bytes")
    values: dict[int, int] = dict(_PROPERTY.iter_unpack(response[start:]))
    try:
        return Lockout(
            locked=bool(values[_PT_PERMANENT] & _IN_LOCKOUT),
            failed_tries=values[_PT_LOCKOUT_COUNTER],
            max_tries=values[_PT_MAX_AUTH_FAIL],
            interval_s=values[_PT_LOCKOUT_INTERVAL],
        )
    except KeyError as missing:
        raise ProtocolError(f"the TPM's answer about its lockout lacks property 0x{missing.args[0]:x}") from None
