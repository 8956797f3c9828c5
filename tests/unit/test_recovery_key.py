from __future__ import annotations

import copy
import hmac
import json
import pickle
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vtpm.errors import StateError, UsageError
from vtpm.recovery_key import ESCROW_BYTES, MAX_CONTEXT_BYTES, RecoveryKey, RecoveryPublicKey, recipient
from vtpm.secret import Secret

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "state" / "recovery-key-v1.json").read_text())
KEY = RecoveryKey.from_text(VECTORS[0]["key"])
TEXT = KEY.to_text()
PUBLIC = KEY.public.to_text()
SECRET = Secret(bytes(range(32)))
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
HEADING = "VTPM-RECOVERY-KEY-1\n"


# An independent reader: by docs/state-format.md, RFC 9180 and Crockford's alphabet; no vtpm, no HPKE library.


def crc16(data: bytes) -> int:
    crc = 0xFFFF
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


def crockford(symbols: str) -> bytes:
    number = 0
    for symbol in symbols:
        number = number * 32 + ALPHABET.index(symbol)
    return number.to_bytes(len(symbols) * 5 // 8, "big")


def independent_text(text: str, heading: str) -> bytes:
    assert text.startswith(heading)
    symbols = text[len(heading) :].replace("-", "").replace("\n", "")
    assert len(symbols) == 64
    key = b""
    for row in range(4):
        data = crockford(symbols[16 * row : 16 * row + 16])
        assert crc16(f"{heading}/{row}".encode() + data[:8]) == int.from_bytes(data[8:], "big")
        key += data[:8]
    return key


def extract(salt: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), ikm, "sha256")


def expand(key: bytes, info: bytes, length: int) -> bytes:
    assert length <= 32
    return hmac.digest(key, info + b"\x01", "sha256")[:length]


def labeled_extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite + label + ikm)


def labeled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand(key, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info, length)


def hpke_open(private: bytes, enc: bytes, ciphertext: bytes, info: bytes) -> bytes:
    """RFC 9180, 4.1, 5.1, 6.1: base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM."""
    key = X25519PrivateKey.from_private_bytes(private)
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x02"
    shared = key.exchange(X25519PublicKey.from_public_bytes(enc))
    prk = labeled_extract(kem, b"", b"eae_prk", shared)
    secret = labeled_expand(kem, prk, b"shared_secret", enc + key.public_key().public_bytes_raw(), 32)
    context = b"\0" + labeled_extract(suite, b"", b"psk_id_hash", b"") + labeled_extract(suite, b"", b"info_hash", info)
    schedule = labeled_extract(suite, secret, b"secret", b"")
    aes_key = labeled_expand(suite, schedule, b"key", context, 32)
    nonce = labeled_expand(suite, schedule, b"base_nonce", context, 12)
    return AESGCM(aes_key).decrypt(nonce, ciphertext, b"")


def independent_open(private: bytes, escrow: bytes, purpose: str, context: bytes) -> bytes:
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    assert len(escrow) == 110
    assert escrow[:10] == b"VTPMESCR\x00\x01"
    assert escrow[10:30] == sha256(b"vtpm recovery public key v1" + public).digest()[:20]
    info = b"vtpm recovery escrow v1" + escrow[:30] + bytes([len(purpose)]) + purpose.encode() + context
    return hpke_open(private, escrow[30:62], escrow[62:], info)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_frozen_key_and_escrow_are_read_when_the_reader_is_independent(vector: dict[str, Any]) -> None:
    private = independent_text(vector["key"], "VTPM-RECOVERY-KEY-1")
    public = independent_text(vector["public"], "VTPM-RECOVERY-PUBLIC-1")
    assert X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == public
    fingerprint = sha256(b"vtpm recovery public key v1" + public).digest()[:20]
    assert crockford(vector["fingerprint"].replace("-", "")) == fingerprint
    opened = independent_open(
        private, bytes.fromhex(vector["escrow"]), vector["purpose"], bytes.fromhex(vector["context"])
    )
    assert opened == bytes.fromhex(vector["secret"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_frozen_key_and_escrow_are_read_and_written_alike(vector: dict[str, Any]) -> None:
    key = RecoveryKey.from_text(vector["key"])
    assert key.to_text() == vector["key"]
    assert key.public.to_text() == vector["public"]
    assert key.public.fingerprint == vector["fingerprint"]
    escrow = bytes.fromhex(vector["escrow"])
    assert recipient(escrow) == vector["fingerprint"]
    opened = key.open(escrow, vector["purpose"], bytes.fromhex(vector["context"]))
    assert opened == Secret(bytes.fromhex(vector["secret"]))


def test_independent_reader_agrees_when_key_and_escrow_are_made_just_now() -> None:
    key = RecoveryKey.generate()
    escrow = key.public.seal(SECRET, "root key", b"host 7")
    private = independent_text(key.to_text(), "VTPM-RECOVERY-KEY-1")
    assert independent_open(private, escrow, "root key", b"host 7") == SECRET.reveal()


def test_keys_and_escrows_differ_when_made_twice() -> None:
    assert RecoveryKey.generate().public != RecoveryKey.generate().public
    assert KEY.public.seal(SECRET, "root key", b"") != KEY.public.seal(SECRET, "root key", b"")


# Text


@pytest.mark.parametrize(
    "spoken",
    [
        TEXT,
        TEXT.lower(),
        TEXT.replace("\n", " ").replace("-", " "),
        TEXT.replace("-", "").replace("\n", ""),
        f"\r\n\t {TEXT} \n",
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("-", "\u2013"),
        TEXT.replace("-", "\u2010").replace("0", "O").replace("1", "l"),
        TEXT.replace("0", "o").replace("1", "I"),
    ],
)
def test_text_is_read_when_written_in_another_way(spoken: str) -> None:
    assert RecoveryKey.from_text(spoken).public == KEY.public


def test_public_text_is_one_line_and_comes_back() -> None:
    assert "\n" not in PUBLIC
    assert RecoveryPublicKey.from_text(PUBLIC) == KEY.public
    assert RecoveryPublicKey.from_text(f" {PUBLIC.lower()}\n") == KEY.public
    assert {RecoveryPublicKey.from_text(PUBLIC), KEY.public} == {KEY.public}


def test_every_wrong_character_is_found_and_its_row_named() -> None:
    body = TEXT.removeprefix(HEADING)
    for place, right in enumerate(body):
        if right not in ALPHABET:
            continue
        row = body[:place].count("\n") + 1
        for wrong in ALPHABET + "U*é":
            if wrong != right:
                with pytest.raises(UsageError, match=f"typing error in row {row} of 4"):
                    RecoveryKey.from_text(HEADING + body[:place] + wrong + body[place + 1 :])


def test_every_two_neighbours_swapped_are_found() -> None:
    body = TEXT.removeprefix(HEADING).replace("-", "").replace("\n", "")
    tried = 0
    for place in range(len(body) - 1):
        if body[place] != body[place + 1]:
            swapped = body[:place] + body[place + 1] + body[place] + body[place + 2 :]
            with pytest.raises(UsageError, match="typing error in row"):
                RecoveryKey.from_text(HEADING + swapped)
            tried += 1
    assert tried > 50


def test_rows_are_found_and_named_when_in_another_order() -> None:
    heading, one, two, three, four = TEXT.split("\n")
    with pytest.raises(UsageError, match="row 2 and 3 of 4"):
        RecoveryKey.from_text("\n".join((heading, one, three, two, four)))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "begins with VTPM-RECOVERY-KEY-1"),
        ("something else", "begins with VTPM-RECOVERY-KEY-1"),
        (PUBLIC, "this is a public recovery key; the recovery key is needed"),
        ("VTPM-RECOVERY-KEY-", "has 0 characters"),
        (HEADING, "has 0 characters"),
        (TEXT[:-1], "has 63 characters"),
        (TEXT + "0", "has 65 characters"),
        (TEXT.replace("KEY-1", "KEY-2"), "another version"),
        (TEXT + " " * 1000, "1099 characters"),
    ],
)
def test_cause_is_named_when_text_is_no_recovery_key(text: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        RecoveryKey.from_text(text)


def test_private_text_is_refused_and_not_shown_when_public_is_needed() -> None:
    with pytest.raises(UsageError, match="this is a recovery key; the public") as refusal:
        RecoveryPublicKey.from_text(TEXT)
    assert not any(row in str(refusal.value) for row in TEXT.split("\n")[1:])


def test_nothing_of_the_key_is_shown_when_its_text_is_refused() -> None:
    for text in (TEXT[:-1], TEXT + "0", TEXT.replace(TEXT[25], "U")):
        with pytest.raises(UsageError) as refusal:
            RecoveryKey.from_text(text)
        shown = "".join(str(refusal.value).split("-")).upper()
        assert not any(group in shown for row in TEXT.split("\n")[1:] for group in row.split("-"))
        assert refusal.value.__context__ is None


def test_key_is_not_shown_when_printed_formatted_pickled_or_copied() -> None:
    for text in (repr(KEY), str(KEY), f"{[KEY]}"):
        assert "redacted" in text
        assert not any(group in text for row in TEXT.split("\n")[1:] for group in row.split("-"))
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            refused(KEY)
    assert KEY.public.fingerprint in repr(KEY.public)


# Small-order points of Curve25519, and encodings that are not the one of their point.
BAD_POINTS = [
    bytes(32),
    b"\x01" + bytes(31),
    (2**255 - 20).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 10).to_bytes(32, "little"),
    b"\xff" * 32,
    bytes(31),
    bytes(33),
]


@pytest.mark.parametrize("raw", BAD_POINTS, ids=lambda raw: raw.hex()[:16])
def test_public_key_is_refused_when_it_is_of_small_order_or_not_canonical(raw: bytes) -> None:
    with pytest.raises(UsageError, match=r"no X25519 key|small order"):
        RecoveryPublicKey(raw)


# Escrow


def test_refused_when_any_bit_of_an_escrow_is_flipped() -> None:
    escrow = KEY.public.seal(SECRET, "root key", b"host 7")
    assert len(escrow) == ESCROW_BYTES
    for position in range(len(escrow)):
        for bit in range(8):
            changed = bytearray(escrow)
            changed[position] ^= 1 << bit
            with pytest.raises(StateError):
                KEY.open(bytes(changed), "root key", b"host 7")


def test_refused_when_an_escrow_is_cut_or_extended() -> None:
    escrow = KEY.public.seal(SECRET, "root key", b"")
    for wrong in [escrow[:length] for length in range(len(escrow))] + [escrow + b"\0"]:
        with pytest.raises(StateError, match=f"it has {len(wrong)} bytes"):
            KEY.open(wrong, "root key", b"")


@pytest.mark.parametrize(
    ("purpose", "context"),
    [
        ("backup", b"host 7"),
        ("root key", b"host 8"),
        ("root key", b""),
        ("root ke", b"yhost 7"),
        ("root keyh", b"ost 7"),
    ],
)
def test_refused_when_purpose_or_context_is_another(purpose: str, context: bytes) -> None:
    escrow = KEY.public.seal(SECRET, "root key", b"host 7")
    assert KEY.open(escrow, "root key", b"host 7") == SECRET
    with pytest.raises(StateError, match=f"was not sealed for this {purpose}"):
        KEY.open(escrow, purpose, context)


def test_both_fingerprints_are_named_when_key_is_anothers() -> None:
    other = RecoveryKey.generate()
    escrow = other.public.seal(SECRET, "root key", b"")
    with pytest.raises(StateError, match=f"{other.public.fingerprint}, not to {KEY.public.fingerprint}"):
        KEY.open(escrow, "root key", b"")
    # A fingerprint put there by somebody does not make it open.
    with pytest.raises(StateError, match="damaged"):
        KEY.open(escrow[:10] + KEY.public.seal(SECRET, "root key", b"")[10:30] + escrow[30:], "root key", b"")


def test_cause_is_named_when_escrow_is_of_another_format() -> None:
    escrow = KEY.public.seal(SECRET, "root key", b"")
    with pytest.raises(StateError, match="begins like this"):
        recipient(b"X" + escrow[1:])
    with pytest.raises(StateError, match="format version 2"):
        recipient(escrow[:9] + b"\x02" + escrow[10:])


@pytest.mark.parametrize("purpose", ["", "x" * 65, "rö", "a\nb"])
def test_not_sealed_when_purpose_is_out_of_bounds(purpose: str) -> None:
    with pytest.raises(StateError, match="purpose"):
        KEY.public.seal(SECRET, purpose, b"")


def test_context_is_bounded() -> None:
    largest = bytes(MAX_CONTEXT_BYTES)
    assert KEY.open(KEY.public.seal(SECRET, "p", largest), "p", largest) == SECRET
    with pytest.raises(StateError, match=f"has {MAX_CONTEXT_BYTES + 1}"):
        KEY.public.seal(SECRET, "p", largest + b"\0")


def test_public_key_has_the_bytes_that_it_was_made_from() -> None:
    public = RecoveryKey.generate().public
    assert RecoveryPublicKey(public.raw) == public


def test_own_context_is_the_private_halfs_and_no_others() -> None:
    key, other = RecoveryKey.generate(), RecoveryKey.generate()
    assert key.own_context() == RecoveryKey.from_text(key.to_text()).own_context()
    assert key.own_context() != other.own_context()
    assert key.own_context() not in (key.public.raw, bytes(32))
    with pytest.raises(StateError, match="was not sealed for this"):
        key.open(key.public.seal(Secret(bytes(32)), "root key", b""), "root key", key.own_context())
