"""Which platforms may be given a vTPM, or give one: a file that an operator reads and writes. Pure but for reading.

bank = "sha256"
embedded = false            # whether platforms without a hardware TPM will do

[pcrs]                      # each that is named is quoted, and must hold one of its values; not 16 or 23
0 = ["3d458cfe..."]
7 = ["b5710bf5...", "..."]

[services]                  # measurements of manager, keeper and launcher
pcr = 13                    # from 1 to 15: the others can be reset by what runs
allowed = ["f1d2..."]

[images]                    # measurements of what runs vTPMs, by kind of domain
pcr = 12                    # from 8 to 15
process = ["..."]
qemu = ["..."]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtpm.errors import NotFoundError, UsageError
from vtpm.tpm.event_log import PCR_COUNT
from vtpm.tpm.hash_algorithms import HashAlgorithm

MAX_POLICY_BYTES = 1024 * 1024
# As for the settings services_pcr and launch_pcr. Source: TCG PC Client Platform TPM Profile, initial and reset values.
_FOR_SERVICES = range(1, 16)
_FOR_IMAGES = range(8, 16)
_RESETTABLE = (16, 23)
"""By whatever runs, which can then extend into them what it likes."""
FOR_PCRS = tuple(index for index in range(PCR_COUNT) if index not in _RESETTABLE)
"""PCRs that a policy may name."""
_MEASUREMENT = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9-]{0,15}")


@dataclass(frozen=True)
class PlatformPolicy:
    """See the module.

    Args:
        bank: of the PCRs.
        embedded: whether a platform whose TPM is a software stand-in will do.
        pcrs: values that each may hold.
        services_pcr, services: see there; measurements are 32 bytes.
        images_pcr, images: see there.
    """

    bank: HashAlgorithm
    embedded: bool
    pcrs: Mapping[int, frozenset[bytes]]
    services_pcr: int
    services: frozenset[bytes]
    images_pcr: int
    images: Mapping[str, frozenset[str]]

    @property
    def quoted(self) -> tuple[int, ...]:
        """PCRs that a quote has to be over, ascending."""
        return tuple(sorted({*self.pcrs, self.services_pcr, self.images_pcr}))


def read_policy(path: Path) -> PlatformPolicy:
    """Read a policy.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it cannot be read, or is not of the form above; the message names what.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no platform policy {path}", next_step="Write one: docs/migration.md") from error
    except OSError as error:
        raise UsageError(f"the platform policy {path} cannot be read: {error.strerror}") from error
    try:
        return parse_policy(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", next_step=error.next_step) from None


def parse_policy(data: bytes) -> PlatformPolicy:
    """Read a policy from the bytes of its file. Raises UsageError: it is not of the form above."""
    if len(data) > MAX_POLICY_BYTES:
        raise UsageError(f"a platform policy has at most {MAX_POLICY_BYTES} bytes")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # a ValueError of its own: a number with too many digits
        raise UsageError(f"the platform policy is not TOML: {error}") from error
    bank = document.pop("bank", "sha256")
    if bank not in ("sha256", "sha384"):
        raise UsageError(f"the bank {str(bank)[:32]!r} is neither sha256 nor sha384")
    embedded = document.pop("embedded", False)
    if not isinstance(embedded, bool):
        raise UsageError("embedded must be true or false")
    algorithm = HashAlgorithm(bank)
    pcrs = _table(document, "pcrs")
    services, images = _table(document, "services"), _table(document, "images")
    if document:
        raise UsageError(f"the platform policy has unknown settings: {', '.join(sorted(document))[:200]}")
    services_pcr, images_pcr = (
        _pcr(services.pop("pcr", 13), _FOR_SERVICES),
        _pcr(images.pop("pcr", 12), _FOR_IMAGES),
    )
    allowed = _texts(services.pop("allowed", []), "services.allowed", _MEASUREMENT)
    if services:
        raise UsageError(f"services has unknown settings: {', '.join(sorted(services))[:200]}")
    policy = PlatformPolicy(
        bank=algorithm,
        embedded=embedded,
        pcrs={_pcr_named(index): _values(index, values, algorithm) for index, values in pcrs.items()},
        services_pcr=services_pcr,
        services=frozenset(map(bytes.fromhex, allowed)),
        images_pcr=images_pcr,
        images={
            _kind(kind): frozenset(_texts(texts, f"images.{kind}", _MEASUREMENT)) for kind, texts in images.items()
        },
    )
    if len(policy.quoted) != len(policy.pcrs) + 2:
        raise UsageError("the PCRs of services and images are two, and none of those in pcrs")
    if not policy.pcrs and not policy.embedded:
        raise UsageError("a policy for hardware names PCRs of the boot: without them any software may have booted")
    return policy


def print_policy(policy: PlatformPolicy) -> str:
    """Return a file that `parse_policy` reads as this policy."""
    lines = [f'bank = "{policy.bank.value}"', f"embedded = {str(policy.embedded).lower()}", "", "[pcrs]"]
    lines += [f"{index} = {_listed(value.hex() for value in values)}" for index, values in sorted(policy.pcrs.items())]
    services = _listed(value.hex() for value in policy.services)
    lines += ["", "[services]", f"pcr = {policy.services_pcr}", f"allowed = {services}"]
    lines += ["", "[images]", f"pcr = {policy.images_pcr}"]
    lines += [f"{kind} = {_listed(values)}" for kind, values in sorted(policy.images.items())]
    return "\n".join(lines) + "\n"


def _listed(texts: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{text}"' for text in sorted(texts)) + "]"


def _table(document: dict[str, Any], name: str) -> dict[str, Any]:
    table = document.pop(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{name} must be a table")
    return table


def _pcr(value: object, usable: range) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in usable:
        raise UsageError(f"{str(value)[:32]!r} is no PCR from {usable[0]} to {usable[-1]}")
    return value


def _pcr_named(text: str) -> int:
    if not re.fullmatch(r"[0-9]|1[0-9]|2[0-3]", text):
        raise UsageError(f"{text[:32]!r} is no PCR from 0 to {PCR_COUNT - 1}")
    if int(text) in _RESETTABLE:
        raise UsageError(f"PCR {text} proves nothing: whatever runs can reset it")
    return int(text)


def _kind(text: str) -> str:
    if not _KIND.fullmatch(text):
        raise UsageError(f"{text[:32]!r} is no kind of domain")
    return text


def _values(index: str, values: object, bank: HashAlgorithm) -> frozenset[bytes]:
    texts = _texts(values, f"pcrs.{index}", re.compile(rf"[0-9a-f]{{{2 * bank.digest_bytes}}}"))
    if not texts:
        raise UsageError(f"pcrs.{index} allows no value at all")
    if any(set(text) in ({"0"}, {"f"}) for text in texts):
        raise UsageError(f"pcrs.{index} allows a PCR into which nothing was measured")
    return frozenset(map(bytes.fromhex, texts))


def _texts(values: object, name: str, form: re.Pattern[str]) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(text, str) and form.fullmatch(text) for text in values):
        raise UsageError(f"{name} must be a list of hex digests of the right size")
    return values
