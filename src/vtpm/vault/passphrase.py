"""A passphrase, and the key that scrypt (RFC 7914) makes of it.

Pure. Imported by the vault's backup format and whoever asks for a passphrase.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import NoReturn

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vtpm.errors import StateError, UsageError
from vtpm.secret import KEY_BYTES, Secret

MIN_PASSPHRASE_CHARS = 12
MAX_PASSPHRASE_CHARS = 1024

MIN_LOG2_N = 14
MAX_LOG2_N = 18
"""256 MiB and less than a second of one processor: what a stranger's file may cost a reader."""
BLOCK_SIZE = 8
PARALLELISM = 1


@dataclass(frozen=True)
class ScryptCost:
    """Parameters of scrypt; it takes 128 * 2**log2_n * r bytes of memory.

    Args:
        log2_n: MIN_LOG2_N to MAX_LOG2_N.
        r, p: BLOCK_SIZE and PARALLELISM; no others are written or read.
    Raises:
        StateError: out of bounds. So a cost that exists is one that may be spent.
    """

    log2_n: int = 17
    r: int = BLOCK_SIZE
    p: int = PARALLELISM

    def __post_init__(self) -> None:
        if not MIN_LOG2_N <= self.log2_n <= MAX_LOG2_N or self.r != BLOCK_SIZE or self.p != PARALLELISM:
            raise StateError(
                f"scrypt with N=2^{self.log2_n}, r={self.r}, p={self.p} is not used here: N is 2^{MIN_LOG2_N} to "
                f"2^{MAX_LOG2_N}, r {BLOCK_SIZE}, p {PARALLELISM}"
            )


class Passphrase:
    """Words that a person remembers or keeps; shown by nothing.

    The text is normalised (Unicode NFC), so that every keyboard and system gives the same key.

    Args:
        text: MIN_PASSPHRASE_CHARS to MAX_PASSPHRASE_CHARS characters, counted as normalised.
    Raises:
        UsageError: another length, or text that has no UTF-8 form.
    """

    __slots__ = ("_bytes",)

    def __init__(self, text: str) -> None:
        # Bounded before it is normalised, too: one character may become three.
        normal = unicodedata.normalize("NFC", text) if len(text) <= 4 * MAX_PASSPHRASE_CHARS else text
        if not MIN_PASSPHRASE_CHARS <= len(normal) <= MAX_PASSPHRASE_CHARS:
            raise UsageError(
                f"a passphrase has {MIN_PASSPHRASE_CHARS} to {MAX_PASSPHRASE_CHARS} characters",
                next_step="Use several words",
            )
        try:
            self._bytes = normal.encode()
        except UnicodeEncodeError:
            # Its own message would show the passphrase.
            raise UsageError("a passphrase is text that has a UTF-8 form") from None

    def stretch(self, salt: bytes, cost: ScryptCost) -> Secret:
        """Make a key of it; takes the time and memory that `cost` says."""
        scrypt = Scrypt(salt=salt, length=KEY_BYTES, n=1 << cost.log2_n, r=cost.r, p=cost.p)
        return Secret(scrypt.derive(self._bytes))

    def __repr__(self) -> str:
        return "Passphrase(redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Passphrase is not serialised")
