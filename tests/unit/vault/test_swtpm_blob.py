from __future__ import annotations

import copy
import hashlib
import hmac
import pickle

import pytest

from tests.unit.vault.swtpm_files import (
    DATA,
    ENCRYPTED,
    HMAC,
    IV,
    block,
    cbc,
    encrypted,
    flags_for,
    headed,
    headless,
    plain,
)
from vtpm.errors import StateError, UsageError
from vtpm.tpm.types import MAX_STATE_BYTES
from vtpm.vault.swtpm_blob import MAX_FILE_BYTES, Kdf, KeyFormat, SwtpmKey, open_blob

STATE = b"\x00\x03\xab\x36\x47\x23 state of libtpms"
PASSPHRASE = b"my passphrase\n"
PBKDF2 = hashlib.pbkdf2_hmac("sha512", PASSPHRASE, b"swtpm", 1000, 32)
KEY_16, KEY_32 = bytes(range(16)), bytes(range(32))
RAW_16, RAW_32 = (SwtpmKey.from_key_file(key, KeyFormat.BINARY) for key in (KEY_16, KEY_32))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (plain(STATE), None),
        (encrypted(STATE, KEY_16, KEY_16[::-1]), RAW_16),
        (encrypted(STATE, KEY_32, KEY_32[::-1]), RAW_32),
        (encrypted(STATE, PBKDF2[:16], KEY_16), SwtpmKey.from_passphrase(PASSPHRASE)),
        (encrypted(STATE, PBKDF2, KEY_32), SwtpmKey.from_passphrase(PASSPHRASE)),
        (encrypted(STATE, hashlib.sha512(b"x").digest()[:16], KEY_16), SwtpmKey.from_passphrase(b"x", Kdf.SHA512)),
        (encrypted(STATE, hashlib.sha512(b"x").digest()[:32], KEY_32), SwtpmKey.from_passphrase(b"x", Kdf.SHA512)),
        (encrypted(STATE, KEY_16), RAW_16),
        (headless(STATE), None),
        (headless(STATE, KEY_16), RAW_16),
        (headless(STATE, PBKDF2[:16]), SwtpmKey.from_passphrase(PASSPHRASE)),
    ],
    ids=[
        "plain",
        "AES-128",
        "AES-256",
        "PBKDF2-128",
        "PBKDF2-256",
        "SHA512-128",
        "SHA512-256",
        "no vector",
        "headless plain",
        "headless AES-128",
        "headless PBKDF2",
    ],
)
def test_state_comes_out_when_written_as_swtpm_does(content: bytes, key: SwtpmKey | None) -> None:
    assert open_blob("f", content, key) == STATE


def test_headless_state_comes_out_when_its_ciphertext_begins_as_plain_state_does() -> None:
    states = (STATE + number.to_bytes(2, "big") for number in range(65536))
    state = next(state for state in states if headless(state, KEY_16)[0] == 0)
    assert open_blob("f", headless(state, KEY_16), RAW_16) == state


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_state_of_any_length_comes_out_when_padded_to_the_key(length: int) -> None:
    state = bytes(range(1, length + 1))
    for key, raw in ((KEY_16, RAW_16), (KEY_32, RAW_32)):
        assert open_blob("f", encrypted(state, key, key), raw) == state


def test_state_of_the_largest_size_comes_out() -> None:
    state = bytes(MAX_STATE_BYTES)
    assert open_blob("f", plain(state), None) == state
    assert open_blob("f", encrypted(state, KEY_32, KEY_32), RAW_32) == state
    with pytest.raises(StateError, match=f"{MAX_STATE_BYTES + 1} bytes"):
        open_blob("f", plain(state + b"\0"), None)
    with pytest.raises(StateError, match=f"{MAX_FILE_BYTES + 1} bytes"):
        open_blob("f", bytes(MAX_FILE_BYTES + 1), None)


# Keys


@pytest.mark.parametrize(
    "content",
    [b"%s", b"0x%s", b"%s\n", b"%s and a remark", b"0x%s \r\n"],
)
def test_hexadecimal_key_is_read_as_swtpm_reads_it(content: bytes) -> None:
    for key in (KEY_16, KEY_32):
        digits = content % key.hex().encode()
        assert SwtpmKey.from_key_file(digits).of_size(len(key)) == key
        assert SwtpmKey.from_key_file(digits.upper().replace(b"0X", b"0x")).of_size(len(key)) == key


@pytest.mark.parametrize(
    ("content", "key_format", "cause"),
    [
        (b"", KeyFormat.HEX, "a key of 0 bytes"),
        (b"\n", KeyFormat.HEX, "a key of 0 bytes"),
        (b"00" * 15, KeyFormat.HEX, "a key of 15 bytes"),
        (b"00" * 33, KeyFormat.HEX, "a key of 33 bytes"),
        (b"00" * 1_000_000, KeyFormat.HEX, "a key of 512 bytes"),
        (b"0" * 31, KeyFormat.HEX, "pairs of hexadecimal"),
        (b"secret" * 8, KeyFormat.HEX, "pairs of hexadecimal"),
        (KEY_16, KeyFormat.HEX, "pairs of hexadecimal"),
        (b"\xff" * 32, KeyFormat.HEX, "pairs of hexadecimal"),
        (b"", KeyFormat.BINARY, "a key of 0 bytes"),
        (KEY_16.hex().encode() + b"\n", KeyFormat.BINARY, "a key of 33 bytes"),
    ],
)
def test_key_file_is_refused_and_not_shown_when_it_has_no_key(
    content: bytes, key_format: KeyFormat, cause: str
) -> None:
    with pytest.raises(UsageError, match=cause) as refusal:
        SwtpmKey.from_key_file(content, key_format)
    assert "secret" not in str(refusal.value)
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


@pytest.mark.parametrize("content", [b"", bytes(64 * 1024 + 1)])
def test_passphrase_is_refused_when_empty_or_too_long(content: bytes) -> None:
    with pytest.raises(UsageError, match=f"not {len(content)}"):
        SwtpmKey.from_passphrase(content)


def test_key_is_not_shown_when_printed_pickled_or_copied() -> None:
    key = SwtpmKey.from_key_file(b"K" * 32, KeyFormat.BINARY)
    for text in (repr(key), str(key), f"{[key]}"):
        assert "KKK" not in text
        assert "redacted" in text
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            refused(key)


# Refusals


def test_missing_key_is_named_when_file_is_encrypted() -> None:
    for content in (encrypted(STATE, KEY_16, KEY_16), headless(STATE, KEY_16)):
        with pytest.raises(UsageError, match=r"f is encrypted.*Give the key"):
            open_blob("f", content, None)


@pytest.mark.parametrize("iv", [KEY_16, b""])
def test_wrong_key_is_named_when_hmac_does_not_verify(iv: bytes) -> None:
    content = encrypted(STATE, KEY_16, iv)
    wrong = SwtpmKey.from_key_file(bytes(16), KeyFormat.BINARY)
    for key in (wrong, SwtpmKey.from_passphrase(PASSPHRASE)):
        with pytest.raises(StateError, match="the key is wrong, or the file is damaged"):
            open_blob("f", content, key)


def test_passphrase_without_its_newline_is_another_one() -> None:
    content = encrypted(STATE, PBKDF2, KEY_32)
    with pytest.raises(StateError, match="newline"):
        open_blob("f", content, SwtpmKey.from_passphrase(PASSPHRASE.strip()))


def test_size_of_key_is_named_when_it_is_another_one() -> None:
    with pytest.raises(StateError, match="AES-128, and the key is of another size"):
        open_blob("f", encrypted(STATE, KEY_16, KEY_16), RAW_32)
    with pytest.raises(StateError, match="AES-256, and the key is of another size"):
        open_blob("f", encrypted(STATE, KEY_32, KEY_32), RAW_16)
    with pytest.raises(StateError, match="the key is wrong"):
        open_blob("f", headless(STATE, KEY_16), RAW_32)


@pytest.mark.parametrize("content", [plain(STATE), headless(STATE)], ids=["plain", "headless"])
def test_plain_file_is_refused_when_there_is_a_key(content: bytes) -> None:
    with pytest.raises(StateError, match="somebody may have put it there"):
        open_blob("f", content, RAW_16)


@pytest.mark.parametrize(("key", "raw"), [(KEY_16, RAW_16), (KEY_32, RAW_32)], ids=["128", "256"])
def test_refused_when_any_bit_of_an_encrypted_file_is_flipped(key: bytes, raw: SwtpmKey) -> None:
    content = encrypted(STATE, key, key[::-1])
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            if position == 1 and changed[1] <= 2:
                continue  # the least version that reads it: swtpm writes 1, and 0 and 2 would mean the same
            with pytest.raises((StateError, UsageError)):
                open_blob("f", bytes(changed), raw)


def test_refused_when_any_bit_of_a_headless_encrypted_file_is_flipped() -> None:
    content = headless(STATE, KEY_16)
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            with pytest.raises(StateError):
                open_blob("f", bytes(changed), RAW_16)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (plain(STATE), None),
        (encrypted(STATE, KEY_16, KEY_16), RAW_16),
        (encrypted(STATE, KEY_32, KEY_32), RAW_32),
        (headless(STATE, KEY_16), RAW_16),
    ],
    ids=["plain", "AES-128", "AES-256", "headless AES-128"],
)
def test_refused_when_cut_or_extended_anywhere(content: bytes, key: SwtpmKey | None) -> None:
    for length in range(len(content)):
        with pytest.raises(StateError, match=r"damaged"):
            open_blob("f", content[:length], key)
    with pytest.raises(StateError, match=r"damaged"):
        open_blob("f", content + b"\0", key)


def test_refused_before_decryption_when_hmac_is_moved_or_vector_is_taken_away() -> None:
    iv = KEY_16[::-1]
    ciphertext = cbc(KEY_16, iv, STATE)
    mac = block(HMAC, hmac.digest(KEY_16, ciphertext + iv, "sha256"))
    flags = flags_for(KEY_16)
    # Each of these has the right HMAC, for it runs over the ciphertext and the vector without a mark between them.
    for blocks in (
        block(ENCRYPTED, ciphertext[:-16]) + mac + block(IV, ciphertext[-16:] + iv),
        block(ENCRYPTED, ciphertext[:-1]) + mac + block(IV, ciphertext[-1:] + iv),
        block(ENCRYPTED, ciphertext + iv[:1]) + mac + block(IV, iv[1:]),
    ):
        with pytest.raises(StateError, match="initialisation vector has"):
            open_blob("f", headed(blocks, flags), RAW_16)
    with pytest.raises(StateError, match="padded"):
        open_blob("f", headed(block(ENCRYPTED, ciphertext + iv) + mac, flags), RAW_16)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_refused_when_ciphertext_is_not_whole_blocks(size: int) -> None:
    ciphertext = bytes(size)
    mac = block(HMAC, hmac.digest(KEY_16, ciphertext + KEY_16, "sha256"))
    content = headed(block(ENCRYPTED, ciphertext) + mac + block(IV, KEY_16), flags_for(KEY_16))
    with pytest.raises(StateError, match="padded"):
        open_blob("f", content, RAW_16)


_ENCRYPTED_BLOCKS = encrypted(STATE, KEY_16, KEY_16)[10:]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "0 bytes are no state"),
        (headed(b""), "10 bytes are no state"),
        (headed(block(DATA, STATE), version=3), "format version 3"),
        (headed(block(DATA, STATE), version=1), "format version 1"),
        (headed(block(DATA, STATE), version=0), "format version 0"),
        (headed(block(DATA, STATE), version=3, min_version=3), "format version 3"),
        (headed(block(DATA, STATE), min_version=3), "format version 2"),
        (plain(STATE)[:-1], "it says it has"),
        (headed(block(DATA, STATE) + b"\0" * 5), "last block is cut"),
        (headed(block(DATA, STATE) + b"\0\x01\xff\xff\xff\xff"), "4294967295 bytes is cut"),
        (headed(block(DATA, STATE) * 2), "two blocks of kind 1"),
        (headed(block(8, STATE)), "kind 8"),
        (headed(block(4, block(DATA, STATE)), flags=0x04), "when it migrates"),
        (headed(block(5, STATE), flags=0x02), "when it migrates"),
        (headed(block(4, STATE)), "kind 4"),
        (headed(block(DATA, STATE), flags=0x20), "flags 0x0020"),
        (headed(block(DATA, STATE), flags=0x8001), "flags 0x8001"),
        (headed(block(DATA, STATE), flags=0x08), "its header says that it is plain"),
        (headed(block(DATA, STATE), flags=0x01), "its header says that it is encrypted"),
        (headed(_ENCRYPTED_BLOCKS), "its header says that it is plain"),
        (headed(block(DATA, STATE) + _ENCRYPTED_BLOCKS, flags=1), "its header says that it is encrypted"),
        (headed(block(HMAC, bytes(32)) + block(IV, KEY_16), flags=1), "its header says that it is encrypted"),
        (headed(block(ENCRYPTED, bytes(32)) + block(IV, KEY_16), flags=1), "its header says that it is encrypted"),
        (headed(block(DATA, b"")), "a state of 0 bytes"),
    ],
    ids=lambda value: value[:24].hex() if isinstance(value, bytes) else value,
)
def test_cause_is_named_when_file_is_damaged_or_of_another_format(content: bytes, cause: str) -> None:
    with pytest.raises(StateError, match=cause):
        open_blob("f", content, None)


def test_refused_when_encrypted_state_is_empty() -> None:
    for content in (encrypted(b"", KEY_16, KEY_16), headless(b"", KEY_16)):
        with pytest.raises(StateError, match="a state of 0 bytes"):
            open_blob("f", content, RAW_16)
