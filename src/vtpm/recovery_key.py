"""The offline recovery key: made once, kept on paper, opens what was escrowed to it; docs/state-format.md,
"Recovery key".

Escrow is HPKE (RFC 9180) in base mode with X25519, HKDF-SHA256 and AES-256-GCM. Base mode says nothing about the
sender: whoever has the public key can make an escrow that opens.

Pure. Imported by the keeper, the vault, and whoever shows or reads the key's text.
"""

from __future__ import annotations

import base64
import enum
import struct
from binascii import crc_hqx
from typing import NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from vtpm.errors import StateError, UsageError
from vtpm.secret import KEY_BYTES, Secret

FINGERPRINT_BYTES = 20
MAX_PURPOSE_CHARS = 64
MAX_CONTEXT_BYTES = 4096

_MAGIC = b"VTPMESCR"
_ESCROW_VERSION = 1
_HEADER = struct.Struct(f">8sH{FINGERPRINT_BYTES}s")
# The suite's encapsulated key and tag have 32 and 16 bytes.
ESCROW_BYTES = _HEADER.size + 32 + KEY_BYTES + 16

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_INFO = b"vtpm recovery escrow v1"
_FINGERPRINT_LABEL = b"vtpm recovery public key v1"
_OWN_CONTEXT_LABEL = b"vtpm recovery own context v1"
_FIELD_PRIME = 2**255 - 19

_SYMBOLS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RFC_4648 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_TO_CROCKFORD = str.maketrans(_RFC_4648, _SYMBOLS)
_FROM_CROCKFORD = str.maketrans(_SYMBOLS, _RFC_4648)
# What people and word processors put between groups, and the letters that Crockford's alphabet leaves out.
_NORMAL = str.maketrans("OIL", "011", "-\u2010\u2011\u2012\u2013\u2014\u2212")

_TEXT_VERSION = "1"
_ROWS = 4
_ROW_BYTES = KEY_BYTES // _ROWS
_ROW_SYMBOLS = (_ROW_BYTES + 2) * 8 // 5
_GROUP_SYMBOLS = 4
_MAX_TEXT_CHARS = 1000


class _Kind(enum.StrEnum):
    """How the text of each half begins, before its version."""

    PRIVATE = "VTPM-RECOVERY-KEY-"
    PUBLIC = "VTPM-RECOVERY-PUBLIC-"

    @property
    def noun(self) -> str:
        return "recovery key" if self is _Kind.PRIVATE else "public recovery key"


class RecoveryPublicKey:
    """The half that seals, and may be shown to anybody.

    Args:
        raw: KEY_BYTES bytes, an X25519 public key as in RFC 7748.
    Raises:
        UsageError: not the one encoding of a point of large order.
    """

    __slots__ = ("_key", "_raw")

    def __init__(self, raw: bytes) -> None:
        # Another encoding of the same point would seal what the private key then refuses to open.
        if len(raw) != KEY_BYTES or int.from_bytes(raw, "little") >= _FIELD_PRIME:
            raise UsageError("this public recovery key is no X25519 key")
        self._raw = bytes(raw)
        self._key = X25519PublicKey.from_public_bytes(self._raw)
        try:
            X25519PrivateKey.generate().exchange(self._key)
        except ValueError:
            raise UsageError("this public recovery key is of small order: anybody could open what it seals") from None

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read the text form; case, spaces, hyphens and line breaks do not matter, O is 0, I and L are 1.

        Raises:
            UsageError: not such a text; says what is wrong and in which row.
        """
        return cls(_read(_Kind.PUBLIC, text))

    @property
    def raw(self) -> bytes:
        """Its KEY_BYTES bytes, as in RFC 7748."""
        return self._raw

    @property
    def fingerprint(self) -> str:
        """What operators compare: FINGERPRINT_BYTES of a SHA-256, in eight groups of four characters."""
        return _grouped(self._digest())

    def to_text(self) -> str:
        """Return the text form, one line."""
        return "-".join(_rows(_Kind.PUBLIC, self._raw))

    def seal(self, secret: Secret, purpose: str, context: bytes) -> bytes:
        """Seal a key so that the recovery key alone opens it.

        Args:
            purpose: what it is for, 1 to MAX_PURPOSE_CHARS printable ASCII characters; "root key", "backup".
            context: up to MAX_CONTEXT_BYTES bytes that must be the same when it is opened.
        Returns:
            The escrow, ESCROW_BYTES bytes; another one each time.
        Raises:
            StateError: purpose or context out of bounds.
        """
        header = _HEADER.pack(_MAGIC, _ESCROW_VERSION, self._digest())
        return header + _SUITE.encrypt(secret.reveal(), self._key, info=_info(header, purpose, context))

    def _digest(self) -> bytes:
        digest = Hash(SHA256())
        digest.update(_FINGERPRINT_LABEL + self._raw)
        return digest.finalize()[:FINGERPRINT_BYTES]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecoveryPublicKey) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"RecoveryPublicKey({self.fingerprint})"


class RecoveryKey:
    """The half that opens. It leaves this object by `to_text` and by no other way.

    It cannot be wiped from memory: OpenSSL holds it. So the process that makes or reads one should do little else.

    Args:
        key: an X25519 private key.
    """

    __slots__ = ("_key", "public")

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key
        self.public = RecoveryPublicKey(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Self:
        """Make a new one."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read the text form, as tolerantly as that of the public half.

        Raises:
            UsageError: not such a text; says what is wrong and in which row, and shows nothing of it.
        """
        return cls(X25519PrivateKey.from_private_bytes(_read(_Kind.PRIVATE, text)))

    def to_text(self) -> str:
        """Return the text form for paper: a heading and four rows of four groups."""
        return "\n".join(_rows(_Kind.PRIVATE, self._key.private_bytes_raw()))

    def own_context(self) -> bytes:
        """Return a context that nobody knows who has the public half alone: such an escrow its holder has made."""
        return HKDFExpand(SHA256(), KEY_BYTES, _OWN_CONTEXT_LABEL).derive(self._key.private_bytes_raw())

    def open(self, escrow: bytes, purpose: str, context: bytes) -> Secret:
        """Open an escrow.

        Args:
            purpose, context: as they were when it was sealed.
        Raises:
            StateError: damaged, of an unknown format, sealed to another key or for another purpose or context.
        """
        sealed_to = recipient(escrow)
        if sealed_to != self.public.fingerprint:
            raise StateError(
                f"this escrow is sealed to recovery key {sealed_to}, not to {self.public.fingerprint}",
                next_step="Use the recovery key with the first fingerprint",
            )
        header, sealed = escrow[: _HEADER.size], escrow[_HEADER.size :]
        try:
            return Secret(_SUITE.decrypt(sealed, self._key, info=_info(header, purpose, context)))
        except InvalidTag:
            raise StateError(f"this escrow is damaged, or was not sealed for this {purpose}") from None

    def __repr__(self) -> str:
        return f"RecoveryKey(redacted, public {self.public.fingerprint})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RecoveryKey is not serialised")


def recipient(escrow: bytes) -> str:
    """Return the fingerprint of the key that an escrow says it is sealed to; nothing vouches for it yet.

    Raises:
        StateError: not an escrow of a known format.
    """
    if len(escrow) != ESCROW_BYTES:
        raise StateError(f"this escrow is damaged: it has {len(escrow)} bytes, not {ESCROW_BYTES}")
    magic, version, digest = _HEADER.unpack_from(escrow)
    if magic != _MAGIC:
        raise StateError("this escrow is damaged: no escrow begins like this")
    if version != _ESCROW_VERSION:
        raise StateError(
            f"this escrow has format version {version}; this program reads {_ESCROW_VERSION}",
            next_step="Use the program that wrote it",
        )
    return _grouped(digest)


def _info(header: bytes, purpose: str, context: bytes) -> bytes:
    if not (1 <= len(purpose) <= MAX_PURPOSE_CHARS and purpose.isascii() and purpose.isprintable()):
        raise StateError(f"an escrow's purpose has 1 to {MAX_PURPOSE_CHARS} printable ASCII characters")
    if len(context) > MAX_CONTEXT_BYTES:
        raise StateError(f"an escrow's context has at most {MAX_CONTEXT_BYTES} bytes, this one has {len(context)}")
    return _INFO + header + bytes([len(purpose)]) + purpose.encode("ascii") + context


def _rows(kind: _Kind, data: bytes) -> list[str]:
    rows = [kind + _TEXT_VERSION]
    for row in range(_ROWS):
        part = data[row * _ROW_BYTES : (row + 1) * _ROW_BYTES]
        rows.append(_grouped(part + _check(kind, row, part)))
    return rows


def _read(kind: _Kind, text: str) -> bytes:
    if len(text) > _MAX_TEXT_CHARS:
        raise UsageError(f"this is no {kind.noun}: it has {len(text)} characters")
    symbols = _normal(text)
    found = next((each for each in _Kind if symbols.startswith(_normal(each))), None)
    if found is None:
        raise UsageError(f"this is no {kind.noun}: such a text begins with {kind}{_TEXT_VERSION}")
    if found is not kind:
        raise UsageError(f"this is a {found.noun}; the {kind.noun} is needed")
    version, body = symbols[len(_normal(found)) :][:1], symbols[len(_normal(found)) + 1 :]
    if version not in ("", _TEXT_VERSION):
        raise UsageError(
            f"this {kind.noun} is of another version; this program reads {_TEXT_VERSION}",
            next_step="Use the program that made it, and check the heading",
        )
    if len(body) != _ROWS * _ROW_SYMBOLS:
        raise UsageError(
            f"this {kind.noun} has {len(body)} characters after its heading; {_ROWS * _ROW_SYMBOLS} are needed",
            next_step=f"Each of the {_ROWS} rows has {_ROW_SYMBOLS}",
        )
    parts = [_read_row(kind, row, body[row * _ROW_SYMBOLS : (row + 1) * _ROW_SYMBOLS]) for row in range(_ROWS)]
    wrong = " and ".join(str(row) for row, part in enumerate(parts, 1) if part is None)
    if wrong:
        raise UsageError(
            f"this {kind.noun} has a typing error in row {wrong} of {_ROWS}",
            next_step=f"Compare its {_ROW_SYMBOLS} characters with the paper",
        )
    return b"".join(part for part in parts if part is not None)


def _read_row(kind: _Kind, row: int, symbols: str) -> bytes | None:
    if not set(symbols) <= set(_SYMBOLS):
        return None
    data = base64.b32decode(symbols.translate(_FROM_CROCKFORD))
    part, check = data[:_ROW_BYTES], data[_ROW_BYTES:]
    return part if check == _check(kind, row, part) else None


def _check(kind: _Kind, row: int, part: bytes) -> bytes:
    # A CRC finds every single wrong character and every two neighbours swapped; a hash would miss one in 65536.
    # The row's number in it finds rows written in another order.
    start = crc_hqx(f"{kind}{_TEXT_VERSION}/{row}".encode("ascii"), 0xFFFF)
    return crc_hqx(part, start).to_bytes(2, "big")


def _normal(text: str) -> str:
    return "".join(text.upper().split()).translate(_NORMAL)


def _grouped(data: bytes) -> str:
    symbols = base64.b32encode(data).decode("ascii").translate(_TO_CROCKFORD)
    return "-".join(symbols[at : at + _GROUP_SYMBOLS] for at in range(0, len(symbols), _GROUP_SYMBOLS))
