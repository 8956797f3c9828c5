from __future__ import annotations

import copy
import hashlib
import pickle

import pytest

from vtpm.errors import StateError, UsageError
from vtpm.secret import Secret
from vtpm.vault.passphrase import MAX_LOG2_N, MIN_LOG2_N, Passphrase, ScryptCost

WORDS = "correct horse battery"
CHEAP = ScryptCost(MIN_LOG2_N)


def test_key_is_scrypts_when_stretched() -> None:
    key = hashlib.scrypt(WORDS.encode(), salt=b"salt" * 8, n=1 << 14, r=8, p=1, maxmem=1 << 26, dklen=32)
    assert Passphrase(WORDS).stretch(b"salt" * 8, CHEAP) == Secret(key)


def test_key_is_the_same_when_letters_are_composed_otherwise() -> None:
    one, two = Passphrase("gr\u00fcne Wiesen im Mai"), Passphrase("gru\u0308ne Wiesen im Mai")
    assert one.stretch(bytes(32), CHEAP) == two.stretch(bytes(32), CHEAP)


@pytest.mark.parametrize("text", ["", "elevenchars", "u\u0308" * 11, "x" * 1025, "x" * 10_000, "\ud800" * 12])
def test_refused_and_not_shown_when_it_is_no_passphrase(text: str) -> None:
    with pytest.raises(UsageError, match="a passphrase") as refusal:
        Passphrase(text)
    assert not text or text not in str(refusal.value)


def test_passphrase_is_not_shown_when_printed_pickled_or_copied() -> None:
    passphrase = Passphrase(WORDS)
    for text in (repr(passphrase), str(passphrase), f"{[passphrase]}"):
        assert "horse" not in text
        assert "redacted" in text
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            refused(passphrase)


@pytest.mark.parametrize(
    ("log2_n", "r", "p"),
    [
        (MIN_LOG2_N - 1, 8, 1),
        (MAX_LOG2_N + 1, 8, 1),
        (255, 8, 1),
        (0, 8, 1),
        (14, 7, 1),
        (14, 255, 1),
        (14, 8, 0),
        (14, 8, 2),
    ],
)
def test_cost_is_refused_when_it_is_not_one_in_use(log2_n: int, r: int, p: int) -> None:
    with pytest.raises(StateError, match="is not used here"):
        ScryptCost(log2_n, r, p)
