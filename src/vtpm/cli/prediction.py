"""PCR values of the next boot, from those of now and what the operator says will change. For the commands of policy.

The event log of this boot, where one is needed, must account for what the PCRs hold.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import ConflictError, ProtocolError, UnavailableError, UsageError
from vtpm.wire.api import MeasuredServices, Policy

EVENT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
BOOT_LOADER_PCR = 4
_MEASURE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Changes:
    """What will be another.

    Args:
        pcrs: words N=HEX, values that PCRs will hold.
        extends: words N=HEX, digests that will be extended.
        services: whether they will be those that are installed with this command.
        efi: words OLD=NEW, files of EFI applications that the firmware starts.
        event_log: of this boot.
    """

    pcrs: tuple[str, ...] = ()
    extends: tuple[str, ...] = ()
    services: bool = False
    efi: tuple[str, ...] = ()
    event_log: Path = EVENT_LOG


def pcr_indexes(selection: str) -> list[int]:
    """Return the PCRs of a selection such as "sha256:0,2,4,7", in its order."""
    return [int(index) for index in selection.partition(":")[2].split(",")]


def predicted(state: Policy, changes: Changes, measured: MeasuredServices | None = None) -> list[str]:
    """Return the values, hex in the selection's order, that follow from those of now and the changes.

    Args:
        measured: what is known of the services of now, for `changes.services`.
    Raises:
        UsageError: a word is not of its form, names a PCR that is not in the selection, or a file that cannot be read.
        ConflictError: what the services' PCR holds before they are measured is not known.
        UnavailableError: the services that are installed cannot be measured.
        PlatformTpmError: the event log does not account for what the PCRs hold.
    """
    from vtpm.tpm.hash_algorithms import HashAlgorithm, extend

    bank = HashAlgorithm(state.selection.partition(":")[0])
    now = zip(pcr_indexes(state.selection), state.current, strict=True)
    values = {index: bytes.fromhex(value) for index, value in now}
    if changes.efi:
        values[BOOT_LOADER_PCR] = _with_other_applications(changes, bank, values)
    if changes.services:
        index, value = _with_installed_services(measured, bank, values)
        values[index] = value
    for index, value in (_assignment("--pcr", word, values) for word in changes.pcrs):
        values[index] = value
    for index, value in (_assignment("--extend", word, values) for word in changes.extends):
        values[index] = extend(bank, values[index], value)
    return [value.hex() for value in values.values()]


def _with_other_applications(changes: Changes, bank: str, values: Mapping[int, bytes]) -> bytes:
    from vtpm.tpm.event_log import parse_event_log
    from vtpm.tpm.hash_algorithms import HashAlgorithm
    from vtpm.tpm.pcr_prediction import Replacement, predict_pcrs

    algorithm = HashAlgorithm(bank)
    if BOOT_LOADER_PCR not in values:
        raise UsageError(f"--efi changes PCR {BOOT_LOADER_PCR}, which the root key is not sealed under")
    replacements = []
    for word in changes.efi:
        old, found, new = word.partition("=")
        if not found:
            raise UsageError(f"--efi {word}: not of the form OLD=NEW, two files")
        digests = [_application_digest(Path(path), algorithm) for path in (old, new)]
        replacements.append(Replacement(BOOT_LOADER_PCR, *digests))
    try:
        log = parse_event_log(changes.event_log.read_bytes())
    except OSError as error:
        raise UsageError(
            f"the event log {changes.event_log} cannot be read: {error.strerror}", next_step="Name it with --event-log"
        ) from error
    except ProtocolError as error:
        raise UsageError(f"{changes.event_log} is no event log: {error.message}") from error
    held = {BOOT_LOADER_PCR: values[BOOT_LOADER_PCR]}
    return predict_pcrs(log, algorithm, held, replacements).values[BOOT_LOADER_PCR]


def _with_installed_services(
    measured: MeasuredServices | None, bank: str, values: Mapping[int, bytes]
) -> tuple[int, bytes]:
    """Return the services' PCR, and what it will hold once those installed here were started after a reboot."""
    import subprocess

    from vtpm.measurement.record import predict

    if measured is None or not measured.pcr:
        raise UsageError("--services: the services of this host are not measured", next_step="See vtpm status")
    if measured.note:
        raise ConflictError(f"--services: what the PCR holds after a reboot is not known: {measured.note}")
    if measured.bank != bank:
        raise UsageError(f"--services: they are measured into {measured.bank}, and the root key is sealed under {bank}")
    if measured.pcr not in values:
        raise UsageError(f"--services changes PCR {measured.pcr}, which the root key is not sealed under")
    # In an interpreter that is started as services are: this one's import path may have more.
    done = subprocess.run(
        [sys.executable, "-I", "-m", "vtpm.measurement.closure"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_MEASURE_TIMEOUT_S,
    )
    if done.returncode:
        raise UnavailableError(f"the services installed here cannot be measured: {done.stderr.strip()[-500:]}")
    return measured.pcr, predict(bank, bytes.fromhex(measured.start), (done.stdout.strip(),))


def _application_digest(path: Path, algorithm: str) -> bytes:
    from vtpm.tpm.authenticode import authenticode_digest
    from vtpm.tpm.hash_algorithms import HashAlgorithm

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            view = memoryview(image)
            try:
                return authenticode_digest(view, HashAlgorithm(algorithm))
            finally:
                view.release()
    except (OSError, ValueError) as error:
        raise UsageError(f"the EFI application {path} cannot be read: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path} is no EFI application that can be measured: {error.message}") from error


def _assignment(option: str, word: str, values: Mapping[int, bytes]) -> tuple[int, bytes]:
    number, _, text = word.partition("=")
    if not number.isdecimal() or int(number) not in values:
        known = ", ".join(map(str, values))
        raise UsageError(f"{option} {word}: not one of the PCRs that the root key is sealed under ({known})")
    wanted = len(next(iter(values.values())))
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != wanted:
        raise UsageError(f"{option} {word}: the value must have {2 * wanted} hexadecimal digits")
    return int(number), value
