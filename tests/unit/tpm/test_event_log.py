"""Event logs: what is read from them, what they lead to, what is refused."""

from __future__ import annotations

import hashlib
import struct

import pytest

from tests.unit.tpm.log_examples import (
    APPLICATION,
    NAMES,
    NO_ACTION,
    SEPARATOR,
    SHA1,
    SHA256,
    SHA384,
    SM3,
    event,
    sha1_event,
    spec_id,
    startup_locality,
    vector,
)
from vtpm.errors import PlatformTpmError, ProtocolError, UsageError
from vtpm.tpm.event_log import MAX_EVENTS, MAX_LOG_BYTES, LogFormat, check_replay, parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm

IMA_PCR = 10
"""Extended by the guest's kernel, which keeps a log of its own."""
DIGEST = b"d" * 32
SHA256_ONLY = [(SHA256, DIGEST)]


def sha256_extended(start: bytes, *digests: bytes) -> bytes:
    value = start
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


@pytest.mark.parametrize("name", NAMES)
def test_replay_gives_what_the_tpm_held_when_firmware_is_real(name: str) -> None:
    recorded = vector(name)
    log = parse_event_log(recorded.log)
    assert [str(bank) for bank in log.banks] == list(recorded.pcrs)
    for bank in log.banks:
        held = recorded.pcrs[bank]
        replayed = log.replay(bank)
        assert set(range(8)) <= replayed.keys()
        expected = {pcr: replayed.get(pcr) or log.start_value(bank, pcr) for pcr in held if pcr != IMA_PCR}
        assert {pcr: value for pcr, value in held.items() if pcr != IMA_PCR} == expected


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("bank", [HashAlgorithm.SHA256, HashAlgorithm.SHA384, HashAlgorithm.SHA512])
def test_log_is_believed_when_it_accounts_for_the_pcrs_and_for_no_other(name: str, bank: HashAlgorithm) -> None:
    recorded = vector(name)
    log = parse_event_log(recorded.log)
    held = recorded.pcrs[bank]
    check_replay(log, bank, {pcr: held[pcr] for pcr in held if pcr != IMA_PCR})
    with pytest.raises(PlatformTpmError, match=f"does not account for PCR {IMA_PCR} of the bank {bank}"):
        check_replay(log, bank, held)
    for wrong in (bytes(bank.digest_bytes), held[4][:-1], b""):
        with pytest.raises(PlatformTpmError, match="does not account for PCR 4 "):
            check_replay(log, bank, {0: held[0], 4: wrong})


def test_log_is_not_believed_when_a_digest_was_changed() -> None:
    recorded = vector("ovmf_kernel")
    application = next(e for e in parse_event_log(recorded.log).events if e.type == APPLICATION)
    digest = application.digests[HashAlgorithm.SHA256]
    assert recorded.log.count(digest) == 1
    changed = parse_event_log(recorded.log.replace(digest, bytes(32)))
    with pytest.raises(PlatformTpmError, match="does not account for PCR 4 "):
        check_replay(changed, HashAlgorithm.SHA256, {4: recorded.pcrs["sha256"][4]})


def test_log_is_not_believed_when_there_is_no_pcr_to_check_it_against() -> None:
    with pytest.raises(UsageError, match="at least one PCR, and none was given"):
        check_replay(parse_event_log(vector("ovmf_kernel").log), HashAlgorithm.SHA256, {})


def test_events_are_read_when_log_is_of_ovmf() -> None:
    events = parse_event_log(vector("ovmf_unified_kernel").log).events
    assert [e.number for e in events] == list(range(1, len(events) + 1))
    assert [e.type_name for e in events if e.pcr == 4] == [
        "EV_EFI_ACTION",
        "EV_SEPARATOR",
        "EV_EFI_BOOT_SERVICES_APPLICATION",
        "EV_EFI_BOOT_SERVICES_APPLICATION",
    ]
    action, separator, application, _ = (e for e in events if e.pcr == 4)
    assert action.data == b"Calling EFI Application from Boot Option"
    assert action.digest_is_of_data(HashAlgorithm.SHA256)
    assert separator.digest_is_of_data(HashAlgorithm.SHA384)
    assert not application.digest_is_of_data(HashAlgorithm.SHA256)


def test_type_is_named_by_its_number_when_it_is_unknown() -> None:
    log = parse_event_log(spec_id() + event(1, 0x12345, SHA256_ONLY))
    assert [e.type_name for e in log.events] == ["0x00012345"]


def test_log_is_read_but_unfit_for_policy_when_it_is_sha1_only() -> None:
    recorded = vector("seabios_kernel_tpm12")
    log = parse_event_log(recorded.log)
    assert (log.format, log.banks) == (LogFormat.SHA1_ONLY, (HashAlgorithm.SHA1,))
    assert log.events[0].number == 0
    with pytest.raises(PlatformTpmError, match=r"is SHA-1 only.*Switch the TPM to 2\.0"):
        check_replay(log, HashAlgorithm.SHA256, {})
    with pytest.raises(UsageError, match="sha1 protect nothing"):
        check_replay(log, HashAlgorithm.SHA1, {})
    with pytest.raises(PlatformTpmError, match="no digests of the bank sha256; it has: sha1"):
        log.replay(HashAlgorithm.SHA256)


def test_log_is_sha1_only_when_its_spec_id_event_is_an_older_one() -> None:
    first = sha1_event(0, NO_ACTION, bytes(20), b"Spec ID Event02\0" + bytes(20))
    log = parse_event_log(first + sha1_event(3, SEPARATOR, b"s" * 20, b""))
    assert log.format is LogFormat.SHA1_ONLY
    assert log.replay(HashAlgorithm.SHA1) == {3: hashlib.sha1(bytes(20) + b"s" * 20).digest()}


def test_bank_is_refused_when_it_is_sha1_or_not_in_the_log() -> None:
    log = parse_event_log(spec_id([(SHA1, 20), (SHA256, 32)]))
    assert log.replay(HashAlgorithm.SHA1) == {}
    log.require_policy_bank(HashAlgorithm.SHA256)
    with pytest.raises(UsageError, match="sha1 protect nothing"):
        log.require_policy_bank(HashAlgorithm.SHA1)
    with pytest.raises(PlatformTpmError, match="no digests of the bank sha384; it has: sha1, sha256"):
        log.require_policy_bank(HashAlgorithm.SHA384)


def test_other_banks_are_read_when_one_is_unknown() -> None:
    log = parse_event_log(
        spec_id([(SM3, 32), (SHA256, 32), (0x1234, 7)])
        + event(2, SEPARATOR, [(0x1234, b"7 bytes"), (SHA256, DIGEST), (SM3, b"m" * 32)])
    )
    assert log.banks == (HashAlgorithm.SHA256,)
    assert log.events[0].digests == {HashAlgorithm.SHA256: DIGEST}
    assert log.replay(HashAlgorithm.SHA256) == {2: sha256_extended(bytes(32), DIGEST)}


def test_bank_is_refused_when_none_is_known() -> None:
    log = parse_event_log(spec_id([(SM3, 32)]))
    with pytest.raises(PlatformTpmError, match="it has: none that is known"):
        log.replay(HashAlgorithm.SHA256)


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_pcr_0_begins_with_the_locality_when_the_log_names_it(locality: int) -> None:
    measured = event(0, SEPARATOR, SHA256_ONLY) + event(1, SEPARATOR, SHA256_ONLY)
    log = parse_event_log(spec_id() + startup_locality(bytes([locality])) + measured)
    assert log.startup_locality == locality
    assert log.start_value(HashAlgorithm.SHA256, 0) == bytes(31) + bytes([locality])
    assert log.replay(HashAlgorithm.SHA256) == {
        0: sha256_extended(bytes(31) + bytes([locality]), DIGEST),
        1: sha256_extended(bytes(32), DIGEST),
    }


@pytest.mark.parametrize("named", [b"", b"\1", b"\2", b"\5", b"\xff", b"\3\0"])
def test_log_is_refused_when_it_names_a_startup_locality_that_does_not_exist(named: bytes) -> None:
    with pytest.raises(ProtocolError, match="event 1 of the event log names a startup locality that does not exist"):
        parse_event_log(spec_id() + startup_locality(named))


@pytest.mark.parametrize("before", [startup_locality(b"\0"), event(0, SEPARATOR, SHA256_ONLY)])
def test_log_is_refused_when_it_names_the_startup_locality_late_or_twice(before: bytes) -> None:
    with pytest.raises(ProtocolError, match="event 2 of the event log names the startup locality too late, or again"):
        parse_event_log(spec_id() + before + startup_locality(b"\3"))


def test_startup_locality_is_read_when_another_event_that_only_tells_comes_first() -> None:
    manifest = event(0, NO_ACTION, SHA256_ONLY, b"SP800-155 Event\0" + bytes(20))
    assert parse_event_log(spec_id() + manifest + startup_locality(b"\3")).startup_locality == 3


def test_startup_locality_is_0_when_its_event_is_of_another_pcr() -> None:
    log = parse_event_log(spec_id() + startup_locality(b"\3", pcr=1) + event(1, SEPARATOR, SHA256_ONLY))
    assert log.startup_locality == 0


def test_dynamic_launch_pcrs_begin_with_zeros_only_when_the_log_extends_them() -> None:
    no_action = event(18, NO_ACTION, SHA256_ONLY)
    log = parse_event_log(spec_id() + event(17, SEPARATOR, SHA256_ONLY) + no_action)
    assert log.replay(HashAlgorithm.SHA256) == {17: sha256_extended(bytes(32), DIGEST)}
    assert log.start_value(HashAlgorithm.SHA256, 17) == bytes(32)
    assert log.start_value(HashAlgorithm.SHA256, 18) == b"\xff" * 32
    assert log.start_value(HashAlgorithm.SHA384, 23) == bytes(48)


def test_nothing_is_extended_when_event_is_no_action() -> None:
    log = parse_event_log(spec_id() + event(0xFFFF_FFFF, NO_ACTION, SHA256_ONLY, b"SP800-155 Event\0"))
    assert [e.extends for e in log.events] == [False]
    assert log.replay(HashAlgorithm.SHA256) == {}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"", "event 0 of the event log is cut off"),
        (sha1_event(24, SEPARATOR, bytes(20), b""), "event 0 of the event log extends PCR 24, which does not exist"),
        (spec_id() + event(24, SEPARATOR, SHA256_ONLY), "event 1 of the event log extends PCR 24"),
        (spec_id() + event(0, SEPARATOR, []), "event 1 of the event log has 0 digests; the log announces 1"),
        (spec_id() + event(0, SEPARATOR, SHA256_ONLY * 2), "has 2 digests; the log announces 1"),
        (spec_id() + event(0, SEPARATOR, SHA256_ONLY, count=2**32 - 1), "has 4294967295 digests"),
        (
            spec_id() + event(0, SEPARATOR, [(SHA384, b"d" * 48)]),
            "a digest of algorithm 0x000c, which",
        ),
        (
            spec_id([(SHA256, 32), (SHA384, 48)]) + event(0, SEPARATOR, SHA256_ONLY * 2),
            "has two digests of algorithm 0x000b",
        ),
        (spec_id() + bytes(64), "event 1 of the event log has 0 digests"),
        (spec_id(version=(1, 2)), r"is of version 1\.2 of its specification"),
        (spec_id(version=(2, 1)), r"is of version 2\.1 of its specification"),
        (spec_id([]), "announces 0 algorithms"),
        (spec_id((0x1000 + number, 32) for number in range(17)), "announces 17 algorithms"),
        (spec_id(count=2**32 - 1), "announces 4294967295 algorithms"),
        (spec_id(count=2), "event 0 of the event log is cut off"),
        (spec_id([(SHA256, 32), (SHA256, 32)]), "announces algorithm 0x000b twice"),
        (spec_id([(SHA256, 31)]), "announces digests of 31 bytes for algorithm 0x000b"),
        (spec_id([(SM3, 0)]), "announces digests of 0 bytes for algorithm 0x0012"),
        (spec_id([(SM3, 65)]), "announces digests of 65 bytes for algorithm 0x0012"),
        (spec_id(after=b"\0"), "has bytes after its end"),
    ],
)
def test_log_is_refused_when_it_is_malformed(log: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse_event_log(log)


@pytest.mark.parametrize("name", NAMES)
def test_log_is_refused_or_ends_with_a_whole_event_when_cut_at_any_byte(name: str) -> None:
    whole = vector(name).log
    events = parse_event_log(whole).events
    taken = {}
    for length in range(len(whole)):
        try:
            taken[length] = parse_event_log(whole[:length]).events
        except ProtocolError:
            continue
    counts = [len(part) for part in taken.values()]
    first = 0 if name != "seabios_kernel_tpm12" else 1
    assert counts == list(range(first, len(events)))
    assert all(part == events[: len(part)] for part in taken.values())


def test_log_is_refused_when_it_is_larger_than_a_log_may_be() -> None:
    padding = MAX_LOG_BYTES - len(spec_id()) - len(event(0, SEPARATOR, SHA256_ONLY))
    largest = spec_id() + event(0, SEPARATOR, SHA256_ONLY, bytes(padding))
    assert len(parse_event_log(largest).events) == 1
    with pytest.raises(ProtocolError, match=f"has {MAX_LOG_BYTES + 1} bytes"):
        parse_event_log(largest + b"\0")


def test_log_is_refused_when_it_has_more_events_than_a_log_may_have() -> None:
    one = event(0, SEPARATOR, SHA256_ONLY)
    assert len(parse_event_log(spec_id() + one * (MAX_EVENTS - 1)).events) == MAX_EVENTS - 1
    with pytest.raises(ProtocolError, match=f"more than {MAX_EVENTS} events"):
        parse_event_log(spec_id() + one * MAX_EVENTS)


def test_data_is_refused_when_its_size_leads_past_the_end() -> None:
    whole = spec_id() + event(0, SEPARATOR, SHA256_ONLY, b"data")
    for size in (5, 0x7FFF_FFFF, 0xFFFF_FFFF):
        longer = whole[:-8] + struct.pack("<I", size) + b"data"
        with pytest.raises(ProtocolError, match=f"is cut off: {size} bytes are announced, 4 are there"):
            parse_event_log(longer)
