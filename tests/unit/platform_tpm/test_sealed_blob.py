"""The root file's text form, as pure code. Damage of every field on a real one: tests/integration/keeper."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import replace

import pytest

from vtpm.errors import StateError
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrSelection
from vtpm.platform_tpm.root_policy import MAX_SETS, PcrSet, approved
from vtpm.platform_tpm.sealed_blob import MAX_BLOB_BYTES, IndexRef, SealedBlob
from vtpm.secret import Secret

ROOT = Secret(bytes(range(32)))
NAME = b"\0\x0b" + bytes(range(32))
SET = PcrSet("set-up", DEFAULT_PCRS, (b"\1" * 32, b"\2" * 32, b"\3" * 32, b"\4" * 32))
OTHER = PcrSet("kernel 6.1", PcrSelection.parse("sha384:4"), (b"\5" * 48,))
BLOB = SealedBlob(
    srk_name=NAME,
    ek_name=NAME[::-1],
    policy_index=IndexRef(0x01815650, NAME),
    anchor_index=IndexRef(0x01815651, NAME),
    lists=((SET,), (SET, OTHER)),
    public=b"public",
    private=b"private",
).signed(ROOT)


def damaged(**changed: object) -> bytes:
    fields = json.loads(BLOB.to_bytes()) | changed
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_blob_comes_back_when_read() -> None:
    assert SealedBlob.from_bytes(BLOB.to_bytes()) == BLOB
    assert damaged() == BLOB.to_bytes()


def test_mac_is_hmac_of_the_form_without_it_when_made() -> None:
    fields = json.loads(BLOB.to_bytes())
    mac = fields.pop("mac")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    # HKDF-Expand of RFC 5869 with one block.
    key = hmac.digest(ROOT.reveal(), b"vtpm root file mac" + b"\1", "sha256")
    assert mac == hmac.new(key, text, hashlib.sha256).hexdigest()


def test_every_change_is_refused_when_verified() -> None:
    BLOB.verify(ROOT)
    changes: list[dict[str, object]] = [
        {"srk_name": NAME + b"x"},
        {"ek_name": NAME},
        {"policy_index": IndexRef(0x01815652, NAME)},
        {"anchor_index": IndexRef(0x01815651, NAME[::-1])},
        {"lists": ((SET,),)},
        {"lists": ((replace(SET, label="other"),), (SET, OTHER))},
        {"public": b"other"},
        {"private": b"other"},
        {"mac": b""},
        {"mac": bytes(32)},
    ]
    for change in changes:
        with pytest.raises(StateError, match="not as it was written"):
            replace(BLOB, **change).verify(ROOT)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="not of this root key"):
        BLOB.verify(Secret(bytes(32)))
    BLOB.with_lists(ROOT, (OTHER,)).verify(ROOT)


def test_list_is_found_by_what_the_index_holds() -> None:
    assert BLOB.list_of(approved((SET,))) == (SET,)
    assert BLOB.list_of(approved((SET, OTHER))) == (SET, OTHER)
    for other in (approved((OTHER,)), approved((OTHER, SET)), b"", bytes(34)):
        assert BLOB.list_of(other) is None


@pytest.mark.parametrize("version", [0, 1, 3, 2**70])
def test_file_is_refused_when_of_another_version(version: int) -> None:
    with pytest.raises(StateError, match=f"is of version {version}; this vtpm reads version 2 only"):
        SealedBlob.from_bytes(damaged(version=version))
    # A version 1 file has other fields too.
    with pytest.raises(StateError, match="is of version 1"):
        SealedBlob.from_bytes(b'{"format":"vtpm-sealed","version":1}\n')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", "2"),
        ("version", True),
        ("lists", []),
        ("lists", [[], []]),
        ("policy_index", {"handle": 0x01000000 - 1, "name": "00"}),
        ("policy_index", {"handle": 0x02000000, "name": "00"}),
        ("policy_index", {"handle": True, "name": "00"}),
        ("policy_index", {"handle": 0x01815650}),
        ("policy_index", []),
        ("anchor_index", {"handle": 0x01815650, "name": ""}),
        ("srk_name", ""),
        ("srk_name", "AB"),
        ("srk_name", "zz"),
        ("srk_name", "00" * 1025),
        ("mac", 7),
        ("more", 7),
    ],
)
def test_file_is_refused_when_a_field_is_wrong(field: str, value: object) -> None:
    with pytest.raises(StateError, match="damaged"):
        SealedBlob.from_bytes(damaged(**{field: value}))


def test_file_is_refused_when_two_lists_are_the_same() -> None:
    (first, _) = json.loads(BLOB.to_bytes())["lists"]
    with pytest.raises(StateError, match="two different ones"):
        SealedBlob.from_bytes(damaged(lists=[first, first]))


def test_largest_blob_fits_when_both_lists_are_full() -> None:
    selection = PcrSelection.parse("sha384:" + ",".join(map(str, range(24))))
    lists = tuple(
        tuple(
            PcrSet(f"{number}" + "x" * 63, selection, (bytes([start + number]) * 48,) * 24)
            for number in range(MAX_SETS)
        )
        for start in (0, MAX_SETS)
    )
    large = replace(BLOB, lists=lists, public=bytes(1024), private=bytes(1024)).signed(ROOT)
    assert len(large.to_bytes()) < MAX_BLOB_BYTES
    assert SealedBlob.from_bytes(large.to_bytes()) == large
