"""What PCRs will be when some of what is measured is another."""

from __future__ import annotations

import hashlib

import pytest

from tests.unit.tpm.log_examples import APPLICATION, NO_ACTION, SEPARATOR, SHA1, SHA256, event, spec_id, vector
from vtpm.errors import PlatformTpmError, UsageError
from vtpm.tpm.event_log import EventLog, parse_event_log
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.pcr_prediction import Addition, ChangedEvent, Replacement, predict_pcrs

BANK = HashAlgorithm.SHA256
OLD, OTHER, NEW, NEWER = b"o" * 32, b"x" * 32, b"n" * 32, b"N" * 32


def extended(*digests: bytes) -> bytes:
    value = bytes(32)
    for digest in digests:
        value = hashlib.sha256(value + digest).digest()
    return value


def log_of(*events: tuple[int, bytes], event_type: int = APPLICATION) -> EventLog:
    return parse_event_log(spec_id() + b"".join(event(pcr, event_type, [(SHA256, digest)]) for pcr, digest in events))


LOG = log_of((4, OLD), (2, OTHER), (4, OTHER), (4, OLD))
HELD = {4: extended(OLD, OTHER, OLD), 2: extended(OTHER), 8: bytes(32)}


def test_pcrs_stay_when_nothing_is_replaced() -> None:
    prediction = predict_pcrs(LOG, BANK, HELD)
    assert prediction.values == HELD
    assert prediction.changed == ()


def test_every_event_with_the_digest_is_replaced_when_a_pcr_has_it_twice() -> None:
    prediction = predict_pcrs(LOG, BANK, HELD, [Replacement(4, OLD, NEW)])
    assert prediction.values == HELD | {4: extended(NEW, OTHER, NEW)}
    assert prediction.changed == (ChangedEvent(LOG.events[0], NEW), ChangedEvent(LOG.events[3], NEW))


def test_other_pcrs_stay_when_they_have_the_digest_too() -> None:
    prediction = predict_pcrs(LOG, BANK, HELD, [Replacement(4, OTHER, NEW)])
    assert prediction.values == HELD | {4: extended(OLD, NEW, OLD)}


def test_digests_change_places_when_each_replaces_the_other() -> None:
    prediction = predict_pcrs(LOG, BANK, HELD, [Replacement(4, OLD, OTHER), Replacement(4, OTHER, OLD)])
    assert prediction.values[4] == extended(OTHER, OLD, OTHER)
    assert [change.new for change in prediction.changed] == [OTHER, OLD, OTHER]


def test_nothing_is_changed_when_the_new_digest_is_the_old_one() -> None:
    prediction = predict_pcrs(LOG, BANK, HELD, [Replacement(4, OLD, OLD)])
    assert (prediction.values, prediction.changed) == (HELD, ())


def test_digests_are_added_at_the_end_in_order() -> None:
    additions = [Addition(4, NEW), Addition(8, NEW), Addition(4, NEWER)]
    prediction = predict_pcrs(LOG, BANK, HELD, [Replacement(4, OTHER, NEW)], additions)
    assert prediction.values == HELD | {4: extended(OLD, NEW, OLD, NEW, NEWER), 8: extended(NEW)}
    assert [change.event.number for change in prediction.changed] == [3]


def test_only_the_pcrs_asked_about_are_predicted() -> None:
    assert predict_pcrs(LOG, BANK, {2: HELD[2]}).values == {2: HELD[2]}


def test_prediction_begins_with_the_real_log_when_firmware_is_real() -> None:
    recorded = vector("ovmf_unified_kernel")
    log = parse_event_log(recorded.log)
    for bank in (HashAlgorithm.SHA256, HashAlgorithm.SHA384):
        held = {pcr: recorded.pcrs[bank][pcr] for pcr in (0, 2, 4, 7)}
        unified, kernel = (e for e in log.events if e.type == APPLICATION)
        new = bytes(bank.digest_bytes)
        prediction = predict_pcrs(log, bank, held, [Replacement(4, unified.digests[bank], new)])
        assert [change.event for change in prediction.changed] == [unified]
        value = bytes(bank.digest_bytes)
        for measured in log.events:
            if measured.pcr == 4:
                value = hashlib.new(bank, value + (new if measured is unified else measured.digests[bank])).digest()
        assert prediction.values == held | {4: value}
        back = predict_pcrs(log, bank, held, [Replacement(4, kernel.digests[bank], kernel.digests[bank])])
        assert back.values == held


@pytest.mark.parametrize("held", [{4: bytes(32)}, {8: OLD}, HELD | {4: extended(OLD)}])
def test_prediction_is_refused_when_the_log_does_not_account_for_a_pcr(held: dict[int, bytes]) -> None:
    with pytest.raises(PlatformTpmError, match="does not account for PCR"):
        predict_pcrs(LOG, BANK, held)


@pytest.mark.parametrize(
    ("replacements", "additions", "message"),
    [
        ([Replacement(4, NEW, OLD)], [], f"no event of PCR 4 in the event log has the sha256 digest {NEW.hex()}"),
        ([Replacement(8, OLD, NEW)], [], "no event of PCR 8"),
        ([Replacement(7, OLD, NEW)], [], "PCR 7 is changed but not among those that are predicted"),
        ([Replacement(4, OLD, NEW), Replacement(4, OLD, NEW)], [], "of PCR 4 is replaced twice"),
        ([Replacement(4, OLD[1:], NEW)], [], "a digest for PCR 4 has 31 bytes; sha256 has 32"),
        ([Replacement(4, OLD, NEW + b"n")], [], "a digest for PCR 4 has 33 bytes"),
        ([], [Addition(5, NEW)], "PCR 5 is changed but not among those"),
        ([], [Addition(4, b"")], "a digest for PCR 4 has 0 bytes"),
    ],
)
def test_prediction_is_refused_when_a_change_cannot_be_meant(
    replacements: list[Replacement], additions: list[Addition], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        predict_pcrs(LOG, BANK, HELD, replacements, additions)


def test_event_is_not_replaced_when_it_extends_nothing() -> None:
    with pytest.raises(UsageError, match="no event of PCR 4"):
        predict_pcrs(log_of((4, OLD), event_type=NO_ACTION), BANK, {4: bytes(32)}, [Replacement(4, OLD, NEW)])


def test_bank_is_refused_when_it_is_sha1() -> None:
    log = parse_event_log(spec_id([(SHA1, 20)]) + event(4, SEPARATOR, [(SHA1, b"d" * 20)]))
    with pytest.raises(UsageError, match="sha1 protect nothing"):
        predict_pcrs(log, HashAlgorithm.SHA1, log.replay(HashAlgorithm.SHA1))
    with pytest.raises(PlatformTpmError, match="no digests of the bank sha256"):
        predict_pcrs(log, BANK, {4: bytes(32)})
