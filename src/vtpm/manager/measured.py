"""What this manager knows of the measurement of its own software. The manager's alone."""

from __future__ import annotations

import os
import sys

from vtpm.config import EMBEDDED, Config
from vtpm.errors import StateError, VtpmError
from vtpm.measurement.record import CACHE_DIR, boot_dir, read_record
from vtpm.wire.api import MeasuredServices


def services_of_boot(config: Config) -> tuple[bytes, ...]:
    """Return the measurements of this boot's services, in order of extension; none where they are not measured.

    Raises:
        StateError: they are measured, and the record of that is not there or not whole.
        VtpmError: as read_record.
    """
    if not config.measures:
        return ()
    record = read_record(boot_dir(config.run_dir))
    if record is None or not record.extended:
        raise StateError(
            "what the services of this boot are is not known: nothing says that the platform TPM has their measurement",
            next_step="Start this host's manager as vtpm-managerd; if it is so again, reboot",
        )
    return tuple(map(bytes.fromhex, record.digests))


def measured_services(config: Config) -> MeasuredServices:
    """Return what the starter recorded when it became this manager; it cannot change while this manager runs."""
    if config.platform_tpm == EMBEDDED:
        return MeasuredServices(note="not measured: the embedded TPM protects nothing")
    if not config.measures:
        return MeasuredServices(note="not measured: services_pcr is 0")
    folder = boot_dir(config.run_dir)
    if sys.pycache_prefix != os.fspath(folder / CACHE_DIR):
        return MeasuredServices(note="NOT MEASURED: this manager was started without vtpm-managerd")
    try:
        record = read_record(folder)
    except VtpmError as error:
        return MeasuredServices(note=f"NOT MEASURED: {error.message}")
    if record is None or not record.extended:
        return MeasuredServices(note="NOT MEASURED: nothing says that the platform TPM has their measurement")
    return MeasuredServices(
        record.bank, record.pcr, record.running, record.start.hex(), len(record.digests), record.doubt
    )
