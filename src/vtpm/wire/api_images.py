"""Part of the manager's API that is about images and launches, as data; see vtpm.wire.api. For manager and client."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ImageKind(enum.StrEnum):
    """Kinds of domain as images are listed for them: where vTPMs live and, for another make than libtpms, that."""

    PROCESS = "process"
    QEMU = "qemu"
    XEN = "xen"
    QEMU_SWTPM = "qemu-swtpm"


@dataclass(frozen=True)
class Image:
    """Software that may run vTPMs, or may no more.

    Args:
        kind: of domain.
        measurement: SHA-256 in hex, over all that such a domain runs.
        engine_version: of the libtpms in it, such as "0.9.2"; empty: not known.
        state: allowed or retired.
        changed_at: since when; ISO 8601 in UTC.
        vtpms: names of those that it runs now.
    """

    kind: str
    measurement: str
    label: str
    engine_version: str
    state: str
    changed_at: str
    vtpms: list[str]


@dataclass(frozen=True)
class AllowImage:
    """An image to allow; `kind` may be left out for one that would be started now."""

    measurement: str
    label: str
    kind: str | None = None


@dataclass(frozen=True)
class AllowedImage:
    """An image that was allowed, and what is to be said of that."""

    image: Image
    warnings: list[str]


@dataclass(frozen=True)
class RetireImage:
    """An image that is to run no vTPM any more."""

    measurement: str
    kind: str | None = None


@dataclass(frozen=True)
class Launch:
    """One entry of the log of launches.

    Args:
        kind, measurement: of what was launched; empty for a gap.
        label: that of the image in the launch policy; it is not measured.
        held: for a gap, what the PCR was found to hold (hex), because something else had extended it.
    """

    kind: str
    measurement: str
    label: str
    held: str


@dataclass(frozen=True)
class Launches:
    """What was launched in this boot, by the log, and what the platform TPM says of that.

    Args:
        bank, pcr: where launches are measured to.
        value: what the PCR holds, in hex.
        start: what it held before the log began; empty when there is no log.
        replays: whether the log leads from `start` to `value`.
        doubt: what the log does not account for; empty when it accounts for all.
        log: path of the log, a TCG event log.
    """

    bank: str
    pcr: int
    value: str
    start: str
    entries: list[Launch]
    replays: bool
    doubt: str
    log: str
