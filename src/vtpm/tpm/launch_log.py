"""The log of what launched in this boot: written as a TCG event log, read back, and held against its PCR.

Pure; for the keeper, which writes it, and for whoever checks it. docs/state-format.md, "Launch log".

One event for each distinct measurement, extended into one PCR of one bank. `tpm2_eventlog` replays the log to what the
PCR holds where that began at zero and nothing else extended it. What else did so is in the log too, as a gap: an event
that extends nothing and says what the PCR held.

The Spec ID event's vendorInfo says which boot the log is of, by the TPM's count of resets, and what the PCR held when
the log began. An EV_NO_ACTION would do, but tpm2_eventlog 5.4 replays those as if they extended.

Source: TCG PC Client Platform Firmware Profile Specification (PFP), Family 2.0, version 1.05, revision 23, section 10:
TCG_EfiSpecIDEvent, TCG_PCR_EVENT2, EV_EVENT_TAG with a TCG_PCClientTaggedEvent.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
import struct
from dataclasses import dataclass

from vtpm.errors import ConflictError, ProtocolError
from vtpm.tpm.event_log import Event, EventLog, EventType, parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm, extend

MAX_ENTRIES = 256
"""Of one log: distinct measurements and gaps of one boot."""
TAG_ID = 0x7674706D
"""taggedEventID of a launch: "vtpm"."""
_LAUNCH = re.compile(rb"vtpm launch 1 ([a-z][a-z0-9-]{0,15}) ([0-9a-f]{64})")
_SPEC_ID = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1)
"""Signature, platformClass, version 2.0, errata, uintnSize, one algorithm."""
_START = b"vtpm launches 1\0"
_GAP = b"vtpm gap 1\0"
_TAG = struct.Struct("<II")
_RESET_COUNT = struct.Struct("<I")


@dataclass(frozen=True, order=True)
class Launch:
    """What was launched.

    Args:
        kind: of domain, such as "qemu".
        measurement: SHA-256 over all that it runs, in hex.
    Raises:
        ProtocolError: not of this form.
    """

    kind: str
    measurement: str

    def __post_init__(self) -> None:
        if _LAUNCH.fullmatch(self._text) is None:
            raise ProtocolError(f"{self.kind[:32]!r} and {self.measurement[:80]!r} are no kind and measurement")

    @property
    def _text(self) -> bytes:
        return f"vtpm launch 1 {self.kind} {self.measurement}".encode()

    @property
    def data(self) -> bytes:
        """Data of its event: a TCG_PCClientTaggedEvent with the text "vtpm launch 1 KIND MEASUREMENT"."""
        return _TAG.pack(TAG_ID, len(self._text)) + self._text

    def digest(self, bank: HashAlgorithm) -> bytes:
        """Return what is extended: the bank's hash of `data`."""
        return hashlib.new(bank, self.data).digest()


@dataclass(frozen=True)
class Gap:
    """What the PCR was found to hold although the log led elsewhere: something else extended it."""

    held: bytes


@dataclass(frozen=True)
class LaunchLog:
    """See the module.

    Args:
        bank, pcr: where to.
        reset_count: of the TPM when the log began; another one means that the PCR began anew.
        start: what the PCR held then.
        entries: in order.
    """

    bank: HashAlgorithm
    pcr: int
    reset_count: int
    start: bytes
    entries: tuple[Launch | Gap, ...] = ()

    @property
    def value(self) -> bytes:
        """What the PCR holds if the log is true. Spec: TPM 2.0 Part 3 (revision 1.59), TPM2_PCR_Extend."""
        value = self.start
        for entry in self.entries:
            value = entry.held if isinstance(entry, Gap) else extend(self.bank, value, entry.digest(self.bank))
        return value

    @property
    def measured(self) -> frozenset[Launch]:
        """Launches that the PCR vouches for, if it holds `value`: those after the last gap."""
        last = max((number for number, entry in enumerate(self.entries) if isinstance(entry, Gap)), default=-1)
        return frozenset(entry for entry in self.entries[last + 1 :] if isinstance(entry, Launch))

    @property
    def gaps(self) -> int:
        """How often something else was found to have extended the PCR."""
        return sum(isinstance(entry, Gap) for entry in self.entries)

    def followed_by(self, entry: Launch | Gap) -> LaunchLog:
        """Return the log with one more entry. Raises ConflictError: it has MAX_ENTRIES."""
        if len(self.entries) == MAX_ENTRIES:
            raise ConflictError(
                f"PCR {self.pcr} was extended for {MAX_ENTRIES} launches in this boot, which is the most",
                next_step="Reboot",
            )
        return dataclasses.replace(self, entries=(*self.entries, entry))


class Standing(enum.Enum):
    """How a log stands to its PCR."""

    CURRENT = "the PCR holds what the log leads to"
    PENDING = "the last launch is in the log, and not in the PCR yet"
    OTHER = "the PCR holds something else"


def standing(log: LaunchLog, held: bytes) -> Standing:
    """Return how a log stands to what its PCR holds: the entry is written first, so a crash leaves it pending."""
    if log.value == held:
        return Standing.CURRENT
    if log.entries and isinstance(log.entries[-1], Launch):
        before = dataclasses.replace(log, entries=log.entries[:-1])
        if before.value == held:
            return Standing.PENDING
    return Standing.OTHER


def encode(log: LaunchLog) -> bytes:
    """Return the log as a crypto-agile event log."""
    vendor_info = _START + _RESET_COUNT.pack(log.reset_count) + log.start
    spec_id = _SPEC_ID + struct.pack("<HH", log.bank.identifier, log.bank.digest_bytes)
    spec_id += bytes([len(vendor_info)]) + vendor_info
    # A TCG_PCClientPCREvent of PCR 0 with a SHA-1 digest of zeros.
    head = struct.pack("<II20sI", 0, EventType.EV_NO_ACTION, b"", len(spec_id)) + spec_id
    return head + b"".join(_event(log, entry) for entry in log.entries)


def _event(log: LaunchLog, entry: Launch | Gap) -> bytes:
    if isinstance(entry, Gap):
        event_type, digest, data = EventType.EV_NO_ACTION, bytes(log.bank.digest_bytes), _GAP + entry.held
    else:
        event_type, digest, data = EventType.EV_EVENT_TAG, entry.digest(log.bank), entry.data
    head = struct.pack("<IIIH", log.pcr, event_type, 1, log.bank.identifier)
    return head + digest + len(data).to_bytes(4, "little") + data


def decode(data: bytes, bank: HashAlgorithm, pcr: int) -> LaunchLog:
    """Return the log in `data`.

    Args:
        bank, pcr: that it must be of.
    Raises:
        ProtocolError: it is no log of launches, of another PCR or bank, or an event is not what its digest says.
    """
    events = parse_event_log(data)
    reset_count, start = _start(events, bank)
    if len(events.events) > MAX_ENTRIES:
        raise ProtocolError(f"the launch log has more than {MAX_ENTRIES} entries")
    return LaunchLog(bank, pcr, reset_count, start, tuple(_entry(event, bank, pcr) for event in events.events))


def _start(events: EventLog, bank: HashAlgorithm) -> tuple[int, bytes]:
    info = events.vendor_info
    length = len(_START) + _RESET_COUNT.size
    if events.banks != (bank,) or len(info) != length + bank.digest_bytes or not info.startswith(_START):
        raise ProtocolError(f"this is no launch log of the bank {bank}")
    (reset_count,) = _RESET_COUNT.unpack_from(info, len(_START))
    return reset_count, info[length:]


def _entry(event: Event, bank: HashAlgorithm, pcr: int) -> Launch | Gap:
    if event.pcr != pcr:
        raise ProtocolError(f"event {event.number} of the launch log is of PCR {event.pcr}, not {pcr}")
    if not event.extends:
        held = event.data.removeprefix(_GAP)
        if len(held) != bank.digest_bytes or len(event.data) == len(held):
            raise ProtocolError(f"event {event.number} of the launch log says nothing that is known")
        return Gap(held)
    match = _LAUNCH.fullmatch(event.data[_TAG.size :])
    if event.type != EventType.EV_EVENT_TAG or match is None:
        raise ProtocolError(f"event {event.number} of the launch log is no launch")
    launch = Launch(match[1].decode(), match[2].decode())
    if event.data != launch.data or event.digests[bank] != launch.digest(bank):
        raise ProtocolError(f"event {event.number} of the launch log is not what its digest says")
    return launch
