"""Whatever an event log says, it is read as it was written, or refused; what is read is whole."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.tpm.log_examples import (
    HASH_NAMES,
    NAMES,
    NO_ACTION,
    SHA256,
    SIZES,
    BuiltLog,
    built_logs,
    event,
    spec_id,
    vector,
)
from vtpm.errors import ProtocolError
from vtpm.tpm.event_log import MAX_LOG_BYTES, EventLog, LogFormat, parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.pcr_prediction import Replacement, predict_pcrs

REAL = [vector(name).log for name in NAMES]
VALID = st.one_of(built_logs().map(lambda built: built.log), st.sampled_from(REAL))


def check_whole(log: EventLog) -> None:
    """Every event has a digest of the right size for every bank, and every bank replays."""
    for one in log.events:
        assert {bank: len(one.digests[bank]) for bank in log.banks} == {bank: bank.digest_bytes for bank in log.banks}
        assert one.digests.keys() == set(log.banks)
        assert one.pcr < 24 or not one.extends
    for bank in log.banks:
        assert log.replay(bank).keys() == {one.pcr for one in log.events if one.extends}


@effort.codec
@given(built_logs())
def test_log_comes_back_when_read(built: BuiltLog) -> None:
    log = parse_event_log(built.log)
    assert log.startup_locality == built.locality
    known = [algorithm for algorithm in built.algorithms if algorithm in HASH_NAMES]
    assert list(log.banks) == [HASH_NAMES[algorithm] for algorithm in known]
    assert len(log.events) == len(built.events)
    for read, (pcr, event_type, digests, data) in zip(log.events, built.events, strict=True):
        assert (read.pcr, read.type, read.data) == (pcr, event_type, data)
        assert read.digests == {HASH_NAMES[algorithm]: digests[algorithm] for algorithm in known}
    for algorithm in known:
        values: dict[int, bytes] = {}
        for pcr, event_type, digests, _ in built.events:
            if event_type != NO_ACTION:
                start = bytes(SIZES[algorithm] - 1) + bytes([built.locality if pcr == 0 else 0])
                old = values.get(pcr, start)
                values[pcr] = hashlib.new(HASH_NAMES[algorithm], old + digests[algorithm]).digest()
        assert log.replay(HashAlgorithm(HASH_NAMES[algorithm])) == values


@effort.codec
@given(spoiled(VALID))
def test_spoiled_log_is_refused_or_is_another_whole_one(data: bytes) -> None:
    try:
        log = parse_event_log(data)
    except ProtocolError:
        return
    check_whole(log)
    announced = struct.unpack_from("<I", data, 32 + 24)[0] if log.format is LogFormat.CRYPTO_AGILE else 0
    if announced == len(log.banks):
        # What is taken has one form only, so nothing hides in it.
        written = [
            event(one.pcr, one.type, [(b.identifier, digest) for b, digest in one.digests.items()], one.data)
            for one in log.events
        ]
        first = 32 + struct.unpack_from("<I", data, 28)[0]
        assert data[first:] == b"".join(written)


@effort.codec
@given(st.binary(max_size=300), st.sampled_from([b"", spec_id(), spec_id([(0x04, 20), (0x0B, 32)])]))
def test_noise_is_refused_or_is_a_log(noise: bytes, before: bytes) -> None:
    try:
        log = parse_event_log(before + noise)
    except ProtocolError:
        return
    check_whole(log)


@effort.codec
@given(built_logs(), st.data())
def test_prediction_is_the_replay_of_the_changed_log(built: BuiltLog, data: st.DataObject) -> None:
    log = parse_event_log(built.log)
    extending = [digests[SHA256] for _, kind, digests, _ in built.events if kind != NO_ACTION and SHA256 in digests]
    if not extending:
        return
    old = data.draw(st.sampled_from(extending))
    new = data.draw(st.binary(min_size=32, max_size=32))
    bank = HashAlgorithm.SHA256
    held = log.replay(bank)
    pcrs = {pcr for pcr, kind, digests, _ in built.events if kind != NO_ACTION and digests[SHA256] == old}
    changed = [
        (pcr, kind, digests | {SHA256: new} if kind != NO_ACTION and digests[SHA256] == old else digests, rest)
        for pcr, kind, digests, rest in built.events
    ]
    header = built.log[: 32 + struct.unpack_from("<I", built.log, 28)[0]]
    expected = parse_event_log(header + b"".join(event(p, k, d.items(), rest) for p, k, d, rest in changed))
    prediction = predict_pcrs(log, bank, held, [Replacement(pcr, old, new) for pcr in pcrs])
    assert prediction.values == expected.replay(bank)


def test_memory_stays_bounded_when_a_log_announces_more_than_it_has() -> None:
    one = struct.pack("<III", 0, 4, 1) + struct.pack("<H", SHA256) + bytes(32)
    tracemalloc.start()
    for announced in (0xFFFF_FFFF, MAX_LOG_BYTES):
        try:
            parse_event_log(spec_id() + one + struct.pack("<I", announced))
        except ProtocolError:
            continue
        raise AssertionError("a log that is cut off was taken")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100 * 1024
