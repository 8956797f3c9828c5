"""The file of the public recovery key, as docs/state-format.md describes it, written here by other code."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from vtpm.errors import StateError
from vtpm.keeper.escrow import ESCROW_FILE, PUBLIC_FILE, make_recovery_key, public_key
from vtpm.recovery_key import RecoveryKey
from vtpm.secret import Secret

ROOT = bytes(range(32))


def described(root: bytes, raw: bytes) -> bytes:
    mac_key = hmac.digest(root, b"vtpm recovery public key mac v1" + b"\x01", "sha256")
    return raw + hmac.digest(mac_key, raw, "sha256")


def test_file_is_as_described_when_a_key_is_made(tmp_path: Path) -> None:
    assert public_key(tmp_path, Secret(ROOT)) is None
    made = make_recovery_key(tmp_path, Secret(ROOT))
    assert (tmp_path / PUBLIC_FILE).read_bytes() == described(ROOT, made.public.raw)
    assert public_key(tmp_path, Secret(ROOT)) == made.public


def test_key_is_refused_when_its_mac_is_of_another_root(tmp_path: Path) -> None:
    made = make_recovery_key(tmp_path, Secret(ROOT))
    (tmp_path / PUBLIC_FILE).write_bytes(described(bytes(32), made.public.raw))
    with pytest.raises(StateError, match="was not written by this host's keeper"):
        public_key(tmp_path, Secret(ROOT))


def test_key_counts_no_more_when_the_escrow_is_anothers_or_gone(tmp_path: Path) -> None:
    make_recovery_key(tmp_path, Secret(ROOT))
    other = RecoveryKey.generate().public
    (tmp_path / PUBLIC_FILE).write_bytes(described(ROOT, other.raw))
    assert public_key(tmp_path, Secret(ROOT)) is None
    (tmp_path / ESCROW_FILE).unlink()
    assert public_key(tmp_path, Secret(ROOT)) is None
