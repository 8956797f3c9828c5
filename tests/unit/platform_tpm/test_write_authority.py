"""The write authority's key and what it signs, without a TPM."""

from __future__ import annotations

import hashlib
import hmac
import os

import pytest

from vtpm.errors import StateError
from vtpm.platform_tpm.anchor import anchor_index
from vtpm.platform_tpm.nv_index import FIRST_HANDLE, NvIndex
from vtpm.platform_tpm.sealing import policy_index
from vtpm.platform_tpm.write_authority import WriteAuthority, write_cp_hash
from vtpm.secret import Secret

ROOT = Secret(bytes(range(32)))


def expand(label: bytes) -> bytes:
    """HKDF-Expand of RFC 5869 with one block."""
    return hmac.digest(ROOT.reveal(), label + b"\1", "sha256")


def test_key_is_derived_from_the_root_key_and_stays_the_same() -> None:
    authority = WriteAuthority(ROOT)
    # Frozen: the indexes of an installation are written under the key that this version derives.
    assert authority._key.reveal() == expand(b"vtpm platform nv write authority key")
    assert authority._seed.reveal() == expand(b"vtpm platform nv write authority seed")
    unique = hashlib.sha256(authority._seed.reveal() + authority._key.reveal()).digest()
    # type keyedHash, SHA-256, attributes noDA adminWithPolicy sign, no policy, scheme HMAC SHA-256, unique.
    area = bytes.fromhex("0008000b0004048000000005000b0020") + unique
    assert authority.public().publicArea.marshal() == area
    assert authority.name == b"\0\x0b" + hashlib.sha256(area).digest()
    assert WriteAuthority(Secret(os.urandom(32))).name != authority.name


def test_signature_covers_nonce_command_and_reference() -> None:
    authority = WriteAuthority(ROOT)

    def signature(nonce: bytes, cp_hash: bytes, policy_ref: bytes) -> bytes:
        return bytes(authority.sign(nonce, cp_hash, policy_ref).signature.hmac.digest.sha256)

    first = signature(b"n" * 32, b"c" * 32, b"ref")
    a_hash = hashlib.sha256(b"n" * 32 + bytes(4) + b"c" * 32 + b"ref").digest()
    assert first == hmac.digest(authority._key.reveal(), a_hash, "sha256")
    others = {
        signature(b"m" * 32, b"c" * 32, b"ref"),
        signature(b"n" * 32, b"d" * 32, b"ref"),
        signature(b"n" * 32, b"c" * 32, b"fer"),
    }
    assert len(others | {first}) == 4


def test_cp_hash_is_of_nv_write_when_computed() -> None:
    name = b"\0\x0b" + b"n" * 32
    expected = hashlib.sha256(bytes.fromhex("00000137") + name + name + b"\0\3abc" + b"\0\0").digest()
    assert write_cp_hash(name, b"abc") == expected


def test_indexes_differ_in_policy_when_of_one_authority() -> None:
    authority = WriteAuthority(ROOT)
    policy, anchor = policy_index(FIRST_HANDLE, authority), anchor_index(FIRST_HANDLE, authority)
    assert policy.policy != anchor.policy
    assert (policy.size_bytes, anchor.size_bytes) == (34, 40)


def test_name_says_that_it_was_written() -> None:
    index = NvIndex("index", 0x01815650, 40, b"ref", b"p" * 32)
    # Handle, SHA-256, attributes (policyWrite authRead noDA, and written), policy, size.
    unwritten = bytes.fromhex("01815650000b020400080020") + b"p" * 32 + b"\0\x28"
    written = bytes.fromhex("01815650000b220400080020") + b"p" * 32 + b"\0\x28"
    assert index.name(written=False) == b"\0\x0b" + hashlib.sha256(unwritten).digest()
    assert index.name(written=True) == b"\0\x0b" + hashlib.sha256(written).digest()
    assert index.ref.name == index.name(written=True)


def test_authority_signs_nothing_when_wiped_and_never_shows_its_key() -> None:
    authority = WriteAuthority(ROOT)
    key = authority._key.reveal().hex()
    assert key not in repr(authority) + repr(vars(authority))
    authority.wipe()
    with pytest.raises(StateError):
        authority.sign(b"", b"", b"")
