"""What was measured in this boot, so that the same services are extended into the PCR once. Pure but for its file.

The record proves nothing: the PCR does, and the record is held against it. It is written before the PCR is extended,
so a starter that is killed leaves a record whose last entry is, or is not yet, in the PCR. Its folder has the boot's id
for a name, which is random: nothing that was put there before the boot is taken up. For the starter; the manager reads
it.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from vtpm.errors import AccessDeniedError, ConflictError, ProtocolError, UnavailableError
from vtpm.measurement.digest import Contents
from vtpm.wire.service import MaxLength
from vtpm.wire.service_codec import codec_of

SERVICES_DIR = "services"
"""Folder in the run directory; has one folder for each boot."""
CACHE_DIR = "pycache"
"""Folder beside the record for what the services' interpreter compiles from what was measured."""
RECORD_FILE = "record.json"
CONTENTS_FILE = "contents.json"
MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_DIGESTS = 100
MAX_LIBRARIES = 1000
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LABEL = "vtpm services 1"


@dataclass(frozen=True)
class Library:
    """A library that the loader finds for the services, and its name in the measurement."""

    name: Annotated[str, MaxLength(4096)]
    place: Annotated[str, MaxLength(4096)]


@dataclass(frozen=True)
class Record:
    """What was measured in this boot.

    Args:
        bank, pcr: where to.
        reset_count: the TPM's; another one means that the PCR began anew.
        start: what the PCR held before.
        digests: measurements of the services, hex, in the order in which they were extended; at least one.
        running: the measurement of what was started last; one of `digests`, mostly the last.
        fingerprint, libraries: of its closure.
        doubt: in words, what the PCR held that no record accounted for; empty when it was all accounted for.
        extended: whether the PCR was seen to hold all of `digests`; before that, the last may be missing.
    """

    bank: Annotated[str, MaxLength(16)]
    pcr: int
    reset_count: int
    start: Annotated[bytes, MaxLength(64)]
    digests: Annotated[tuple[Annotated[str, MaxLength(64)], ...], MaxLength(MAX_DIGESTS)]
    running: Annotated[str, MaxLength(64)]
    fingerprint: Annotated[str, MaxLength(64)]
    libraries: Annotated[tuple[Library, ...], MaxLength(MAX_LIBRARIES)]
    doubt: Annotated[str, MaxLength(400)]
    extended: bool

    def __post_init__(self) -> None:
        if self.bank not in ("sha256", "sha384") or not self.digests:
            raise ProtocolError("a record of measurements names a bank, and has a digest at least")

    def value(self, count: int | None = None) -> bytes:
        """Return what the PCR holds after the first `count` measurements, or after all."""
        return predict(self.bank, self.start, self.digests[:count])


class Extension(enum.Enum):
    """Whether the PCR must be extended by what is to run."""

    DONE = "it was, in this boot"
    NEEDED = "it must be"


def event_digest(bank: str, measurement: str) -> bytes:
    """Return what is extended for a measurement: the bank's hash of the text "vtpm services 1 MEASUREMENT"."""
    return hashlib.new(bank, f"{_LABEL} {measurement}".encode()).digest()


def predict(bank: str, start: bytes, measurements: tuple[str, ...]) -> bytes:
    """Return what a PCR holds that held `start`, after these measurements. Spec: TPM 2.0 Part 3, TPM2_PCR_Extend."""
    value = start
    for measurement in measurements:
        value = hashlib.new(bank, value + event_digest(bank, measurement)).digest()
    return value


def plan(before: Record | None, now: Record, *, served: bool) -> tuple[Record, Extension]:
    """Return the record to keep, and whether the PCR is to be extended for it.

    Args:
        before: the last record of this boot, untrusted, if there is one.
        now: what a first record would be: `start` is what the PCR holds now, `running` what is about to run.
        served: whether a keeper runs that has this PCR: then services were started, and measured, in this boot.
    Raises:
        ConflictError: there were MAX_DIGESTS.
    """
    place = (now.bank, now.pcr, now.reset_count)
    if before is None:
        # Without services the PCR may hold what the boot measured into it; but not just what is to be measured now.
        if served or now.start == predict(now.bank, bytes(len(now.start)), (now.running,)):
            gone = f"the record of this boot is gone, and PCR {now.pcr} held {now.start.hex()}"
            return replace(now, doubt=gone), Extension.NEEDED
        return now, Extension.NEEDED
    if (before.bank, before.pcr, before.reset_count) != place:
        return now, Extension.NEEDED
    if now.start == before.value():
        settled = before.digests
    elif now.start == before.value(len(before.digests) - 1):
        settled = before.digests[:-1]  # the starter was ended before it extended the last
    else:
        held = f"PCR {now.pcr} held what the record of this boot does not account for: {now.start.hex()}"
        return replace(now, doubt=held), Extension.NEEDED
    kept = replace(now, start=before.start, doubt=before.doubt)
    if now.running in settled:
        # What it stands for is in the PCR, be it in front of what was measured later.
        return replace(kept, digests=settled, extended=True), Extension.DONE
    if len(settled) == MAX_DIGESTS:
        raise ConflictError(f"{MAX_DIGESTS} kinds of services were measured in this boot", next_step="Reboot")
    return replace(kept, digests=(*settled, now.running)), Extension.NEEDED


def boot_dir(run_dir: Path) -> Path:
    """Return this boot's folder in the run directory, which may not be there."""
    return run_dir / SERVICES_DIR / _BOOT_ID.read_text().strip()


def read_record(folder: Path) -> Record | None:
    """Return the record of this boot; None when there is none.

    Args:
        folder: of `boot_dir`.
    Raises:
        AccessDeniedError: somebody else could have written it.
        ProtocolError: it is damaged.
        UnavailableError: it cannot be read.
    """
    path = folder / RECORD_FILE
    content = _read(path)
    if content is None:
        return None
    try:
        record: Record = codec_of(Record).decode(content)
    except ProtocolError as error:
        raise ProtocolError(f"the record of measurements {path} is damaged: {error.message}") from None
    return record


def write_record(folder: Path, record: Record) -> None:
    """Put a record in the place of the one before, whole or not at all; it need not outlast the boot.

    Raises:
        UnavailableError: it cannot be written.
    """
    _write(folder / RECORD_FILE, codec_of(Record).encode(record))


def read_contents(folder: Path) -> Contents:
    """Return what was last read of the closure in this boot; nothing when there is no such file.

    Raises:
        AccessDeniedError, ProtocolError, UnavailableError: as read_record.
    """
    path = folder / CONTENTS_FILE
    content = _read(path) or {}
    try:
        return {name: (str(seen), bytes.fromhex(digest).hex()) for name, (seen, digest) in content.items()}
    except (AttributeError, TypeError, ValueError):
        raise ProtocolError(f"the record of measurements {path} is damaged") from None


def write_contents(folder: Path, contents: Contents) -> None:
    """Keep what was read of the closure, so that after an upgrade only the changes are. Raises UnavailableError."""
    _write(folder / CONTENTS_FILE, contents)


def _read(path: Path) -> Any:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            check_own(path, os.fstat(fd))
            data = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnavailableError(f"the record of measurements {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_RECORD_BYTES:
        raise ProtocolError(f"the record of measurements {path} is too large")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the record of measurements {path} is damaged: {error}") from error


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".new")
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="ascii") as file:
            os.fchmod(fd, 0o644)  # whatever the umask: the manager shows it
            file.write(json.dumps(content))
        temporary.rename(path)
    except OSError as error:
        raise UnavailableError(f"the record of measurements {path} cannot be written: {error.strerror}") from error


def check_own(path: Path, status: os.stat_result) -> None:
    """Refuse what another user than root or this one owns, or others may write to. Raises AccessDeniedError."""
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise AccessDeniedError(
            f"{path} belongs to user {status.st_uid} or may be written by others: what it says proves nothing",
            next_step=f"Remove it, and look who made it: rm -r {path}",
        )
