"""Writes state files as swtpm does, from its format alone. Test code only.

tests/integration/vault/test_swtpm_import.py shows that Debian's swtpm takes these for its own.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

DATA, ENCRYPTED, HMAC, IV = 1, 2, 3, 6


def block(tag: int, content: bytes) -> bytes:
    return struct.pack(">HI", tag, len(content)) + content


def headed(blocks: bytes, flags: int = 0, version: int = 2, min_version: int = 1) -> bytes:
    return struct.pack(">BBHHI", version, min_version, 10, flags, 10 + len(blocks)) + blocks


def plain(state: bytes) -> bytes:
    return headed(block(DATA, state))


def cbc(key: bytes, iv: bytes, data: bytes) -> bytes:
    padding = len(key) - len(data) % len(key)
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv[:16])).encryptor()
    return encryptor.update(data + bytes([padding]) * padding) + encryptor.finalize()


def flags_for(key: bytes) -> int:
    return 0x01 | (0x08 if len(key) == 32 else 0)


def encrypted(state: bytes, key: bytes, iv: bytes = b"") -> bytes:
    """With an initialisation vector of the key's length; without one as before July 2018."""
    ciphertext = cbc(key, iv or bytes(16), state)
    mac = hmac.digest(key, ciphertext + iv, "sha256")
    blocks = block(ENCRYPTED, ciphertext) + block(HMAC, mac) + (block(IV, iv) if iv else b"")
    return headed(blocks, flags_for(key))


def headless(state: bytes, key: bytes | None = None) -> bytes:
    """As before swtpm 0.1."""
    return state if key is None else cbc(key, bytes(16), hashlib.sha256(state).digest() + state)
