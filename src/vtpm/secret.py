"""Keys in memory: shown by nothing, dropped on purpose.

Pure. Imported by the vault, the keeper, and whoever hands them a key.
"""

from __future__ import annotations

import hmac
from typing import NoReturn

from vtpm.errors import StateError

KEY_BYTES = 32


class Secret:
    """A KEY_BYTES key that no repr, format, log, pickle or hash shows.

    Wiping is best effort: Python and OpenSSL may have made copies, which is why the processes that hold keys
    also forbid core dumps.

    Args:
        value: KEY_BYTES bytes, copied.
    Raises:
        StateError: another length.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self._value = bytearray(value)
        if len(self._value) != KEY_BYTES:
            raise StateError(f"a key has {KEY_BYTES} bytes, this one has {len(self._value)}")

    def reveal(self) -> bytes:
        """Return the key's bytes.

        Raises:
            StateError: it was wiped.
        """
        if not self._value:
            raise StateError("this key was dropped when its use ended")
        return bytes(self._value)

    def wipe(self) -> None:
        """Overwrite the key; it can be revealed no more."""
        self._value[:] = bytes(len(self._value))
        self._value.clear()

    def __repr__(self) -> str:
        return "Secret(redacted)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not serialised")
