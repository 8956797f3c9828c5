"""The file of the public recovery key, as docs/state-format.md describes it, written here by other code."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from vtpm.errors import NotFoundError, StateError
from vtpm.keeper import escrow
from vtpm.keeper.escrow import ESCROW_FILE, PENDING_FILE, PUBLIC_FILE, confirm_recovery_key, public_key
from vtpm.recovery_key import RecoveryKey
from vtpm.secret import Secret

ROOT = bytes(range(32))


def described(root: bytes, raw: bytes) -> bytes:
    mac_key = hmac.digest(root, b"vtpm recovery public key mac v1" + b"\x01", "sha256")
    return raw + hmac.digest(mac_key, raw, "sha256")


def make_recovery_key(folder: Path, root: Secret) -> RecoveryKey:
    """Make one, and say that it is there."""
    key = escrow.make_recovery_key(folder, root)
    confirm_recovery_key(folder, root, key.public)
    return key


def test_both_keys_open_until_the_new_one_is_confirmed(tmp_path: Path) -> None:
    root = Secret(ROOT)
    first = escrow.make_recovery_key(tmp_path, root)
    assert escrow.exists(tmp_path) and escrow.unconfirmed(tmp_path) and escrow.fingerprint(tmp_path) == ""
    assert escrow.open_escrow(tmp_path, first) == root
    confirm_recovery_key(tmp_path, root, first.public)
    lost, second = escrow.make_recovery_key(tmp_path, root), escrow.make_recovery_key(tmp_path, root)
    for key in (first, second):
        assert escrow.open_escrow(tmp_path, key) == root
    with pytest.raises(StateError, match=first.public.fingerprint):
        escrow.open_escrow(tmp_path, lost)
    with pytest.raises(NotFoundError, match=lost.public.fingerprint):
        confirm_recovery_key(tmp_path, root, lost.public)
    assert escrow.open_escrow(tmp_path, first) == root
    assert public_key(tmp_path, root) == first.public
    confirm_recovery_key(tmp_path, root, second.public)
    confirm_recovery_key(tmp_path, root, second.public)
    assert not escrow.unconfirmed(tmp_path)
    assert public_key(tmp_path, root) == second.public
    assert escrow.open_escrow(tmp_path, second) == root
    with pytest.raises(StateError, match="is sealed to recovery key"):
        escrow.open_escrow(tmp_path, first)


def test_the_one_that_counts_opens_when_the_unconfirmed_escrow_is_damaged(tmp_path: Path) -> None:
    root = Secret(ROOT)
    first = make_recovery_key(tmp_path, root)
    second = escrow.make_recovery_key(tmp_path, root)
    (tmp_path / PENDING_FILE).write_bytes(b"damaged")
    assert escrow.open_escrow(tmp_path, first) == root
    with pytest.raises(StateError, match="damaged"):
        confirm_recovery_key(tmp_path, root, second.public)
    assert escrow.open_escrow(tmp_path, first) == root


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
