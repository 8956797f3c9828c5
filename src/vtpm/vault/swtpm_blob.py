"""One state file of swtpm: header, blocks, encryption; docs/state-format.md, "State directory of swtpm".

Reads what swtpm wrote, for `vtpm import`; nothing here is ever written. The format is weaker than this project's own:
its header is unauthenticated, nothing binds it to a VM, a passphrase is stretched with 1000 rounds and a fixed salt.

Pure: bytes in, bytes out. Imported by vtpm.vault.swtpm_state. C: swtpm_nvstore.c, swtpm_aes.c, key.c, tlv.c of swtpm.
"""

from __future__ import annotations

import enum
import hmac
import struct
from typing import NoReturn, Self

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256, SHA512, Hash
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.padding import PKCS7

from vtpm.errors import StateError, UsageError
from vtpm.tpm.types import MAX_STATE_BYTES

MAX_FILE_BYTES = MAX_STATE_BYTES + 1024
"""State, and more than header, padding, initialisation vector and HMAC take."""
MAX_PASSPHRASE_BYTES = 64 * 1024

_HEADER = struct.Struct(">BBHHI")
_BLOCK = struct.Struct(">HI")
_VERSION = 2
_ENCRYPTED = 0x01
_MIGRATION = 0x02 | 0x04 | 0x10
_KEY_256 = 0x08

_AES_BLOCK_BYTES = 16
_DIGEST_BYTES = 32
_KEY_SIZES = (16, 32)
_MAX_KEY_FILE_BYTES = 1024


class _Tag(enum.IntEnum):
    """Kinds of block. Those of migration (4, 5, 7) are in no file."""

    DATA = 1
    ENCRYPTED_DATA = 2
    HMAC = 3
    IV = 6


class KeyFormat(enum.StrEnum):
    """What is in a key file; swtpm's `--key format=`."""

    HEX = "hex"
    BINARY = "binary"


class Kdf(enum.StrEnum):
    """How a passphrase becomes a key; swtpm's `--key kdf=`. PBKDF2 unless told otherwise, also by libvirt."""

    PBKDF2 = "pbkdf2"
    SHA512 = "sha512"


class SwtpmKey:
    """What swtpm was given with `--key`; shown by nothing.

    Made by `from_key_file` or `from_passphrase`. The cipher's mode need not be told: each file says it.
    """

    __slots__ = ("_bytes", "_sizes")

    def __init__(self, material: bytes, sizes: tuple[int, ...]) -> None:
        self._bytes = material
        self._sizes = sizes

    @classmethod
    def from_key_file(cls, content: bytes, key_format: KeyFormat = KeyFormat.HEX) -> Self:
        """Take the content of a key file (`--key file=`, `fd=`).

        Args:
            content: 16 or 32 bytes, or as many in hexadecimal, "0x" before them allowed, up to the first white space.
        Raises:
            UsageError: it is not such a key.
        """
        key = content
        if key_format is KeyFormat.HEX:
            digits = content[:_MAX_KEY_FILE_BYTES].removeprefix(b"0x").split(None, 1)
            try:
                key = bytes.fromhex(digits[0].decode("ascii")) if digits else b""
            except ValueError:
                # Its own message would show a part of the key.
                raise UsageError("this key file of swtpm does not hold pairs of hexadecimal digits") from None
        if len(key) not in _KEY_SIZES:
            raise UsageError(
                f"this key file of swtpm has a key of {len(key)} bytes; 16 or 32 are needed",
                next_step=f"Say whether it is {KeyFormat.HEX} or {KeyFormat.BINARY}",
            )
        return cls(key, (len(key),))

    @classmethod
    def from_passphrase(cls, content: bytes, kdf: Kdf = Kdf.PBKDF2) -> Self:
        """Take the content of a passphrase file (`--key pwdfile=`, `pwdfd=`), or of libvirt's secret.

        Args:
            content: 1 to MAX_PASSPHRASE_BYTES bytes, all of them: a newline at the end counts, for it does in swtpm.
        Raises:
            UsageError: another length.
        """
        if not 1 <= len(content) <= MAX_PASSPHRASE_BYTES:
            raise UsageError(f"a passphrase of swtpm has 1 to {MAX_PASSPHRASE_BYTES} bytes, not {len(content)}")
        if kdf is Kdf.PBKDF2:
            # Salt and rounds are swtpm's. The first bytes are the same for every length that is asked for.
            material = PBKDF2HMAC(SHA512(), max(_KEY_SIZES), b"swtpm", 1000).derive(content)
        else:
            digest = Hash(SHA512())
            digest.update(content)
            material = digest.finalize()[: max(_KEY_SIZES)]
        return cls(material, _KEY_SIZES)

    def of_size(self, size_bytes: int) -> bytes | None:
        """Return the AES key of this size, None if the key is of another size."""
        return self._bytes[:size_bytes] if size_bytes in self._sizes else None

    def __repr__(self) -> str:
        return "SwtpmKey(redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SwtpmKey is not serialised")


def open_blob(name: str, content: bytes, key: SwtpmKey | None) -> bytes:
    """Return the plain state in one file of swtpm, as libtpms wrote it.

    The HMAC of an encrypted file is verified before it is decrypted. A plain file has nothing to verify; whether its
    state is sound, the engine says.

    Args:
        name: of the file, for messages.
        key: as swtpm was given it, or None. With a key, a plain file is refused: somebody may have put it there.
    Returns:
        1 to MAX_STATE_BYTES bytes.
    Raises:
        StateError: damaged, of an unknown format, not what the key fits, or plain though there is a key.
        UsageError: it is encrypted and there is no key.
    """
    if not _HEADER.size < len(content) <= MAX_FILE_BYTES:
        raise StateError(f"{name} is damaged: {len(content)} bytes are no state of swtpm")
    version, min_version, header_bytes, flags, total = _HEADER.unpack_from(content)
    if header_bytes == _HEADER.size and total == len(content):
        if version != _VERSION or min_version > _VERSION:
            raise StateError(f"{name} has format version {version} of swtpm; this program reads {_VERSION}")
        state = _open_headed(name, flags, content, key)
    elif header_bytes == _HEADER.size and version == _VERSION:
        raise StateError(f"{name} is damaged: it says it has {total} bytes, and has {len(content)}")
    else:
        state = _open_headless(name, content, key)
    if not 1 <= len(state) <= MAX_STATE_BYTES:
        raise StateError(f"{name} has a state of {len(state)} bytes; 1 to {MAX_STATE_BYTES} are possible")
    return state


def _blocks(name: str, content: bytes) -> dict[_Tag, bytes]:
    blocks: dict[_Tag, bytes] = {}
    at = _HEADER.size
    while at < len(content):
        if len(content) - at < _BLOCK.size:
            raise StateError(f"{name} is damaged: its last block is cut")
        number, size = _BLOCK.unpack_from(content, at)
        at += _BLOCK.size
        if size > len(content) - at:
            raise StateError(f"{name} is damaged: a block of {size} bytes is cut")
        if number not in list(_Tag):
            raise StateError(f"{name} has a block of kind {number}, which this program does not know")
        tag = _Tag(number)
        if tag in blocks:
            raise StateError(f"{name} is damaged: it has two blocks of kind {number}")
        blocks[tag] = content[at : at + size]
        at += size
    return blocks


def _open_headed(name: str, flags: int, content: bytes, key: SwtpmKey | None) -> bytes:
    if flags & _MIGRATION:
        raise StateError(f"{name} is what swtpm sends when it migrates, not what it stores")
    if flags & ~(_ENCRYPTED | _KEY_256):
        raise StateError(f"{name} has flags {flags:#06x}, of which this program does not know all")
    blocks = _blocks(name, content)
    if not flags & _ENCRYPTED:
        if flags or blocks.keys() != {_Tag.DATA}:
            raise StateError(f"{name} is damaged: its header says that it is plain, its blocks do not")
        return _plain(name, blocks[_Tag.DATA], key)
    # Files from before July 2018 have no initialisation vector.
    if blocks.keys() - {_Tag.IV} != {_Tag.ENCRYPTED_DATA, _Tag.HMAC}:
        raise StateError(f"{name} is damaged: its header says that it is encrypted, its blocks do not")
    key_bytes = 32 if flags & _KEY_256 else 16
    aes_key = _needed(name, key).of_size(key_bytes)
    if aes_key is None:
        raise StateError(f"{name} is encrypted with AES-{key_bytes * 8}, and the key is of another size")
    ciphertext, iv = blocks[_Tag.ENCRYPTED_DATA], blocks.get(_Tag.IV, b"")
    # The HMAC runs over both without a mark between them, so the length of one is pinned: swtpm's is the key's.
    if len(iv) not in (0, key_bytes):
        raise StateError(f"{name} is damaged: its initialisation vector has {len(iv)} bytes")
    if not hmac.compare_digest(hmac.digest(aes_key, ciphertext + iv, "sha256"), blocks[_Tag.HMAC]):
        raise StateError(
            f"{name} does not open: the key is wrong, or the file is damaged",
            next_step="For a passphrase, give it with its newline if its file has one, and name the kdf",
        )
    state = _decrypt(aes_key, iv, ciphertext)
    if state is None:
        raise StateError(f"{name} is damaged: what was encrypted is not padded as swtpm does")
    return state


def _open_headless(name: str, content: bytes, key: SwtpmKey | None) -> bytes:
    """A file from before swtpm 0.1: bare state, or AES-128 over a SHA-256 and the state, with a zero vector.

    That hash can be verified only after decryption.
    """
    # libtpms' state begins with a small u16. Ciphertext may do so too, so a key is tried first.
    seems_plain = content[0] == 0
    if seems_plain and key is None:
        return content
    aes_key = _needed(name, key).of_size(16)
    hashed = None if aes_key is None else _decrypt(aes_key, b"", content)
    if hashed is not None:
        digest = Hash(SHA256())
        digest.update(hashed[_DIGEST_BYTES:])
        if hmac.compare_digest(digest.finalize(), hashed[:_DIGEST_BYTES]):
            return hashed[_DIGEST_BYTES:]
    if seems_plain:
        return _plain(name, content, key)
    raise StateError(f"{name} does not open: the key is wrong, or the file is damaged")


def _plain(name: str, state: bytes, key: SwtpmKey | None) -> bytes:
    if key is not None:
        raise StateError(
            f"{name} is not encrypted, though there is a key: somebody may have put it there",
            next_step="If you know that it is the right one, give no key",
        )
    return state


def _needed(name: str, key: SwtpmKey | None) -> SwtpmKey:
    if key is None:
        raise UsageError(
            f"{name} is encrypted, or no state of swtpm", next_step="Give the key that swtpm was given with --key"
        )
    return key


def _decrypt(aes_key: bytes, iv: bytes, ciphertext: bytes) -> bytes | None:
    """Decrypt AES-CBC; None where the padding is not swtpm's, which is PKCS #7 to the size of the key."""
    decryptor = Cipher(algorithms.AES(aes_key), modes.CBC(iv[:_AES_BLOCK_BYTES] or bytes(_AES_BLOCK_BYTES))).decryptor()
    unpadder = PKCS7(8 * len(aes_key)).unpadder()
    try:
        padded = decryptor.update(ciphertext) + decryptor.finalize()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError:
        return None
