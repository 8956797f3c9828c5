from __future__ import annotations

import pickle

import pytest

from vtpm.errors import StateError
from vtpm.secret import Secret


def test_key_is_not_shown_when_printed_formatted_or_pickled() -> None:
    secret = Secret(b"K" * 32)
    for text in (repr(secret), str(secret), f"{secret}", f"{[secret]}"):
        assert "K" * 4 not in text
        assert "redacted" in text
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        hash(secret)


def test_key_is_refused_when_not_32_bytes_and_its_bytes_are_not_in_the_error() -> None:
    with pytest.raises(StateError, match="31") as refusal:
        Secret(b"K" * 31)
    assert "KKKK" not in str(refusal.value)


def test_key_is_gone_when_wiped() -> None:
    secret = Secret(b"K" * 32)
    assert secret == Secret(b"K" * 32)
    secret.wipe()
    with pytest.raises(StateError, match="dropped"):
        secret.reveal()
