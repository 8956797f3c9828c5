"""The log of launches: what is written is what was extended, and anything else is refused or told."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest

from tests.unit.tpm.log_examples import SHA256, event, spec_id
from vtpm.errors import ConflictError, ProtocolError
from vtpm.tpm.event_log import EventType
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import (
    MAX_ENTRIES,
    TAG_ID,
    Gap,
    Launch,
    LaunchLog,
    Standing,
    decode,
    encode,
    standing,
)

BANK = HashAlgorithm.SHA256
PCR = 12
ONE, TWO = Launch("process", "ab" * 32), Launch("qemu", "cd" * 32)
EMPTY = LaunchLog(BANK, PCR, 7, bytes(32))
BOTH = EMPTY.followed_by(ONE).followed_by(TWO)
TAG = EventType.EV_EVENT_TAG


def extended(value: bytes, launch: Launch) -> bytes:
    """What a PCR holds after a launch, from docs/state-format.md alone."""
    text = f"vtpm launch 1 {launch.kind} {launch.measurement}".encode()
    digest = hashlib.sha256(struct.pack("<II", 0x7674706D, len(text)) + text).digest()
    return hashlib.sha256(value + digest).digest()


def log_with(*events: tuple[int, int, bytes, bytes]) -> bytes:
    """A log whose beginning is in order: PCR, type, digest and data of each event."""
    written = [event(pcr, kind, [(SHA256, digest)], data) for pcr, kind, digest, data in events]
    return encode(EMPTY) + b"".join(written)


def test_log_comes_back_when_read() -> None:
    log = replace(BOTH, start=b"s" * 32).followed_by(Gap(b"g" * 32)).followed_by(ONE)
    for bank in (BANK, HashAlgorithm.SHA384):
        size = bank.digest_bytes
        entries = tuple(Gap(bytes(size)) if isinstance(entry, Gap) else entry for entry in log.entries)
        other = LaunchLog(bank, 14, 2**32 - 1, b"s" * size, entries)
        assert decode(encode(other), bank, 14) == other
    assert decode(encode(log), BANK, PCR) == log


def test_value_is_the_replay_of_the_launches_when_computed() -> None:
    assert EMPTY.value == bytes(32)
    assert BOTH.value == extended(extended(bytes(32), ONE), TWO)
    gap = BOTH.followed_by(Gap(b"g" * 32))
    assert gap.value == b"g" * 32
    assert gap.followed_by(ONE).value == extended(b"g" * 32, ONE)


def test_pcr_vouches_for_nothing_before_a_gap_when_asked_what_was_measured() -> None:
    assert BOTH.measured == {ONE, TWO}
    gap = BOTH.followed_by(Gap(b"g" * 32))
    assert (gap.measured, gap.gaps) == (frozenset(), 1)
    assert gap.followed_by(TWO).measured == {TWO}


def test_standing_says_whether_the_last_launch_is_still_to_be_extended() -> None:
    one = EMPTY.followed_by(ONE)
    assert standing(BOTH, BOTH.value) is Standing.CURRENT
    assert standing(BOTH, one.value) is Standing.PENDING
    assert standing(BOTH, bytes(32)) is Standing.OTHER
    assert standing(EMPTY, b"x" * 32) is Standing.OTHER
    assert standing(one.followed_by(Gap(b"g" * 32)), one.value) is Standing.OTHER


def test_log_takes_so_many_entries_and_no_more_when_it_grows() -> None:
    log = replace(EMPTY, entries=(ONE,) * (MAX_ENTRIES - 1)).followed_by(TWO)
    assert decode(encode(log), BANK, PCR) == log
    with pytest.raises(ConflictError, match=f"{MAX_ENTRIES} launches"):
        log.followed_by(ONE)
    with pytest.raises(ProtocolError, match="more than"):
        decode(encode(replace(log, entries=(*log.entries, ONE))), BANK, PCR)


@pytest.mark.parametrize(
    ("kind", "measurement"),
    [
        ("", "ab" * 32),
        ("Process", "ab" * 32),
        ("a" * 17, "ab" * 32),
        ("a b", "ab" * 32),
        ("process", "AB" * 32),
        ("process", "ab" * 31),
        ("process", "ab" * 32 + "\n"),
    ],
)
def test_launch_is_refused_when_kind_or_measurement_is_of_another_form(kind: str, measurement: str) -> None:
    with pytest.raises(ProtocolError, match="are no kind and measurement"):
        Launch(kind, measurement)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut off"),
        (spec_id([(SHA256, 32)]), "is no launch log"),
        (encode(EMPTY)[:-1], "cut off"),
        (encode(EMPTY).replace(b"vtpm launches 1", b"vtpm launches 2"), "is no launch log"),
        (encode(LaunchLog(HashAlgorithm.SHA384, PCR, 7, bytes(48))), "is no launch log of the bank sha256"),
        (encode(replace(BOTH, pcr=13)), "is of PCR 13, not 12"),
        (log_with((PCR, TAG, bytes(32), ONE.data)), "is not what its digest says"),
        (log_with((PCR, TAG, ONE.digest(BANK), TWO.data)), "is not what its digest says"),
        (log_with((PCR, TAG, ONE.digest(BANK), b"\0" * 8 + ONE.data[8:])), "is not what its digest says"),
        (log_with((PCR, TAG, bytes(32), b"something")), "is no launch"),
        (log_with((PCR, EventType.EV_IPL, ONE.digest(BANK), ONE.data)), "is no launch"),
        (log_with((PCR, EventType.EV_NO_ACTION, bytes(32), bytes(32))), "says nothing that is known"),
        (log_with((PCR, EventType.EV_NO_ACTION, bytes(32), b"vtpm gap 1\0" + bytes(31))), "says nothing that is known"),
    ],
)
def test_log_is_refused_when_it_is_not_one_of_launches(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        decode(data, BANK, PCR)


def test_event_is_a_tagged_one_when_written() -> None:
    assert struct.unpack("<II", ONE.data[:8]) == (TAG_ID, len(ONE.data) - 8)
    assert ONE.data[8:] == b"vtpm launch 1 process " + b"ab" * 32
