"""Which boots may open the root key, and the digests that follow. Pure; for platform_tpm and keeper.

The sealed root key has one policy for ever: PolicyAuthorizeNV of the policy index. The index holds the digest that is
approved now: PolicyOR over one PolicyPCR for each allowed set of PCRs. Changing the sets rewrites the index alone.

Spec: TPM 2.0 Part 3 (revision 1.59), TPM2_PolicyOR, TPM2_PolicyAuthorizeNV, TPM2_PolicySigned.
"""

from __future__ import annotations

import enum
import hashlib
import re
import struct
from dataclasses import dataclass

from vtpm.errors import ConflictError, NotFoundError, PlatformTpmError, UsageError
from vtpm.platform_tpm.pcrs import PcrSelection, PcrValues, all_zero, pcr_policy_digest

MAX_SETS = 8
"""PolicyOR takes 2 to 8 digests."""
APPROVED_BYTES = 34
"""Content of the policy index: TPMT_HA of SHA-256."""

_TPM_ALG_SHA256 = 0x000B
_TPM_CC_POLICY_SIGNED = 0x00000160
_TPM_CC_POLICY_OR = 0x00000171
_TPM_CC_POLICY_AUTHORIZE_NV = 0x00000192
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +-]{0,63}")


class ZeroPcrs(enum.Enum):
    """What to do when all PCRs of a set are zero, so that nothing measured this boot."""

    REFUSE = "refuse"
    ALLOW = "allow"


@dataclass(frozen=True)
class PcrSet:
    """PCR values of one boot that may open the root key.

    Args:
        label: for people: 1 to 64 characters of ASCII letters, digits, `._ +-`; begins with a letter or digit.
        selection: which PCRs of which bank.
        values: one for each PCR of the selection, in its order.
    Raises:
        UsageError: another form.
    """

    label: str
    selection: PcrSelection
    values: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.label):
            raise UsageError(f"{self.label[:64]!r} is no label of a set of PCRs", next_step="Use letters and digits")
        sizes = [len(value) for value in self.values]
        if sizes != [self.selection.bank.digest_bytes] * len(self.selection.indexes):
            raise UsageError(f"the PCR values of {self.label!r} do not fit the selection {self.selection}")

    @classmethod
    def of(cls, label: str, selection: PcrSelection, values: PcrValues) -> PcrSet:
        """Make one of values by index; values of further PCRs are left out."""
        return cls(label, selection, tuple(values[index] for index in selection.indexes))

    @property
    def by_index(self) -> dict[int, bytes]:
        """Value of each PCR."""
        return dict(zip(self.selection.indexes, self.values, strict=True))

    @property
    def digest(self) -> bytes:
        """Digest of PolicyPCR over it."""
        return pcr_policy_digest(self.selection, self.by_index)

    def differing(self, now: PcrValues) -> tuple[int, ...]:
        """Return the PCRs whose value is another now."""
        return tuple(index for index, value in self.by_index.items() if now[index] != value)


PcrSets = tuple[PcrSet, ...]
"""The sets that may open the root key: 1 to MAX_SETS, labels and values all distinct."""


def checked(sets: PcrSets) -> PcrSets:
    """Return the sets.

    Raises:
        ConflictError: none, too many, or two with one label or the same values.
    """
    if not 1 <= len(sets) <= MAX_SETS:
        raise ConflictError(
            f"{len(sets)} sets of PCRs cannot be allowed: 1 to {MAX_SETS} can", next_step="Drop one that is not booted"
        )
    for number, one in enumerate(sets):
        for other in sets[:number]:
            if one.label == other.label:
                raise ConflictError(f"a set of PCRs {one.label!r} is allowed already", next_step="Choose another label")
            if one.digest == other.digest:
                raise ConflictError(f"the PCR values of {one.label!r} are allowed already, as {other.label!r}")
    return sets


def with_set(sets: PcrSets, more: PcrSet) -> PcrSets:
    """Return the sets and one more.

    Raises:
        ConflictError: it is one too many, or there already.
    """
    return checked((*sets, more))


def without_set(sets: PcrSets, label: str) -> PcrSets:
    """Return the sets without the one of this label.

    Raises:
        NotFoundError: there is none.
        ConflictError: it is the last, without which nothing opens the root key.
    """
    left = tuple(one for one in sets if one.label != label)
    if len(left) == len(sets):
        raise NotFoundError(f"no set of PCRs {label[:64]!r} is allowed")
    if not left:
        raise ConflictError(
            f"{label!r} is the last allowed set of PCRs: without it nothing opens the root key",
            next_step="Allow another set first",
        )
    return left


def refuse_zeros(
    pcr_set: PcrSet, zero_pcrs: ZeroPcrs, fence_pcr: int | None = None, services_pcr: int | None = None
) -> None:
    """Refuse a set into which nothing was measured.

    Args:
        fence_pcr, services_pcr: PCRs that vtpm itself extends; they do not show that anything measured the boot.
    Raises:
        PlatformTpmError: all PCRs but these are zero, and that is to be refused.
    """
    measured = {index: value for index, value in pcr_set.by_index.items() if index not in (fence_pcr, services_pcr)}
    if zero_pcrs is ZeroPcrs.REFUSE and len(all_zero(measured)) == len(measured):
        raise PlatformTpmError(
            f"the PCRs {pcr_set.selection} of {pcr_set.label!r} are all zero: nothing measured that boot",
            next_step="Name PCRs that the firmware extends with --pcrs",
        )


def branches(sets: PcrSets) -> list[bytes]:
    """Return the digests for PolicyOR, which takes two at least: a lone one stands twice."""
    digests = [one.digest for one in sets]
    return digests * 2 if len(digests) == 1 else digests


def approved(sets: PcrSets) -> bytes:
    """Return the policy index's content, a TPMT_HA: PolicyOR over the sets. Spec: Part 2, 10.3.2."""
    digest = _extend(_TPM_CC_POLICY_OR, b"".join(branches(sets)))
    return struct.pack(">H", _TPM_ALG_SHA256) + digest


def authorize_nv_digest(index_name: bytes) -> bytes:
    """Return the policy digest of PolicyAuthorizeNV alone.

    Args:
        index_name: Name of the policy index once it is written.
    """
    return _extend(_TPM_CC_POLICY_AUTHORIZE_NV, index_name)


def signed_digest(key_name: bytes, policy_ref: bytes) -> bytes:
    """Return the policy digest of PolicySigned alone."""
    return hashlib.sha256(_extend(_TPM_CC_POLICY_SIGNED, key_name) + policy_ref).digest()


def _extend(command_code: int, arguments: bytes) -> bytes:
    return hashlib.sha256(bytes(32) + struct.pack(">I", command_code) + arguments).digest()
