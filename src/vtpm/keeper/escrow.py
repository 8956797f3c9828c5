"""The escrow file: the root key, sealed to the offline recovery key. For the keeper alone.

One escrow (docs/state-format.md, "Recovery key"), replaced whole when a new recovery key is made. Nothing in it is
secret. Whoever replaces it gains nothing: a root key that the vault was not written under opens nothing.
"""

from __future__ import annotations

from pathlib import Path

from vtpm.errors import StateError
from vtpm.keeper.durable_file import read_file, replace_file
from vtpm.recovery_key import ESCROW_BYTES, RecoveryKey, recipient
from vtpm.secret import Secret

ESCROW_FILE = "root.escrow"
PURPOSE = "root key"
_WHAT = "escrow file"


def make_recovery_key(state_dir: Path, root: Secret) -> RecoveryKey:
    """Make a recovery key, and escrow the root key to it in the place of an earlier one.

    Raises:
        StoreError: the escrow is not durable; the earlier one may count still.
    """
    key = RecoveryKey.generate()
    replace_file(state_dir / ESCROW_FILE, _WHAT, key.public.seal(root, PURPOSE, b""))
    return key


def open_escrow(state_dir: Path, key: RecoveryKey) -> Secret:
    """Return the root key.

    Raises:
        StateError: nothing was escrowed, or not to this key, or it is damaged.
    """
    escrow = _read(state_dir)
    if escrow is None:
        raise StateError(
            "no recovery key was ever made for this host, so none opens its root key",
            next_step="Put the platform back as it was when the root key was sealed",
        )
    return key.open(escrow, PURPOSE, b"")


def fingerprint(state_dir: Path) -> str:
    """Return which recovery key opens the escrow, as it says; empty when there is none.

    Raises:
        StateError: it is damaged.
    """
    escrow = _read(state_dir)
    return "" if escrow is None else recipient(escrow)


def _read(state_dir: Path) -> bytes | None:
    return read_file(state_dir / ESCROW_FILE, _WHAT, ESCROW_BYTES)
