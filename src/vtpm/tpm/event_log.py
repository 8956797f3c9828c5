"""The firmware's log of what it measured into PCRs: bounded parser, and replay to the values that follow from it.

Pure; may be imported by everyone. Reads `/sys/kernel/security/tpm0/binary_bios_measurements`.

A log is a claim: whoever runs the operating system can write another. What may be believed, after `check_replay`
against PCRs that the TPM itself gave (a quote, or an authenticated read), is for each PCR the digests and their order.
Types and data are not covered by that, except where `Event.digest_is_of_data`.

Source: TCG PC Client Platform Firmware Profile Specification (PFP), Family 2.0, version 1.05, revision 23, section 10.
Event types also from revision 1.06.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from vtpm.errors import PlatformTpmError, ProtocolError, UsageError
from vtpm.tpm.hash_algorithms import BY_IDENTIFIER, HashAlgorithm, extend, refuse_sha1
from vtpm.tpm.types import Locality

MAX_LOG_BYTES = 1 << 20
"""Bound on a whole log. Those of real machines are below 128 KiB; a vTPM's OVMF writes 5 KiB."""

MAX_EVENTS = 8192

MAX_ALGORITHMS = 16
"""Bound on the banks of a log; TPML_DIGEST_VALUES of real TPMs holds at most five."""

PCR_COUNT = 24
"""PCRs of a PC Client platform TPM."""

_MAX_DIGEST_BYTES = 64
_SPEC_ID_SIGNATURE = b"Spec ID Event03\0"
_SPEC_ID = struct.Struct("<16sIBBBBI")
_SPEC_VERSION = (2, 0)
_STARTUP_LOCALITY_SIGNATURE = b"StartupLocality\0"
_STARTUP_LOCALITIES = frozenset({0, 3, 4})
_DYNAMIC_LAUNCH_PCRS = range(17, 23)


class EventType(enum.IntEnum):
    """TCG_EVENTTYPE. Spec: PFP 10.4.1; the SPDM types are those of revision 1.06."""

    EV_PREBOOT_CERT = 0x00
    EV_POST_CODE = 0x01
    EV_NO_ACTION = 0x03
    EV_SEPARATOR = 0x04
    EV_ACTION = 0x05
    EV_EVENT_TAG = 0x06
    EV_S_CRTM_CONTENTS = 0x07
    EV_S_CRTM_VERSION = 0x08
    EV_CPU_MICROCODE = 0x09
    EV_PLATFORM_CONFIG_FLAGS = 0x0A
    EV_TABLE_OF_DEVICES = 0x0B
    EV_COMPACT_HASH = 0x0C
    EV_IPL = 0x0D
    EV_IPL_PARTITION_DATA = 0x0E
    EV_NONHOST_CODE = 0x0F
    EV_NONHOST_CONFIG = 0x10
    EV_NONHOST_INFO = 0x11
    EV_OMIT_BOOT_DEVICE_EVENTS = 0x12
    EV_POST_CODE2 = 0x13
    EV_EFI_VARIABLE_DRIVER_CONFIG = 0x8000_0001
    EV_EFI_VARIABLE_BOOT = 0x8000_0002
    EV_EFI_BOOT_SERVICES_APPLICATION = 0x8000_0003
    EV_EFI_BOOT_SERVICES_DRIVER = 0x8000_0004
    EV_EFI_RUNTIME_SERVICES_DRIVER = 0x8000_0005
    EV_EFI_GPT_EVENT = 0x8000_0006
    EV_EFI_ACTION = 0x8000_0007
    EV_EFI_PLATFORM_FIRMWARE_BLOB = 0x8000_0008
    EV_EFI_HANDOFF_TABLES = 0x8000_0009
    EV_EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000_000A
    EV_EFI_HANDOFF_TABLES2 = 0x8000_000B
    EV_EFI_VARIABLE_BOOT2 = 0x8000_000C
    EV_EFI_GPT_EVENT2 = 0x8000_000D
    EV_EFI_HCRTM_EVENT = 0x8000_0010
    EV_EFI_VARIABLE_AUTHORITY = 0x8000_00E0
    EV_EFI_SPDM_FIRMWARE_BLOB = 0x8000_00E1
    EV_EFI_SPDM_FIRMWARE_CONFIG = 0x8000_00E2
    EV_EFI_SPDM_DEVICE_POLICY = 0x8000_00E3
    EV_EFI_SPDM_DEVICE_AUTHORITY = 0x8000_00E4


_TYPE_NAMES = {int(event_type): event_type.name for event_type in EventType}


class LogFormat(enum.Enum):
    """How a log is written."""

    CRYPTO_AGILE = "TCG_PCR_EVENT2"
    """A digest of each event for every bank. Spec: PFP 10.2.2, 10.4.5.1."""
    SHA1_ONLY = "TCG_PCClientPCREvent"
    """The older form, of TPM 1.2 and of firmware that knows no other bank. Nothing may rest on it. Spec: PFP 10.2.1."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Args:
        number: its place in the log, from 0; the Spec ID event of a crypto-agile log has 0 and is no `Event`.
        pcr: the PCR that was extended, below PCR_COUNT; any u32 when nothing was.
        type: an `EventType`, or a number that is none.
        digests: what was extended, for every bank of the log.
        data: what the log says was measured, or a description of it.
    """

    number: int
    pcr: int
    type: int
    digests: Mapping[HashAlgorithm, bytes]
    data: bytes

    @property
    def extends(self) -> bool:
        """Whether a PCR was extended; EV_NO_ACTION only tells. Spec: PFP 10.4.1."""
        return self.type != EventType.EV_NO_ACTION

    @property
    def type_name(self) -> str:
        """Return `EV_SEPARATOR`, or the number in hexadecimal when it has no name here."""
        return _TYPE_NAMES.get(self.type, f"0x{self.type:08x}")

    def digest_is_of_data(self, bank: HashAlgorithm) -> bool:
        """Whether the data itself was measured, so that a log which replays right vouches for it too.

        Args:
            bank: one of the log's; not SHA-1 if anything is to rest on it.
        """
        return hashlib.new(bank, self.data, usedforsecurity=False).digest() == self.digests[bank]


@dataclass(frozen=True, slots=True)
class EventLog:
    """A whole log.

    Args:
        format: how it is written.
        banks: algorithms with a digest in every event, in the log's order. Others that this program does not know may
            have been in the log; their digests are dropped.
        events: in order, without the Spec ID event.
        startup_locality: from which TPM2_Startup was sent; 4 after an H-CRTM sequence.
        vendor_info: what the Spec ID event has for whoever wrote the log. Spec: PFP 10.4.5.1.
    """

    format: LogFormat
    banks: tuple[HashAlgorithm, ...]
    events: tuple[Event, ...]
    startup_locality: Locality
    vendor_info: bytes = b""

    def require_policy_bank(self, bank: HashAlgorithm) -> None:
        """Refuse a bank on which no policy may rest.

        Raises:
            UsageError: SHA-1 was asked for.
            PlatformTpmError: the log is SHA-1 only, or has no digests of this bank.
        """
        refuse_sha1(bank)
        if self.format is LogFormat.SHA1_ONLY:
            raise PlatformTpmError(
                "the event log is SHA-1 only: no policy may rest on it",
                next_step="Switch the TPM to 2.0 and its SHA-256 bank on in the firmware's set-up",
            )
        self._require_bank(bank)

    def start_value(self, bank: HashAlgorithm, pcr: int) -> bytes:
        """Return what a PCR held before the first event of this log.

        The locality of TPM2_Startup stands in the last byte of PCR 0. PCRs 17 to 22 hold ones until a dynamic launch
        sets them to zero, before it measures: so they begin with zero if they are in the log, and with ones if not.

        Spec: PFP 10.4.5.3 (StartupLocality event); TPM 2.0 Part 3 (revision 1.59), TPM2_Startup; PC Client Platform TPM
        Profile for TPM 2.0 (version 1.05), "PCR Initial and Reset Values".
        """
        if pcr in _DYNAMIC_LAUNCH_PCRS and not any(event.extends and event.pcr == pcr for event in self.events):
            return b"\xff" * bank.digest_bytes
        locality = self.startup_locality if pcr == 0 else 0
        return locality.to_bytes(bank.digest_bytes, "big")

    def replay(self, bank: HashAlgorithm) -> dict[int, bytes]:
        """Return the values that the log leads to, of the PCRs that it extends.

        SHA-1 is replayed too, to look at; `check_replay` and `predict_pcrs` refuse it.

        Raises:
            PlatformTpmError: the log has no digests of this bank.
        Spec: PFP 10.2 (what is logged is what was extended); TPM 2.0 Part 3 (revision 1.59), TPM2_PCR_Extend.
        """
        self._require_bank(bank)
        values: dict[int, bytes] = {}
        for event in self.events:
            if event.extends:
                value = values.get(event.pcr) or self.start_value(bank, event.pcr)
                values[event.pcr] = extend(bank, value, event.digests[bank])
        return values

    def _require_bank(self, bank: HashAlgorithm) -> None:
        if bank not in self.banks:
            banks = ", ".join(self.banks) or "none that is known"
            raise PlatformTpmError(f"the event log has no digests of the bank {bank}; it has: {banks}")


def check_replay(log: EventLog, bank: HashAlgorithm, held: Mapping[int, bytes]) -> None:
    """Check that a log accounts for what the TPM holds; only then may its digests be believed.

    Args:
        log: the log.
        bank: not SHA-1.
        held: values of the PCRs that matter, from the TPM itself, by index; at least one.
    Raises:
        UsageError: SHA-1 was asked for, or there is no PCR to check against.
        PlatformTpmError: the log is unfit for a policy, or leads to another value of some PCR.
    """
    log.require_policy_bank(bank)
    if not held:
        raise UsageError("an event log is believed only against at least one PCR, and none was given")
    replayed = log.replay(bank)
    for pcr, value in sorted(held.items()):
        if value != (replayed.get(pcr) or log.start_value(bank, pcr)):
            raise PlatformTpmError(
                f"the event log does not account for PCR {pcr} of the bank {bank}: it leads to another value than the "
                "TPM holds",
                next_step="Read both anew; if it stays so, the log was changed or something extended the PCR unlogged",
            )


def parse_event_log(data: bytes) -> EventLog:
    """Read a whole log of either form.

    Every event must have a digest for each algorithm that the Spec ID event announces, once; nothing may follow the
    last event.

    Args:
        data: all of the log, at most MAX_LOG_BYTES.
    Raises:
        ProtocolError: it is malformed, cut off or too large; the message names the event.
    Spec: PFP 10.2.1, 10.2.2, 10.4.5.1.
    """
    if len(data) > MAX_LOG_BYTES:
        raise ProtocolError(f"the event log has {len(data)} bytes; at most {MAX_LOG_BYTES} are read")
    reader = _Reader(data)
    first = _sha1_event(reader)
    if first.extends or not first.data.startswith(_SPEC_ID_SIGNATURE):
        older = [first]
        while reader.start_event():
            older.append(_sha1_event(reader))
        return EventLog(LogFormat.SHA1_ONLY, (HashAlgorithm.SHA1,), tuple(older), Locality(0))
    sizes, vendor_info = _spec_id(first)
    events: list[Event] = []
    while reader.start_event():
        events.append(_agile_event(reader, sizes))
    banks = tuple(BY_IDENTIFIER[identifier] for identifier in sizes if identifier in BY_IDENTIFIER)
    return EventLog(LogFormat.CRYPTO_AGILE, banks, tuple(events), _startup_locality(events), vendor_info)


class _Reader:
    """Takes little-endian fields off the front; refuses to go past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0
        self.event = 0

    @property
    def at_end(self) -> bool:
        return self._offset == len(self._data)

    def start_event(self) -> bool:
        """Begin the next event; False when the log has ended."""
        if self.at_end:
            return False
        self.event += 1
        if self.event >= MAX_EVENTS:
            raise ProtocolError(f"the event log has more than {MAX_EVENTS} events")
        return True

    def take(self, size: int) -> bytes:
        taken = self._data[self._offset : self._offset + size]
        if len(taken) != size:
            raise self.refusal(f"is cut off: {size} bytes are announced, {len(taken)} are there")
        self._offset += size
        return taken

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def refusal(self, why: str) -> ProtocolError:
        return ProtocolError(f"event {self.event} of the event log {why}")


def _sha1_event(reader: _Reader) -> Event:
    """Read a TCG_PCClientPCREvent."""
    pcr, event_type = _head(reader)
    digest = reader.take(HashAlgorithm.SHA1.digest_bytes)
    data = reader.take(reader.u32())
    return Event(reader.event, pcr, event_type, {HashAlgorithm.SHA1: digest}, data)


def _agile_event(reader: _Reader, sizes: Mapping[int, int]) -> Event:
    """Read a TCG_PCR_EVENT2, whose digests are a TPML_DIGEST_VALUES."""
    pcr, event_type = _head(reader)
    count = reader.u32()
    if count != len(sizes):
        raise reader.refusal(f"has {count} digests; the log announces {len(sizes)}")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        identifier = reader.u16()
        if identifier not in sizes:
            raise reader.refusal(f"has a digest of algorithm 0x{identifier:04x}, which the log does not announce")
        if identifier in digests:
            raise reader.refusal(f"has two digests of algorithm 0x{identifier:04x}")
        digests[identifier] = reader.take(sizes[identifier])
    data = reader.take(reader.u32())
    known = {BY_IDENTIFIER[identifier]: digest for identifier, digest in digests.items() if identifier in BY_IDENTIFIER}
    return Event(reader.event, pcr, event_type, known, data)


def _head(reader: _Reader) -> tuple[int, int]:
    pcr, event_type = reader.u32(), reader.u32()
    if event_type != EventType.EV_NO_ACTION and pcr >= PCR_COUNT:
        raise reader.refusal(f"extends PCR {pcr}, which does not exist")
    return pcr, event_type


def _spec_id(event: Event) -> tuple[dict[int, int], bytes]:
    """Return size in bytes of the digests of each algorithm, by TPM_ALG_ID, and vendorInfo of a TCG_EfiSpecIDEvent."""
    reader = _Reader(event.data)
    *_, minor, major, _errata, _uintn, count = _SPEC_ID.unpack(reader.take(_SPEC_ID.size))
    if (major, minor) != _SPEC_VERSION:
        raise ProtocolError(f"the event log is of version {major}.{minor} of its specification; 2.0 can be read")
    if not 1 <= count <= MAX_ALGORITHMS:
        raise ProtocolError(f"the event log announces {count} algorithms; 1 to {MAX_ALGORITHMS} can be read")
    sizes: dict[int, int] = {}
    for _ in range(count):
        identifier, size = reader.u16(), reader.u16()
        if identifier in sizes:
            raise ProtocolError(f"the event log announces algorithm 0x{identifier:04x} twice")
        known = BY_IDENTIFIER.get(identifier)
        if not 1 <= size <= _MAX_DIGEST_BYTES or (known and size != known.digest_bytes):
            raise ProtocolError(f"the event log announces digests of {size} bytes for algorithm 0x{identifier:04x}")
        sizes[identifier] = size
    vendor_info = reader.take(reader.take(1)[0])
    if not reader.at_end:
        raise ProtocolError("the Spec ID event of the event log has bytes after its end")
    return sizes, vendor_info


def _startup_locality(events: list[Event]) -> Locality:
    """Return the locality that the StartupLocality event names; 0 without one."""
    locality: int | None = None
    extended = False
    for event in events:
        if event.pcr != 0:
            continue
        if event.extends:
            extended = True
        elif event.data.startswith(_STARTUP_LOCALITY_SIGNATURE):
            where = f"event {event.number} of the event log names"
            # Only one that comes first can be meant: the start value of PCR 0 does not change afterwards.
            if extended or locality is not None:
                raise ProtocolError(f"{where} the startup locality too late, or again")
            named = event.data[len(_STARTUP_LOCALITY_SIGNATURE) :]
            if len(named) != 1 or named[0] not in _STARTUP_LOCALITIES:
                raise ProtocolError(f"{where} a startup locality that does not exist")
            locality = named[0]
    return Locality(locality or 0)
