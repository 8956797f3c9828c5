"""PCR selections and values, and the policy digest that follows from them. Pure; for platform_tpm and keeper."""

from __future__ import annotations

import enum
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from vtpm.errors import UsageError

PCR_COUNT = 24
"""PCRs of a PC Client platform TPM."""

_TPM_CC_POLICY_PCR = 0x0000017F
_SELECT_BYTES = PCR_COUNT // 8


class PcrBank(enum.StrEnum):
    """Hash of a PCR bank. SHA-1 is left out on purpose: a collision in it forges a boot."""

    SHA256 = "sha256"
    SHA384 = "sha384"

    @property
    def algorithm_id(self) -> int:
        """TPM_ALG_ID. Spec: TPM 2.0 Part 2 (revision 1.59), 6.3."""
        return {PcrBank.SHA256: 0x000B, PcrBank.SHA384: 0x000C}[self]

    @property
    def digest_bytes(self) -> int:
        """Size of one PCR."""
        return hashlib.new(self).digest_size


PcrValues = Mapping[int, bytes]
"""Value of each PCR of a selection, by index."""


@dataclass(frozen=True)
class PcrSelection:
    """Some PCRs of one bank.

    Args:
        bank: the bank.
        indexes: at least one PCR, 0 to 23, ascending.
    Raises:
        UsageError: no PCR, one twice, out of order or out of range.
    """

    bank: PcrBank
    indexes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.indexes or list(self.indexes) != sorted(set(self.indexes)):
            raise UsageError("a PCR selection names each of its PCRs once, in ascending order, and at least one")
        if not 0 <= self.indexes[0] <= self.indexes[-1] < PCR_COUNT:
            raise UsageError(f"a PCR selection names PCRs from 0 to {PCR_COUNT - 1} only")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the form `sha256:0,2,4,7`.

        Raises:
            UsageError: another form, bank or PCR.
        """
        bank_name, separator, numbers = text.partition(":")
        if bank_name == "sha1":
            raise UsageError("PCRs of the bank sha1 protect nothing", next_step="Use the bank sha256")
        if bank_name not in list(PcrBank) or not separator or not re.fullmatch(r"[0-9]{1,2}(,[0-9]{1,2})*", numbers):
            raise UsageError(f"{text[:64]!r} is no PCR selection", next_step="Write it as sha256:0,2,4,7")
        indexes = [int(number) for number in numbers.split(",")]
        if len(set(indexes)) != len(indexes):
            raise UsageError(f"{text[:64]!r} names a PCR twice")
        return cls(PcrBank(bank_name), tuple(sorted(indexes)))

    def __str__(self) -> str:
        return f"{self.bank}:{','.join(map(str, self.indexes))}"

    def marshal(self) -> bytes:
        """Return the TPML_PCR_SELECTION. Spec: TPM 2.0 Part 2 (revision 1.59), 10.9.7."""
        bits = sum(1 << index for index in self.indexes)
        return struct.pack(">IHB", 1, self.bank.algorithm_id, _SELECT_BYTES) + bits.to_bytes(_SELECT_BYTES, "little")


DEFAULT_PCRS = PcrSelection(PcrBank.SHA256, (0, 2, 4, 7))
"""Firmware code, option ROMs, boot loader, Secure Boot state: TCG PC Client Platform Firmware Profile."""


def pcr_policy_digest(selection: PcrSelection, values: PcrValues) -> bytes:
    """Return the SHA-256 policy digest of PolicyPCR alone over these values.

    Spec: TPM 2.0 Part 3 (revision 1.59), TPM2_PolicyPCR.
    """
    pcrs = hashlib.sha256(b"".join(values[index] for index in selection.indexes)).digest()
    command = struct.pack(">I", _TPM_CC_POLICY_PCR)
    return hashlib.sha256(bytes(32) + command + selection.marshal() + pcrs).digest()


def all_zero(values: PcrValues) -> tuple[int, ...]:
    """Return the PCRs that hold only zeros: nothing has measured into them since the TPM was reset."""
    return tuple(index for index, value in sorted(values.items()) if not any(value))


def predict_pcr(bank: PcrBank, value: bytes, digests: Iterable[bytes]) -> bytes:
    """Return what a PCR will hold after it was extended with these digests, one after another.

    Args:
        value: what it holds before; zeros after a reset, for PCRs 0 to 16.
    Raises:
        UsageError: a value or digest is not of the bank's size.
    Spec: TPM 2.0 Part 3 (revision 1.59), TPM2_PCR_Extend.
    """
    for digest in (value, *(digests := tuple(digests))):
        if len(digest) != bank.digest_bytes:
            raise UsageError(f"a digest of the bank {bank} has {bank.digest_bytes} bytes, this one has {len(digest)}")
    for digest in digests:
        value = hashlib.new(bank, value + digest).digest()
    return value
