"""What PCRs will hold after the next boot, when some of what is measured will be another: a kernel, a boot loader.

Pure; may be imported by everyone. A prediction is as good as its premises: the next boot measures the same things in
the same order, except for what the caller names. It is worth sealing to because it begins with a log that accounts for
what the TPM holds now.

What a UEFI firmware measures into PCR 4 for an application that it starts is its Authenticode digest
(`vtpm.tpm.authenticode`). A unified kernel image of systemd has two events there: the whole image, and the kernel
inside, which its stub hands to the firmware as an image of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vtpm.errors import UsageError
from vtpm.tpm.event_log import Event, EventLog, check_replay
from vtpm.tpm.hash_algorithms import HashAlgorithm, extend


@dataclass(frozen=True, slots=True)
class Replacement:
    """Events of one PCR that will have another digest.

    Args:
        pcr: index of the PCR.
        old: digest in the log; every event of the PCR that has it is meant.
        new: digest that they will have.
    """

    pcr: int
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class Addition:
    """A digest that will be extended into a PCR after all that the log has for it."""

    pcr: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ChangedEvent:
    """An event of the log, and the digest that it will have instead."""

    event: Event
    new: bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """What will be.

    Args:
        values: of each PCR that was asked about, by index; those that stay the same too.
        changed: events whose digest will be another, in the log's order; additions are none.
    """

    values: Mapping[int, bytes]
    changed: tuple[ChangedEvent, ...]


def predict_pcrs(
    log: EventLog,
    bank: HashAlgorithm,
    held: Mapping[int, bytes],
    replacements: Iterable[Replacement] = (),
    additions: Iterable[Addition] = (),
) -> Prediction:
    """Return what PCRs will hold after a boot like the one of this log, but for what is replaced or added.

    Args:
        log: of the boot that led to `held`.
        bank: not SHA-1.
        held: the PCRs to predict, at least one, with the values that the TPM holds now; the log must account for each
            of them.
        replacements: at most one for a PCR and an old digest.
        additions: in the order in which they will be extended.
    Raises:
        UsageError: SHA-1; no PCR; a change to one that is not in `held`; a digest of another size; an old digest that
            no event has, or that is replaced twice.
        PlatformTpmError: the log is unfit for a policy, or does not account for a PCR.
    """
    check_replay(log, bank, held)
    wanted = _by_old_digest(replacements, bank, held)
    changed: list[ChangedEvent] = []
    found: set[tuple[int, bytes]] = set()
    values = {pcr: log.start_value(bank, pcr) for pcr in held}
    for event in log.events:
        if not event.extends or event.pcr not in held:
            continue
        old = event.digests[bank]
        new = wanted.get((event.pcr, old), old)
        if new != old:
            changed.append(ChangedEvent(event, new))
        found.add((event.pcr, old))
        values[event.pcr] = extend(bank, values[event.pcr], new)
    for pcr, old in wanted:
        if (pcr, old) not in found:
            raise UsageError(f"no event of PCR {pcr} in the event log has the {bank} digest {old.hex()}")
    for addition in additions:
        _check(addition.pcr, (addition.digest,), bank, held)
        values[addition.pcr] = extend(bank, values[addition.pcr], addition.digest)
    return Prediction(values, tuple(changed))


def _by_old_digest(
    replacements: Iterable[Replacement], bank: HashAlgorithm, held: Mapping[int, bytes]
) -> dict[tuple[int, bytes], bytes]:
    wanted: dict[tuple[int, bytes], bytes] = {}
    for replacement in replacements:
        _check(replacement.pcr, (replacement.old, replacement.new), bank, held)
        key = (replacement.pcr, replacement.old)
        if key in wanted:
            raise UsageError(f"the digest {replacement.old.hex()} of PCR {replacement.pcr} is replaced twice")
        wanted[key] = replacement.new
    return wanted


def _check(pcr: int, digests: Iterable[bytes], bank: HashAlgorithm, held: Mapping[int, bytes]) -> None:
    if pcr not in held:
        raise UsageError(f"PCR {pcr} is changed but not among those that are predicted")
    for digest in digests:
        if len(digest) != bank.digest_bytes:
            raise UsageError(f"a digest for PCR {pcr} has {len(digest)} bytes; {bank} has {bank.digest_bytes}")
