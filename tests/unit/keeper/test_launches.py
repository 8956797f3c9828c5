"""Launches in a PCR: once each, whenever the keeper is killed, whatever became of the log, whoever extends it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vtpm.errors import ConflictError, PlatformTpmError, StoreError
from vtpm.keeper.launches import LAUNCH_DIR, Launches
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection
from vtpm.tpm.hash_algorithms import HashAlgorithm, extend
from vtpm.tpm.launch_log import MAX_ENTRIES, Gap, Launch, LaunchLog, decode, encode

SELECTION = PcrSelection(PcrBank.SHA256, (12,))
BANK = HashAlgorithm.SHA256
ONE, TWO = Launch("process", "ab" * 32), Launch("qemu", "cd" * 32)


class KilledError(Exception):
    """The keeper ends here."""


class Pcr:
    """One PCR of a TPM, as PlatformTpm gives it."""

    def __init__(self) -> None:
        self.value = bytes(32)
        self.resets = 7
        self.extensions = 0
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def pcr_state(self, selection: PcrSelection) -> tuple[dict[int, bytes], int]:
        assert selection == SELECTION
        return {12: self.value}, self.resets

    def extend(self, index: int, bank: PcrBank, digest: bytes) -> None:
        assert (index, bank) == (12, PcrBank.SHA256)
        self.before()
        self.value = extend(BANK, self.value, digest)
        self.extensions += 1
        self.after()

    def reset(self) -> None:
        self.value, self.resets = bytes(32), self.resets + 1


class Keeper:
    """A keeper that can be killed and started again over its TPM and its log."""

    def __init__(self, run_dir: Path) -> None:
        (run_dir / LAUNCH_DIR).mkdir()
        self.run_dir = run_dir
        self.tpm = Pcr()
        self.restart()

    def restart(self) -> None:
        self.tpm.before = self.tpm.after = lambda: None
        self.launches = Launches(self.run_dir, SELECTION)

    def measure(self, launch: Launch) -> None:
        self.launches.measure(launch, self.tpm)  # type: ignore[arg-type]

    def doubt(self) -> str:
        return self.launches.look(self.tpm).doubt  # type: ignore[arg-type]

    def log(self) -> LaunchLog:
        return decode(self.launches.path.read_bytes(), BANK, 12)

    def accounts(self) -> bool:
        return self.log().value == self.tpm.value


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(tmp_path)


def killed() -> None:
    raise KilledError


def test_pcr_is_extended_once_for_each_launch_however_often_it_comes(keeper: Keeper) -> None:
    for launch in (ONE, ONE, TWO, ONE, TWO):
        keeper.measure(launch)
        keeper.restart()
    assert keeper.tpm.extensions == 2
    assert keeper.log().entries == (ONE, TWO)
    assert keeper.log().start == bytes(32)
    assert keeper.accounts() and keeper.doubt() == ""


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("following", [ONE, TWO])
def test_pcr_holds_what_the_log_leads_to_when_the_keeper_is_killed_between_the_two(
    keeper: Keeper, extended: bool, following: Launch
) -> None:
    if extended:
        keeper.tpm.after = killed
    else:
        keeper.tpm.before = killed
    with pytest.raises(KilledError):
        keeper.measure(ONE)
    assert keeper.accounts() is extended
    keeper.restart()
    # Written and not extended is no doubt: the next launch sees to it.
    assert keeper.doubt() == ""
    keeper.measure(following)
    assert keeper.accounts()
    assert keeper.log().entries == tuple(dict.fromkeys((ONE, following)))
    assert keeper.tpm.extensions == len(keeper.log().entries)


def test_nothing_is_extended_when_the_log_cannot_be_written(keeper: Keeper) -> None:
    keeper.launches.path.parent.rmdir()
    with pytest.raises(StoreError):
        keeper.measure(ONE)
    assert keeper.tpm.extensions == 0
    assert not keeper.launches.known(ONE, keeper.tpm.resets)


def test_log_begins_anew_when_the_tpm_was_reset(keeper: Keeper) -> None:
    keeper.measure(ONE)
    assert keeper.launches.known(ONE, 7)
    keeper.tpm.reset()
    assert not keeper.launches.known(ONE, 8)
    assert keeper.doubt() == ""
    keeper.measure(ONE)
    assert (keeper.log().reset_count, keeper.log().entries) == (8, (ONE,))
    assert keeper.accounts()


def test_what_something_else_extended_is_told_and_launches_are_measured_again(keeper: Keeper) -> None:
    keeper.measure(ONE)
    keeper.tpm.extend(12, PcrBank.SHA256, b"x" * 32)
    found = keeper.tpm.value
    assert "does not hold what the log leads to" in keeper.doubt()
    keeper.measure(ONE)
    assert keeper.log().entries == (ONE, Gap(found), ONE)
    assert keeper.accounts()
    assert "something else extended PCR 12 (gaps in the log: 1)" in keeper.doubt()


def test_launch_is_refused_when_something_else_extends_at_the_same_moment(keeper: Keeper) -> None:
    def other() -> None:
        keeper.tpm.value = extend(BANK, keeper.tpm.value, b"x" * 32)

    keeper.tpm.after = other
    with pytest.raises(ConflictError, match="at the same moment"):
        keeper.measure(ONE)
    assert not keeper.launches.known(ONE, keeper.tpm.resets)
    keeper.restart()
    keeper.measure(ONE)
    assert keeper.log().gaps == 1 and keeper.accounts()


def test_a_log_that_is_gone_is_told(keeper: Keeper) -> None:
    keeper.measure(ONE)
    before = keeper.tpm.value
    keeper.launches.path.unlink()
    assert "there is no log of this boot" in keeper.doubt()
    keeper.measure(TWO)
    assert (keeper.log().start, keeper.log().entries) == (before, (TWO,))
    assert keeper.accounts()
    assert "was extended before the log begins" in keeper.doubt()


@pytest.mark.parametrize("forged", [b"", b"no log", encode(LaunchLog(HashAlgorithm.SHA384, 12, 7, bytes(48)))])
def test_a_log_that_is_damaged_is_told_and_kept_as_evidence(keeper: Keeper, forged: bytes) -> None:
    keeper.measure(ONE)
    keeper.launches.path.write_bytes(forged)
    assert "damaged or forged" in keeper.doubt()
    keeper.measure(ONE)
    assert keeper.launches.path.with_suffix(".damaged").read_bytes() == forged
    assert keeper.accounts() and keeper.tpm.extensions == 2


def test_a_forged_log_keeps_no_launch_from_being_measured(keeper: Keeper) -> None:
    keeper.launches.path.write_bytes(encode(LaunchLog(BANK, 12, 7, bytes(32), (TWO, ONE))))
    assert "does not hold" in keeper.doubt()
    keeper.measure(ONE)
    assert keeper.tpm.extensions == 1
    assert keeper.log().measured == {ONE} and keeper.accounts()


def test_launch_is_not_known_when_the_log_says_so_and_the_tpm_does_not_answer(keeper: Keeper) -> None:
    def away() -> None:
        raise PlatformTpmError("the platform TPM does not answer")

    keeper.tpm.before = away
    with pytest.raises(PlatformTpmError):
        keeper.measure(ONE)
    assert not keeper.launches.known(ONE, keeper.tpm.resets)


def test_launch_is_refused_when_the_log_is_full(keeper: Keeper) -> None:
    log = LaunchLog(BANK, 12, 7, bytes(32), (ONE,) * MAX_ENTRIES)
    keeper.tpm.value = log.value
    keeper.launches.path.write_bytes(encode(log))
    keeper.measure(ONE)
    with pytest.raises(ConflictError, match="which is the most"):
        keeper.measure(TWO)
    assert keeper.accounts()


def test_shown_log_accounts_for_the_pcr_whatever_became_of_it(keeper: Keeper) -> None:
    def shown() -> LaunchLog:
        log = keeper.launches.shown(keeper.tpm)  # type: ignore[arg-type]
        assert decode(encode(log), BANK, 12) == log
        assert (log.value, log.reset_count) == (keeper.tpm.value, keeper.tpm.resets)
        return log

    assert shown() == LaunchLog(BANK, 12, 7, bytes(32))
    keeper.measure(ONE)
    assert shown().entries == (ONE,)
    keeper.tpm.before = killed
    with pytest.raises(KilledError):
        keeper.measure(TWO)
    keeper.restart()
    before = keeper.launches.path.read_bytes()
    assert shown().entries == (ONE,)
    keeper.tpm.extend(12, PcrBank.SHA256, bytes(32))
    assert shown().entries == (ONE, TWO, Gap(keeper.tpm.value))
    assert keeper.launches.path.read_bytes() == before
    keeper.launches.path.write_bytes(b"no log")
    assert shown() == LaunchLog(BANK, 12, 7, keeper.tpm.value)
    keeper.tpm.reset()
    assert shown() == LaunchLog(BANK, 12, 8, bytes(32))
