"""Measures the services once in each boot, and again when they are others. For the starter alone."""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from vtpm.config import Config
from vtpm.errors import AccessDeniedError, PlatformTpmError, ProtocolError, UnavailableError
from vtpm.measurement.closure import Closure, find_closure, measurement_of
from vtpm.measurement.digest import Contents
from vtpm.measurement.record import (
    Extension,
    Library,
    Record,
    event_digest,
    plan,
    read_contents,
    read_record,
    write_contents,
    write_record,
)
from vtpm.starter.pcr import DirectPcr, KeeperPcr, ServicesPcr, keeper_lock
from vtpm.wire.keeper import PcrState
from vtpm.wire.service_lock import ServiceLock

CHECK_TIMEOUT_S = 0.5
"""How long services that were measured in this boot wait for a keeper that is asked if its TPM agrees."""
MEASURE_TIMEOUT_S = 30.0
_log = logging.getLogger("vtpm.starter")


class Asked(enum.Enum):
    """Who has the platform TPM."""

    KEEPER = "the keeper"
    TPM = "nobody"


def measure_services(config: Config, folder: Path) -> Asked:
    """See that what this interpreter's services execute is in the PCR; extend it where it is not yet.

    Where that cannot be done the services are not to be started, for they could say themselves what they are: whoever
    reaches the platform TPM can extend the PCR. But those that were seen to be in it go on without it.

    Args:
        config: of this start.
        folder: this boot's.
    Returns:
        who was asked.
    Raises:
        ConflictError: a manager serves here already, or the keeper has another PCR.
        UnavailableError, PlatformTpmError: the TPM or the keeper does not answer; or the software cannot be read.
    """
    with contextlib.ExitStack() as stack:
        # Until the manager takes it: two starts at once must not both extend.
        stack.callback(ServiceLock(config.run_dir, "manager").release)
        before = _last_record(folder)
        closure, digest = _digest(folder, before)
        known = before is not None and before.extended and before.fingerprint == closure.fingerprint
        lock = keeper_lock(config.run_dir)
        if lock is not None:
            stack.callback(lock.release)
        asked = Asked.KEEPER if lock is None else Asked.TPM
        try:
            timeout_s = CHECK_TIMEOUT_S if known else MEASURE_TIMEOUT_S
            pcr: ServicesPcr = KeeperPcr(config, timeout_s) if asked is Asked.KEEPER else DirectPcr(config)
            stack.callback(pcr.close)
            state = pcr.read()
        except (PlatformTpmError, UnavailableError) as error:
            if not known:
                raise
            _log.error("the services, which were measured in this boot, start without the platform TPM: %s", error)
        else:
            _settle(pcr, state, folder, before, closure, digest, asked)
        return asked


def _last_record(folder: Path) -> Record | None:
    try:
        return read_record(folder)
    except (AccessDeniedError, ProtocolError, UnavailableError) as error:
        _log.error("the services are measured again: %s", error)
        return None


def _last_contents(folder: Path) -> Contents:
    try:
        return read_contents(folder)
    except (AccessDeniedError, ProtocolError, UnavailableError) as error:
        _log.error("all files of the services are read again: %s", error)
        return {}


def _digest(folder: Path, before: Record | None) -> tuple[Closure, str]:
    """Return what would run and its measurement, for which files are read that are new or may have changed."""
    last = None
    if before is not None:
        last = {library.name: Path(library.place) for library in before.libraries}, before.fingerprint
    closure = find_closure(last)
    if before is not None and closure.fingerprint == before.fingerprint:
        return closure, before.running
    known = _last_contents(folder) if before is not None else {}
    contents = closure.contents(known)
    _drop_compiled(closure, known, contents)
    if find_closure((closure.libraries, closure.fingerprint)).fingerprint != closure.fingerprint:
        raise UnavailableError(
            "the services' files are changing while they are measured", next_step="Start again when that has ended"
        )
    write_contents(folder, contents)
    return closure, measurement_of(contents)


def _drop_compiled(closure: Closure, known: Contents, contents: Contents) -> None:
    """Remove compiled files of modules that changed: Python takes one whose source has its time and size."""
    if sys.pycache_prefix is None:
        return
    for name, place in closure.files.items():
        if place.suffix == ".py" and known.get(name, ("", ""))[1] != contents[name][1]:
            Path(importlib.util.cache_from_source(os.fspath(place))).unlink(missing_ok=True)


def _settle(
    pcr: ServicesPcr, state: PcrState, folder: Path, before: Record | None, closure: Closure, digest: str, asked: Asked
) -> None:
    libraries = tuple(Library(name, str(place)) for name, place in sorted(closure.libraries.items()))
    now = Record(
        state.bank,
        state.pcr,
        state.reset_count,
        state.value,
        (digest,),
        digest,
        closure.fingerprint,
        libraries,
        doubt="",
        extended=False,
    )
    record, extension = plan(before, now, served=asked is Asked.KEEPER)
    if record != before:
        write_record(folder, record)
    if record.doubt and (before is None or record.doubt != before.doubt):
        _log.error("%s. A root key that is sealed under this PCR does not open in this boot", record.doubt)
    if extension is Extension.DONE:
        return
    _log.info("measured into PCR %d of %s, which held %s: vtpm services 1 %s", state.pcr, state.bank,
              state.value.hex(), digest)  # fmt: skip
    if len(record.digests) > 1:
        _log.warning(
            "other services than at the start of this boot: once the keeper ends, the root key opens only if that is "
            "allowed. Before a reboot: vtpm policy allow LABEL --services"
        )
    if pcr.extend(event_digest(state.bank, digest)).value != record.value():
        raise PlatformTpmError(
            f"PCR {state.pcr} was extended by somebody else while the services were measured",
            next_step="Find out who does, and reboot",
        )
    write_record(folder, replace(record, extended=True))
