"""Event logs built by hand, the recorded ones of tests/vectors/eventlog, and what Hypothesis makes of them. Test code.

Shares no code with the parser: digests and layouts are those of the PC Client Platform Firmware Profile, written anew.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

VECTORS = Path(__file__).parents[2] / "vectors" / "eventlog"
NAMES = ("ovmf_kernel", "ovmf_unified_kernel", "seabios_kernel", "seabios_kernel_tpm12")

SHA1, SHA256, SHA384, SHA512, SM3 = 0x04, 0x0B, 0x0C, 0x0D, 0x12
SIZES = {SHA1: 20, SHA256: 32, SHA384: 48, SHA512: 64, SM3: 32}
HASH_NAMES = {SHA1: "sha1", SHA256: "sha256", SHA384: "sha384", SHA512: "sha512"}

NO_ACTION = 0x03
SEPARATOR = 0x04
APPLICATION = 0x8000_0003

Digests = Iterable[tuple[int, bytes]]


@dataclass(frozen=True)
class Vector:
    """A recorded log, and what every PCR held when it was read: bank -> index -> value."""

    log: bytes
    pcrs: dict[str, dict[int, bytes]]


def vector(name: str) -> Vector:
    """One of NAMES."""
    banks = json.loads((VECTORS / f"{name}.json").read_text())["pcrs"]
    pcrs = {bank: {int(pcr): bytes.fromhex(value) for pcr, value in held.items()} for bank, held in banks.items()}
    return Vector((VECTORS / f"{name}.bin").read_bytes(), pcrs)


def sha1_event(pcr: int, event_type: int, digest: bytes, data: bytes) -> bytes:
    """A TCG_PCClientPCREvent."""
    return struct.pack("<II20sI", pcr, event_type, digest, len(data)) + data


def spec_id(
    algorithms: Iterable[tuple[int, int]] = ((SHA256, 32),),
    *,
    version: tuple[int, int] = (2, 0),
    count: int | None = None,
    vendor: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """The first event of a crypto-agile log; algorithms are pairs of TPM_ALG_ID and size in bytes."""
    pairs = list(algorithms)
    major, minor = version
    data = struct.pack("<16sIBBBB", b"Spec ID Event03", 0, minor, major, 0, 2)
    data += struct.pack("<I", len(pairs) if count is None else count)
    data += b"".join(struct.pack("<HH", *pair) for pair in pairs)
    data += bytes([len(vendor)]) + vendor + after
    return sha1_event(0, NO_ACTION, bytes(20), data)


def event(pcr: int, event_type: int, digests: Digests, data: bytes = b"", *, count: int | None = None) -> bytes:
    """A TCG_PCR_EVENT2."""
    pairs = list(digests)
    head = struct.pack("<III", pcr, event_type, len(pairs) if count is None else count)
    listed = b"".join(struct.pack("<H", algorithm) + digest for algorithm, digest in pairs)
    return head + listed + struct.pack("<I", len(data)) + data


def startup_locality(locality: bytes, pcr: int = 0, algorithm: int = SHA256) -> bytes:
    """A StartupLocality event in a log of one bank; `locality` is what follows the signature."""
    data = b"StartupLocality\0" + locality
    return event(pcr, NO_ACTION, [(algorithm, bytes(SIZES[algorithm]))], data)


@dataclass(frozen=True)
class BuiltLog:
    """A log and what it was built from: events as (pcr, type, digests by algorithm, data)."""

    log: bytes
    algorithms: tuple[int, ...]
    events: list[tuple[int, int, dict[int, bytes], bytes]]
    locality: int


@st.composite
def built_logs(draw: st.DrawFn) -> BuiltLog:
    """Crypto-agile logs of one to four banks, one of which may be unknown to the parser, from any startup locality."""
    algorithms = tuple(draw(st.lists(st.sampled_from(list(SIZES)), min_size=1, max_size=4, unique=True)))
    types = st.sampled_from([NO_ACTION, SEPARATOR, APPLICATION, 0x0D, 0xFFFF_FFFF])
    events: list[tuple[int, int, dict[int, bytes], bytes]] = []
    locality = draw(st.sampled_from([None, 0, 3, 4]))
    if locality is not None:
        nothing = {algorithm: bytes(SIZES[algorithm]) for algorithm in algorithms}
        events.append((0, NO_ACTION, nothing, b"StartupLocality\0" + bytes([locality])))
    # Hypothesis finds the signature in the source and would put in another one.
    datas = st.binary(max_size=30).filter(lambda data: not data.startswith(b"StartupLocality\0"))
    for _ in range(draw(st.integers(0, 6))):
        event_type = draw(types)
        pcr = draw(st.integers(0, 2**32 - 1) if event_type == NO_ACTION else st.integers(0, 23))
        order = draw(st.permutations(algorithms))
        digests = {algorithm: draw(st.binary(min_size=size, max_size=size)) for algorithm, size in _sizes(order)}
        events.append((pcr, event_type, digests, draw(datas)))
    log = spec_id(_sizes(algorithms), vendor=draw(st.binary(max_size=5)))
    return BuiltLog(
        log + b"".join(event(pcr, kind, digests.items(), data) for pcr, kind, digests, data in events),
        algorithms,
        events,
        locality or 0,
    )


def _sizes(algorithms: Iterable[int]) -> list[tuple[int, int]]:
    return [(algorithm, SIZES[algorithm]) for algorithm in algorithms]
