"""Debian's tpm2_eventlog reads the same events out of a log, and computes the same PCRs from it."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.unit.tpm.log_examples import NAMES, VECTORS
from vtpm.tpm.event_log import EventLog, LogFormat, parse_event_log

_EVENT = re.compile(r"^  PCRIndex: (\d+)\n  EventType: (\w+)\n", re.MULTILINE)
_EVENT_DIGEST = re.compile(r'^  - AlgorithmId: (\w+)\n    Digest: "([0-9a-f]+)"$', re.MULTILINE)
_BANK = re.compile(r"^  (\w+):\n((?:    \d+ *: 0x[0-9a-f]+\n?)+)", re.MULTILINE)
_PCR = re.compile(r"(\d+) *: 0x([0-9a-f]+)")

ReportedEvent = tuple[int, str, dict[str, str]]


def reported(name: str) -> tuple[list[ReportedEvent], dict[str, dict[int, str]]]:
    """What tpm2_eventlog says of a recorded log: its events, without the Spec ID event, and its PCRs."""
    arguments = ["tpm2_eventlog", str(VECTORS / f"{name}.bin")]
    report = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True).stdout
    events, _, pcrs = report.partition("\npcrs:\n")
    heads = list(_EVENT.finditer(events))
    ends = [head.start() for head in heads[1:]] + [len(events)]
    listed = [
        (int(head[1]), head[2], dict(_EVENT_DIGEST.findall(events, head.end(), end)))
        for head, end in zip(heads, ends, strict=True)
    ]
    banks = {bank: {int(pcr): value for pcr, value in _PCR.findall(lines)} for bank, lines in _BANK.findall(pcrs)}
    return listed, banks


def as_reported(log: EventLog) -> list[ReportedEvent]:
    return [
        (event.pcr, event.type_name, {str(bank): digest.hex() for bank, digest in event.digests.items()})
        for event in log.events
    ]


@pytest.mark.parametrize("name", NAMES)
def test_events_and_pcrs_are_those_of_tpm2_eventlog_when_the_log_is_real(name: str) -> None:
    events, pcrs = reported(name)
    log = parse_event_log((VECTORS / f"{name}.bin").read_bytes())
    # It lists the Spec ID event of a crypto-agile log as the first.
    assert as_reported(log) == events[1 if log.format is LogFormat.CRYPTO_AGILE else 0 :]
    assert {bank: {pcr: value.hex() for pcr, value in log.replay(bank).items()} for bank in log.banks} == pcrs
