"""The escrow file: the root key, sealed to the offline recovery key; and that key's public half. For the keeper alone.

One escrow (docs/state-format.md, "Recovery key"), replaced whole when a new recovery key is made. Nothing in it is
secret. Its context follows from the private half, which the keeper has when it makes one: whoever has the public half
alone cannot make an escrow of a root key of his own that opens.

The public half is what backups are sealed to. Whoever could replace it would read them, so it bears a MAC under the
root key.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from vtpm.errors import StateError
from vtpm.keeper.durable_file import read_file, replace_file
from vtpm.recovery_key import ESCROW_BYTES, RecoveryKey, RecoveryPublicKey, recipient
from vtpm.secret import KEY_BYTES, Secret

ESCROW_FILE = "root.escrow"
PUBLIC_FILE = "recovery.public"
PURPOSE = "root key"
_WHAT = "escrow file"
_PUBLIC_WHAT = "file of the public recovery key"
_MAC_LABEL = b"vtpm recovery public key mac v1"
_MAC_BYTES = 32


def make_recovery_key(state_dir: Path, root: Secret) -> RecoveryKey:
    """Make a recovery key, and escrow the root key to it in the place of an earlier one.

    Raises:
        StoreError: the escrow is not durable; the earlier one may count still.
    """
    key = RecoveryKey.generate()
    replace_file(state_dir / ESCROW_FILE, _WHAT, key.public.seal(root, PURPOSE, key.own_context()))
    # Second: after a crash between them it is not the escrow's key, and so is not taken for one that somebody has.
    raw = key.public.raw
    replace_file(state_dir / PUBLIC_FILE, _PUBLIC_WHAT, raw + _mac(root, raw))
    return key


def exists(state_dir: Path) -> bool:
    """Whether there is an escrow, whatever state it is in: then there was a root key here."""
    return os.path.lexists(state_dir / ESCROW_FILE)


def public_key(state_dir: Path, root: Secret) -> RecoveryPublicKey | None:
    """Return the public half of the recovery key that the root key is escrowed to; None where it is not kept.

    Raises:
        StateError: the file was not written by a keeper that has this root key, or the escrow is damaged.
    """
    path = state_dir / PUBLIC_FILE
    data = read_file(path, _PUBLIC_WHAT, KEY_BYTES + _MAC_BYTES)
    if data is None:
        return None
    raw, mac = data[:KEY_BYTES], data[KEY_BYTES:]
    if not hmac.compare_digest(mac, _mac(root, raw)):
        raise StateError(
            f"the {_PUBLIC_WHAT} {path} was not written by this host's keeper",
            next_step="Keep it as evidence, and make a new recovery key",
        )
    key = RecoveryPublicKey(raw)
    return key if key.fingerprint == fingerprint(state_dir) else None


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
    return key.open(escrow, PURPOSE, key.own_context())


def fingerprint(state_dir: Path) -> str:
    """Return which recovery key opens the escrow, as it says; empty when there is none.

    Raises:
        StateError: it is damaged.
    """
    escrow = _read(state_dir)
    return "" if escrow is None else recipient(escrow)


def _mac(root: Secret, raw: bytes) -> bytes:
    mac_key = HKDFExpand(SHA256(), KEY_BYTES, _MAC_LABEL).derive(root.reveal())
    return hmac.digest(mac_key, raw, "sha256")


def _read(state_dir: Path) -> bytes | None:
    return read_file(state_dir / ESCROW_FILE, _WHAT, ESCROW_BYTES)
