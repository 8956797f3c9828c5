"""Wrapping of vTPMs' keys and the Secret type, as pure code."""

from __future__ import annotations

import logging
import os
import pickle
from uuid import UUID

import pytest

from vtpm.errors import StateError
from vtpm.keeper.wrapping import WRAPPED_BYTES, unwrap_key, wrap_key
from vtpm.secret import Secret
from vtpm.tpm.types import VtpmId

ROOT = Secret(bytes(range(32)))
KEY = bytes(range(50, 82))
VTPM_ID = VtpmId(UUID("5ad4c7b0-3b7c-4d53-8fb1-1a6bd4d0b111"))

# Written with hmac of the standard library and plain AES-GCM, not by this code; it must open for ever.
FROZEN = bytes.fromhex(
    "01"
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    "202122232425262728292a2b"
    "26e36a5395232e2c2f6db34eaed1e9795dbf6b1245f2e34a515422873be69ba9"
    "663cc2a8436de0f92b88dbae734966a4"
)


def test_key_comes_back_when_unwrapped() -> None:
    wrapped = wrap_key(ROOT, VTPM_ID, Secret(KEY))
    assert len(wrapped) == WRAPPED_BYTES
    assert unwrap_key(ROOT, VTPM_ID, wrapped).reveal() == KEY


def test_frozen_key_opens_when_format_is_version_1() -> None:
    assert unwrap_key(ROOT, VTPM_ID, FROZEN).reveal() == KEY


def test_every_flipped_bit_is_refused_when_unwrapped() -> None:
    wrapped = wrap_key(ROOT, VTPM_ID, Secret(KEY))
    for place in range(len(wrapped) * 8):
        damaged = bytearray(wrapped)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(StateError):
            unwrap_key(ROOT, VTPM_ID, bytes(damaged))


def test_every_other_length_is_refused_when_unwrapped() -> None:
    wrapped = wrap_key(ROOT, VTPM_ID, Secret(KEY))
    for length in (0, 1, 32, WRAPPED_BYTES - 1, WRAPPED_BYTES + 1, 512):
        with pytest.raises(StateError):
            unwrap_key(ROOT, VTPM_ID, (wrapped * 6)[:length])


def test_key_is_refused_when_vtpm_or_root_is_another() -> None:
    wrapped = wrap_key(ROOT, VTPM_ID, Secret(KEY))
    with pytest.raises(StateError):
        unwrap_key(ROOT, VtpmId(UUID(int=VTPM_ID.int ^ 1)), wrapped)
    with pytest.raises(StateError):
        unwrap_key(Secret(os.urandom(32)), VTPM_ID, wrapped)


def test_secret_shows_nothing_when_printed_logged_or_pickled(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(KEY)
    with caplog.at_level(logging.INFO):
        logging.getLogger("x").info("%s %r %s", secret, secret, [secret])
    assert caplog.messages == ["Secret(redacted) Secret(redacted) [Secret(redacted)]"]
    assert f"{secret}" == "Secret(redacted)"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_secret_is_gone_when_wiped() -> None:
    secret = Secret(KEY)
    secret.wipe()
    with pytest.raises(StateError):
        secret.reveal()


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_secret_is_refused_when_it_has_another_length(size: int) -> None:
    with pytest.raises(StateError):
        Secret(bytes(size))
