"""Whatever a log of launches says, it is read as it was written, or refused."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.tpm.log_examples import event
from vtpm.errors import ProtocolError
from vtpm.tpm.event_log import EventType
from vtpm.tpm.hash_algorithms import HashAlgorithm, extend
from vtpm.tpm.launch_log import Gap, Launch, LaunchLog, Standing, decode, encode, standing

BANK = HashAlgorithm.SHA256
DIGEST = st.binary(min_size=32, max_size=32)
LAUNCH = st.builds(
    Launch,
    st.from_regex(r"[a-z][a-z0-9-]{0,15}", fullmatch=True),
    DIGEST.map(bytes.hex),
)
LOG = st.builds(
    lambda reset_count, start, entries: LaunchLog(BANK, 12, reset_count, start, tuple(entries)),
    st.integers(0, 2**32 - 1),
    DIGEST,
    st.lists(st.one_of(LAUNCH, DIGEST.map(Gap)), max_size=6),
)


@effort.codec
@given(LOG)
def test_log_of_launches_comes_back_when_read(log: LaunchLog) -> None:
    assert decode(encode(log), BANK, 12) == log


EVENT = st.tuples(
    st.sampled_from([12, 12, 12, 13]),
    st.sampled_from([EventType.EV_EVENT_TAG, EventType.EV_NO_ACTION, EventType.EV_IPL]),
    st.one_of(LAUNCH, DIGEST.map(Gap), st.binary(max_size=60)),
    st.booleans(),
)


@effort.codec
@given(st.sampled_from([HashAlgorithm.SHA256, HashAlgorithm.SHA384]), st.lists(EVENT, max_size=4))
def test_log_with_any_events_is_refused_or_has_nothing_but_launches_and_gaps(
    bank: HashAlgorithm, events: list[tuple[int, EventType, Launch | Gap | bytes, bool]]
) -> None:
    written = encode(LaunchLog(bank, 12, 7, bytes(bank.digest_bytes)))
    for pcr, kind, what, digest_fits in events:
        data = (
            what.data if isinstance(what, Launch) else what if isinstance(what, bytes) else b"vtpm gap 1\0" + what.held
        )
        digest = hashlib.new(bank, data).digest() if digest_fits else bytes(bank.digest_bytes)
        written += event(pcr, kind, [(bank.identifier, digest)], data)
    try:
        log = decode(written, BANK, 12)
    except ProtocolError:
        return
    assert bank is BANK
    assert encode(log) == written or any(isinstance(entry, Gap) for entry in log.entries)
    assert len(log.entries) == len(events)


@effort.codec
@given(LOG, st.one_of(LAUNCH, DIGEST.map(Gap)), DIGEST)
def test_standing_is_what_the_pcr_says_when_the_last_entry_may_be_missing(
    log: LaunchLog, entry: Launch | Gap, other: bytes
) -> None:
    longer = log.followed_by(entry)
    assert standing(longer, longer.value) is Standing.CURRENT
    if isinstance(entry, Launch):
        assert standing(longer, log.value) is Standing.PENDING
        assert longer.measured == log.measured | {entry}
        assert longer.value == extend(BANK, log.value, entry.digest(BANK))
    else:
        assert (longer.measured, longer.value, longer.gaps) == (frozenset(), entry.held, log.gaps + 1)
    assert standing(longer, other) is Standing.OTHER or other in (log.value, longer.value)


@effort.codec
@given(spoiled(LOG.map(encode)))
def test_spoiled_log_of_launches_is_refused_or_is_another_whole_one(data: bytes) -> None:
    try:
        log = decode(data, BANK, 12)
    except ProtocolError:
        return
    for entry in log.entries:
        assert isinstance(entry, Launch) or len(entry.held) == 32
    assert len(log.start) == len(log.value) == 32
    # Of the Spec ID event some fields mean nothing here; the events have one form only.
    written = b"".join(encode(log).partition(log.start)[2:]) if log.entries else b""
    assert data.endswith(written[-32:])
