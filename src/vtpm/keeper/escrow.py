"""The escrow file: the root key, sealed to the offline recovery key; and that key's public half. For the keeper alone.

One escrow (docs/state-format.md, "Recovery key"), and while a new recovery key is not confirmed a second one: both open
the root key, until whoever asked for the new key says that he has it. Nothing in them is secret. The context of one
follows from the private half, which the keeper has when it makes one: whoever has the public half alone cannot make an
escrow of a root key of his own that opens.

The public half is what backups are sealed to. Whoever could replace it would read them, so it bears a MAC under the
root key.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from vtpm.durable_file import read_file, rename_file, replace_file
from vtpm.errors import NotFoundError, StateError
from vtpm.recovery_key import ESCROW_BYTES, RecoveryKey, RecoveryPublicKey, recipient
from vtpm.secret import KEY_BYTES, Secret

ESCROW_FILE = "root.escrow"
PENDING_FILE = "root.escrow.unconfirmed"
PUBLIC_FILE = "recovery.public"
PURPOSE = "root key"
_WHAT = "escrow file"
_PUBLIC_WHAT = "file of the public recovery key"
_MAC_LABEL = b"vtpm recovery public key mac v1"
_MAC_BYTES = 32


def make_recovery_key(state_dir: Path, root: Secret) -> RecoveryKey:
    """Make a recovery key, and escrow the root key to it in the place of an earlier one that was not confirmed.

    Raises:
        StoreError: the escrow is not durable.
    """
    key = RecoveryKey.generate()
    replace_file(state_dir / PENDING_FILE, _WHAT, key.public.seal(root, PURPOSE, key.own_context()))
    return key


def confirm_recovery_key(state_dir: Path, root: Secret, public: RecoveryPublicKey) -> None:
    """Let this recovery key count, which somebody has, and the one before it no more; again is harmless.

    Raises:
        NotFoundError: it is not the one that was made last.
        StateError: an escrow is damaged.
        StoreError: this is not durable; both may open the root key still.
    """
    pending = _read(state_dir, PENDING_FILE)
    if pending is not None and recipient(pending) == public.fingerprint:
        rename_file(state_dir / PENDING_FILE, _WHAT, state_dir / ESCROW_FILE)
    elif fingerprint(state_dir) != public.fingerprint:
        raise NotFoundError(
            f"no recovery key {public.fingerprint} waits to be confirmed", next_step="Make a new one: vtpm recovery-key"
        )
    # Second: after a crash between them it is not the escrow's key, and so is not taken for one that somebody has.
    replace_file(state_dir / PUBLIC_FILE, _PUBLIC_WHAT, public.raw + _mac(root, public.raw))


def exists(state_dir: Path) -> bool:
    """Whether there is an escrow, whatever state it is in: then there was a root key here."""
    return any(os.path.lexists(state_dir / name) for name in (ESCROW_FILE, PENDING_FILE))


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
    escrows = [found for name in (ESCROW_FILE, PENDING_FILE) if (found := _read(state_dir, name)) is not None]
    if not escrows:
        raise StateError(
            "no recovery key was ever made for this host, so none opens its root key",
            next_step="Put the platform back as it was when the root key was sealed",
        )
    # The one that counts says what is wrong, unless the other one is this key's.
    escrow = next((found for found in escrows[1:] if _is_for(found, key)), escrows[0])
    return key.open(escrow, PURPOSE, key.own_context())


def fingerprint(state_dir: Path) -> str:
    """Return which recovery key opens the escrow that counts, as it says; empty when there is none.

    Raises:
        StateError: it is damaged.
    """
    escrow = _read(state_dir, ESCROW_FILE)
    return "" if escrow is None else recipient(escrow)


def unconfirmed(state_dir: Path) -> bool:
    """Whether there is an escrow to a recovery key of which nobody said that he has it."""
    return os.path.lexists(state_dir / PENDING_FILE)


def _mac(root: Secret, raw: bytes) -> bytes:
    mac_key = HKDFExpand(SHA256(), KEY_BYTES, _MAC_LABEL).derive(root.reveal())
    return hmac.digest(mac_key, raw, "sha256")


def _is_for(escrow: bytes, key: RecoveryKey) -> bool:
    try:
        return recipient(escrow) == key.public.fingerprint
    except StateError:
        return False


def _read(state_dir: Path, name: str) -> bytes | None:
    return read_file(state_dir / name, _WHAT, ESCROW_BYTES)
