"""Which protections of an instance are in force, as its confinement program found them.

For the launcher, which passes the report on to `vtpm status`, and for `vtpm.confine` itself. The confined
process
sends one JSON object over a pipe of its own: after its last step, when nothing of the guest has been read
yet, the report; or the step that failed. A pipe that ends without either is a process that died on the way.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass

from vtpm.errors import ConfinementError, VtpmError

MAX_REPORT_BYTES = 16 * 1024
"""Fits a pipe, so that sending it never waits for the reader."""


class ProtectionStatus(enum.StrEnum):
    """How far a step's protection holds."""

    IN_FORCE = "in_force"
    WEAKER = "weaker"
    ABSENT = "absent"


@dataclass(frozen=True)
class Protection:
    """One step of confinement: its name, how far it holds, and why (what it does, or what it lacks)."""

    step: str
    status: ProtectionStatus
    why: str


Report = tuple[Protection, ...]


def encode_report(report: Report) -> bytes:
    """Return the message that says that every step was taken."""
    return _encode({"protections": [[p.step, p.status.value, p.why] for p in report]})


def encode_failure(error: VtpmError) -> bytes:
    """Return the message that says what failed, cut to what fits."""
    return _encode({"failure": error.message[:2000], "next_step": error.next_step[:500]})


def _encode(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode()[:MAX_REPORT_BYTES]


def decode_report(message: bytes) -> Report:
    """Read what a confined process sent until the end of its pipe.

    Args:
        message: all of it, at most MAX_REPORT_BYTES.
    Returns:
        The protections, in the order in which the steps were taken.
    Raises:
        ConfinementError: a step failed (the message names it), or the process ended before its last step, or
            what it sent is not a report.
    """
    if not message:
        raise ConfinementError("an instance ended before it was confined", next_step="Its log says more.")
    if len(message) > MAX_REPORT_BYTES:
        raise ConfinementError("an instance sent a confinement report that is too long")
    try:
        content = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ConfinementError("an instance sent a confinement report that is not JSON") from error
    match content:
        case {"failure": str(failure), "next_step": str(next_step)}:
            raise ConfinementError(failure, next_step=next_step)
        case {"protections": [*entries]} if entries:
            return tuple(_protection(entry) for entry in entries)
    raise ConfinementError("an instance sent a confinement report of another form")


def _protection(entry: object) -> Protection:
    match entry:
        case [str(step), str(status), str(why)] if status in list(ProtectionStatus):
            return Protection(step, ProtectionStatus(status), why)
    raise ConfinementError("an instance sent a confinement report of another form")
