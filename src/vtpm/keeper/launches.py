"""What was launched in this boot: extended into one PCR of the platform TPM, once for each image, and logged.

The log's entry is written before the PCR is extended, so a keeper that is killed leaves a log whose last entry is, or
is not yet, in the PCR; the next call finds out. The log proves nothing by itself: it is held against the PCR whenever
it is used. For the keeper alone; `Custody` calls it in turn, with the TPM in hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from vtpm.durable_file import read_file, replace_file
from vtpm.errors import ConflictError, ProtocolError
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.event_log import MAX_LOG_BYTES
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Gap, Launch, LaunchLog, Standing, decode, encode, standing

LAUNCH_DIR = "launches"
"""Folder of the keeper's in the run directory."""
LOG_FILE = "event_log"
_WHAT = "log of launches"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """The log as it was found, and what its PCR holds.

    Args:
        log: of this boot; None: there is none.
        value: of the PCR.
        doubt: in words, what does not fit; empty when the log accounts for the PCR.
    """

    log: LaunchLog | None
    value: bytes
    doubt: str


class Launches:
    """See the module.

    Args:
        run_dir: has LAUNCH_DIR, the keeper's own.
        selection: the bank and its one PCR.
    """

    def __init__(self, run_dir: Path, selection: PcrSelection) -> None:
        self.path = run_dir / LAUNCH_DIR / LOG_FILE
        self.selection = selection
        self._bank = HashAlgorithm(selection.bank)
        (self.pcr,) = selection.indexes
        self._known: tuple[int, frozenset[Launch]] = (0, frozenset())

    def known(self, launch: Launch, reset_count: int | None) -> bool:
        """Whether this keeper saw it in the PCR, since the TPM was reset last."""
        return self._known[0] == reset_count and launch in self._known[1]

    def measure(self, launch: Launch, tpm: PlatformTpm) -> None:
        """Extend the PCR by a launch that is not in it in this boot.

        Raises:
            ConflictError: the log is full, or something else extended the PCR at the same moment.
            PlatformTpmError: the TPM does not answer; it may have been extended.
            StoreError: the log cannot be written; nothing was extended.
        """
        log, value = self._settled(tpm)
        if standing(log, value) is Standing.PENDING:
            # A keeper was killed in between.
            (*_, last) = log.entries
            assert isinstance(last, Launch)
            self._extend(last, log, tpm)
        if launch not in log.measured:
            log = log.followed_by(launch)
            self._write(log)
            self._extend(launch, log, tpm)
        self._known = (log.reset_count, log.measured)

    def look(self, tpm: PlatformTpm) -> Held:
        """Return the log and the PCR, and change neither. Raises PlatformTpmError: the TPM does not answer."""
        value, reset_count = self._held(tpm)
        try:
            log = self._read()
        except ProtocolError as error:
            return Held(None, value, f"the log is damaged or forged: {error.message}")
        if log is None or log.reset_count != reset_count:
            there_is_none = f"PCR {self.pcr} was extended, and there is no log of this boot" if any(value) else ""
            return Held(None, value, there_is_none)
        if standing(log, value) is Standing.OTHER:
            return Held(log, value, f"PCR {self.pcr} does not hold what the log leads to: {log.value.hex()}")
        return Held(log, value, _doubt(log))

    def shown(self, tpm: PlatformTpm) -> LaunchLog:
        """Return the log of this boot as far as the PCR holds it; it ends with a gap where that is something else.

        Changes neither. Where there is no log, it begins with what the PCR holds.

        Raises:
            ConflictError: there is no room for the gap.
            PlatformTpmError: the TPM does not answer.
            StateError: the log cannot be read.
        """
        value, reset_count = self._held(tpm)
        try:
            log = self._read()
        except ProtocolError as error:
            _log.error("%s is not shown: %s", self.path, error)
            log = None
        if log is None or log.reset_count != reset_count:
            return LaunchLog(self._bank, self.pcr, reset_count, value)
        match standing(log, value):
            case Standing.CURRENT:
                return log
            case Standing.PENDING:
                return dataclasses.replace(log, entries=log.entries[:-1])
            case Standing.OTHER:
                return log.followed_by(Gap(value))

    def _settled(self, tpm: PlatformTpm) -> tuple[LaunchLog, bytes]:
        """Return a log that leads to what the PCR holds, or will once its last entry is extended."""
        value, reset_count = self._held(tpm)
        try:
            log = self._read()
        except ProtocolError as error:
            _log.error("%s is put aside: %s", self.path, error)
            with contextlib.suppress(OSError):  # evidence; what is written next takes its place all the same
                self.path.rename(self.path.with_suffix(".damaged"))
            log = None
        if log is None or log.reset_count != reset_count:
            if any(value):
                _log.warning("PCR %d held %s before the log of launches begins", self.pcr, value.hex())
            return LaunchLog(self._bank, self.pcr, reset_count, value), value
        if standing(log, value) is Standing.OTHER:
            _log.error("something else extended PCR %d: it holds %s", self.pcr, value.hex())
            return log.followed_by(Gap(value)), value
        return log, value

    def _held(self, tpm: PlatformTpm) -> tuple[bytes, int]:
        values, reset_count = tpm.pcr_state(self.selection)
        return values[self.pcr], reset_count

    def _extend(self, launch: Launch, log: LaunchLog, tpm: PlatformTpm) -> None:
        tpm.extend(self.pcr, self.selection.bank, launch.digest(self._bank))
        value, reset_count = self._held(tpm)
        if value != log.value or reset_count != log.reset_count:
            raise ConflictError(
                f"PCR {self.pcr} of the platform TPM was extended by something else at the same moment",
                next_step="Try again; if it is so again, set launch_pcr to a PCR that nothing else extends",
            )
        _log.info("launches: %s %s is in PCR %d", launch.kind, launch.measurement[:16], self.pcr)

    def _read(self) -> LaunchLog | None:
        data = read_file(self.path, _WHAT, MAX_LOG_BYTES)
        return None if data is None else decode(data, self._bank, self.pcr)

    def _write(self, log: LaunchLog) -> None:
        replace_file(self.path, _WHAT, encode(log))


def _doubt(log: LaunchLog) -> str:
    if log.gaps:
        return f"something else extended PCR {log.pcr} (gaps in the log: {log.gaps}): nothing before that is proved"
    if any(log.start):
        return (
            f"PCR {log.pcr} was extended before the log begins: by the boot of the host, or by launches whose log is"
            " gone"
        )
    return ""


def refused_pcr(index: int, why: str) -> ConflictError:
    """Return the error for a PCR that launches must not extend."""
    return ConflictError(
        f"launches cannot be measured into PCR {index}: {why}",
        next_step="Set launch_pcr to a PCR that nothing else uses, such as 14, run `vtpm shutdown`, and start again",
    )
