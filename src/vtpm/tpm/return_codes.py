"""Return codes of TPM 1.2 and 2.0 that vtpm itself sends, expects or explains, with their names.

Pure; may be imported by everyone. Not the whole table of the specifications: only what this project meets.
Source: TPM Main Part 2 (1.2, revision 116), section 16; TPM 2.0 Part 2 (revision 1.59), section 6.6.
"""

from __future__ import annotations

import enum


class Rc12(enum.IntEnum):
    """TPM 1.2 result codes (TPM_RESULT); libtpms as a library answers with them for either version."""

    TPM_SUCCESS = 0x000
    TPM_AUTHFAIL = 0x001
    TPM_BADINDEX = 0x002
    TPM_BAD_PARAMETER = 0x003
    TPM_DEACTIVATED = 0x006
    TPM_DISABLED = 0x007
    TPM_FAIL = 0x009
    TPM_BAD_ORDINAL = 0x00A
    TPM_NOSPACE = 0x011
    TPM_SIZE = 0x017
    TPM_FAILEDSELFTEST = 0x01C
    TPM_BADTAG = 0x01E
    TPM_IOERROR = 0x01F
    TPM_INVALID_POSTINIT = 0x026
    TPM_BAD_TYPE = 0x034
    TPM_BAD_LOCALITY = 0x03D
    TPM_RETRY = 0x800


class Rc20(enum.IntEnum):
    """TPM 2.0 response codes (TPM_RC)."""

    TPM_RC_SUCCESS = 0x000
    TPM_RC_BAD_TAG = 0x01E
    TPM_RC_INITIALIZE = 0x100
    TPM_RC_FAILURE = 0x101
    TPM_RC_COMMAND_SIZE = 0x142
    TPM_RC_COMMAND_CODE = 0x143
    TPM_RC_NV_UNINITIALIZED = 0x14A
    TPM_RC_NV_DEFINED = 0x14C
    TPM_RC_LOCALITY = 0x907
    TPM_RC_YIELDED = 0x908
    TPM_RC_CANCELED = 0x909
    TPM_RC_TESTING = 0x90A
    TPM_RC_LOCKOUT = 0x921
    TPM_RC_RETRY = 0x922


def is_auth_fail_20(code: int) -> bool:
    """Whether a response code is TPM_RC_AUTH_FAIL, of whichever session: a failure that counts against a dictionary.

    Spec: TPM 2.0 Part 2, "Response Code Formats": in format 1, bits 6 and 8 to 11 say what the error is about.
    """
    return code & ~0xF40 == _RC_AUTH_FAIL


_RC_AUTH_FAIL = 0x08E
_NAMES_12 = {int(code): code.name for code in Rc12}
_NAMES_20 = {int(code): code.name for code in Rc20}


def describe_12(code: int) -> str:
    """Return `0x009 (TPM_FAIL)`, or the number alone when it has no name here."""
    return _describe(code, _NAMES_12)


def describe_20(code: int) -> str:
    """Return `0x101 (TPM_RC_FAILURE)`, or the number alone when it has no name here."""
    return _describe(code, _NAMES_20)


def _describe(code: int, names: dict[int, str]) -> str:
    name = names.get(code)
    return f"0x{code:03x} ({name})" if name else f"0x{code:03x}"
