"""A durable note that a recovery key was used, kept until the manager has it in its audit log. For the keeper alone.

It is written before the root key is sealed anew: a manager or keeper that dies in between leaves no recovery unsaid.
"""

from __future__ import annotations

from pathlib import Path

from vtpm.durable_file import read_file, replace_file, sync_directory
from vtpm.errors import StoreError

NOTE_FILE = "recovered"
_MAX_BYTES = 64
_WHAT = "note of a recovery"


def note(state_dir: Path, fingerprint: str) -> None:
    """Note which recovery key is about to be used. Raises StoreError: it is not durable."""
    replace_file(state_dir / NOTE_FILE, _WHAT, fingerprint.encode())


def noted(state_dir: Path) -> str:
    """Return the fingerprint of the key in the note; empty: there is none. Raises StateError: it cannot be read."""
    return (read_file(state_dir / NOTE_FILE, _WHAT, _MAX_BYTES) or b"").decode("ascii", errors="replace")[:_MAX_BYTES]


def forget(state_dir: Path) -> None:
    """Remove the note; again does nothing. Raises StoreError: it may be there again after a crash."""
    try:
        (state_dir / NOTE_FILE).unlink(missing_ok=True)
        sync_directory(state_dir)
    except OSError as error:
        raise StoreError(f"the {_WHAT} in {state_dir} cannot be removed: {error.strerror}") from error
