"""A quote comes with the values that it is over, also when PCRs are extended meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.tpm.attest_examples import attest, quote_body, sign
from vtpm.errors import ConflictError, PlatformTpmError, UsageError
from vtpm.keeper.attesting import TRIES, Attesting
from vtpm.keeper.custody import Custody
from vtpm.keeper.launches import LAUNCH_DIR, Launches
from vtpm.platform_tpm.attestation import SignedAttest
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection
from vtpm.tpm.attest import read_quote
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import decode
from vtpm.wire.keeper import QuoteArgs

EXTRA = bytes(range(32))
ARGS = QuoteArgs(EXTRA, "sha256", (0, 12))


class Tpm:
    """PCRs that something extends between two commands, so many times."""

    def __init__(self, changes: int) -> None:
        self.changes = changes
        self.values = {0: b"f" * 32, 12: bytes(32)}

    def pcr_state(self, selection: PcrSelection) -> tuple[dict[int, bytes], int]:
        return {index: self.values[index] for index in selection.indexes}, 3

    def pcr_values(self, selection: PcrSelection) -> dict[int, bytes]:
        values = {index: self.values[index] for index in selection.indexes}
        if self.changes:
            self.changes -= 1
            self.values[0] = bytes([self.changes]) * 32
        return values

    def quote(self, selection: PcrSelection, extra: bytes) -> SignedAttest:
        signed = attest(quote_body({index: self.values[index] for index in selection.indexes}), extra=extra)
        return SignedAttest(signed, sign(signed))


class Keeping:
    """The part of Custody that is asked."""

    def __init__(self, tpm: Tpm, launches: Launches) -> None:
        self._tpm = tpm
        self._launches = launches

    def launches_of_open_root(self) -> Launches:
        return self._launches

    def ask(self, call: Callable[[Any], Any]) -> Any:
        return call(self._tpm)


def attesting(folder: Path, changes: int) -> Attesting:
    (folder / LAUNCH_DIR).mkdir()
    launches = Launches(folder, PcrSelection(PcrBank.SHA256, (12,)))
    return Attesting(cast("Custody", Keeping(Tpm(changes), launches)))


@pytest.mark.parametrize("changes", [0, 1, TRIES - 1])
def test_values_are_those_quoted_when_pcrs_are_extended_in_between(tmp_path: Path, changes: int) -> None:
    quoted = attesting(tmp_path, changes).quote(ARGS)
    quote = read_quote(quoted.attest)
    assert quote.extra == EXTRA
    quote.require_values(HashAlgorithm.SHA256, dict(zip(ARGS.pcrs, quoted.values, strict=True)))
    log = decode(quoted.launch_log, HashAlgorithm.SHA256, 12)
    assert (log.value, log.reset_count, log.entries) == (quoted.values[1], 3, ())


def test_quote_is_given_up_when_pcrs_change_all_the_time(tmp_path: Path) -> None:
    with pytest.raises(PlatformTpmError, match="sha256:0,12 of the platform TPM change all the time"):
        attesting(tmp_path, TRIES).quote(ARGS)


@pytest.mark.parametrize(
    ("bank", "pcrs"), [("sha1", (0,)), ("", (0,)), ("sha256", ()), ("sha256", (7, 0)), ("sha256", (24,))]
)
def test_quote_is_refused_when_no_such_pcrs_can_be_selected(tmp_path: Path, bank: str, pcrs: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        attesting(tmp_path, 0).quote(QuoteArgs(EXTRA, bank, pcrs))


def test_quote_is_refused_when_launches_are_not_measured() -> None:
    class NoLaunches(Keeping):
        def launches_of_open_root(self) -> Launches:
            raise ConflictError("the keeper was started without a PCR for launches")

    keeping = NoLaunches(Tpm(0), cast("Launches", None))
    with pytest.raises(ConflictError, match="without a PCR"):
        Attesting(cast("Custody", keeping)).quote(ARGS)
