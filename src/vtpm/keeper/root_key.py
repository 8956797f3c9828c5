"""The root key: made once, sealed by the platform TPM, opened at every start. For the keeper alone.

The root file is a SealedBlob. It appears whole or not at all, is proven to open before it appears, and is never
replaced by another key's: one that does not open is evidence. What a start that was cut short left in the TPM is found
by the temporary file that it left on disk.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpm.durable_file import read_file, replace_file, sync_directory, write_new
from vtpm.errors import PlatformTpmError, StateError, StoreError
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import PcrSet, ZeroPcrs
from vtpm.platform_tpm.sealed_blob import MAX_BLOB_BYTES, NO_INDEXES, Indexes, SealedBlob
from vtpm.secret import KEY_BYTES, Secret

ROOT_FILE = "root.sealed"
FIRST_LABEL = "set-up"
"""Of the PCR set that a new root key is sealed under."""
RECOVERED_LABEL = "recovered"
_WHAT = "root file"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RootKey:
    """The open root key, the blob that it came from and the PCR set that it opened by."""

    secret: Secret
    blob: SealedBlob
    opened_by: PcrSet


@dataclass(frozen=True)
class NewRoot:
    """What a root key is sealed under when it is sealed; one that is sealed already keeps what it has.

    Args:
        selection: the PCRs.
        zero_pcrs: whether PCRs that are all zero will do.
        fence_pcr: the PCR that the fence extends, if there is one.
        services_pcr: the PCR that the services are measured into, if they are.
    """

    selection: PcrSelection
    zero_pcrs: ZeroPcrs
    fence_pcr: int | None = None
    services_pcr: int | None = None


def has_root_file(state_dir: Path) -> bool:
    """Whether a root key was made here once, as far as the directory tells."""
    return os.path.lexists(state_dir / ROOT_FILE)


def open_root_key(state_dir: Path, tpm: PlatformTpm, new: NewRoot) -> RootKey:
    """Open the root key, or make one where there has never been one.

    Args:
        state_dir: the keeper's own; locked by the caller.
        tpm: the platform TPM.
        new: for a new root key.
    Raises:
        PlatformTpmError: the TPM refuses or went away.
        StateError: the root file is damaged; it is left as it is.
        StoreError: a new root file cannot be made durable.
    """
    path = state_dir / ROOT_FILE
    data = read_file(path, _WHAT, MAX_BLOB_BYTES)
    if data is None:
        return _make(path, tpm, new)
    root = _open(path, data, tpm)
    try:
        # Left by a start that was cut short after the link; `_make` would take its indexes for those of a lost key.
        _temporary(path).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"the file {_temporary(path)} cannot be removed: {error.strerror}") from error
    return root


def _open(path: Path, data: bytes, tpm: PlatformTpm) -> RootKey:
    try:
        blob = SealedBlob.from_bytes(data)
        opened = tpm.unseal_root(blob)
        return RootKey(opened.root, blob, opened.opened_by)
    except StateError as error:
        raise StateError(f"the root file {path} does not open: {error.message}", next_step=error.next_step) from error
    except PlatformTpmError as error:
        raise PlatformTpmError(
            f"the root file {path} does not open: {error.message}", next_step=error.next_step
        ) from error


def _make(path: Path, tpm: PlatformTpm, new: NewRoot) -> RootKey:
    # Of two sources, so that neither a weak TPM nor a weak kernel generator alone makes a weak key.
    randomness = tpm.random(KEY_BYTES) + os.urandom(KEY_BYTES)
    secret = Secret(HKDF(SHA256(), KEY_BYTES, None, b"vtpm keeper root key").derive(randomness))
    temporary = _temporary(path)
    _discard(temporary, tpm)
    try:
        root = _seal(temporary, tpm, secret, FIRST_LABEL, new)
        # A link, not a rename: it cannot replace anything.
        os.link(temporary, path)
        temporary.unlink()
        sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"the root file {path} cannot be written: {error.strerror}", next_step="Make room on the disk"
        ) from error
    _log.info("made a root key, sealed under PCRs %s", new.selection)
    return root


def _seal(
    temporary: Path, tpm: PlatformTpm, secret: Secret, label: str, new: NewRoot, kept: Indexes = NO_INDEXES
) -> RootKey:
    """Seal a root key into a temporary file, and open it from there."""
    blob = tpm.seal_root(
        secret,
        tpm.pcr_set(label, new.selection),
        lambda blob: write_new(temporary, blob.to_bytes()),
        kept=kept,
        zero_pcrs=new.zero_pcrs,
        fence_pcr=new.fence_pcr,
        services_pcr=new.services_pcr,
    )
    reread = read_file(temporary, _WHAT, MAX_BLOB_BYTES)
    if reread != blob.to_bytes():
        raise StoreError(f"the root file {temporary} does not read as it was written")
    root = _open(temporary, reread, tpm)
    if root.secret.reveal() != secret.reveal():
        raise PlatformTpmError(f"the platform TPM {tpm.tcti!r} opens another key than it sealed")
    return root


def save_root_file(state_dir: Path, blob: SealedBlob) -> None:
    """Put a blob of the same root key in the place of the one before. Raises StoreError: it is not durable."""
    replace_file(state_dir / ROOT_FILE, _WHAT, blob.to_bytes())


def seal_again(state_dir: Path, tpm: PlatformTpm, secret: Secret, new: NewRoot) -> RootKey:
    """Seal a recovered root key to the platform TPM as it is now.

    Where the TPM still has the root key's indexes, whatever became of the root file, the anchor stays: it is what tells
    an older store. Only where the TPM says that it has none are there new ones. With both and the root file only the
    policy is changed; otherwise there is a new root file, and the one before is kept beside it.

    Raises:
        PlatformTpmError: the TPM refuses or went away; nothing was made in it.
        StoreError: a new root file cannot be made durable.
    """
    path = state_dir / ROOT_FILE
    kept = tpm.find_indexes(secret)
    try:
        blob = _read_blob(path, secret)
        if kept == Indexes(blob.policy_index, blob.anchor_index, blob.srk_name):
            return _change_policy(path, blob, tpm, secret, new)
        why = "the platform TPM has not the indexes that it names"
    except StateError as error:
        why = error.message
    _log.warning("the root file is replaced: %s", why)
    # Not the name that a first start uses, which would undefine the indexes of what it finds there.
    temporary = path.with_name(f"{path.name}.again")
    try:
        root = _seal(temporary, tpm, secret, RECOVERED_LABEL, new, kept)

        if has_root_file(state_dir):
            # A second name for it: at no moment is there no root file, for which a start would make a new key.
            os.link(path, path.with_name(f"{path.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"))
        temporary.rename(path)
        sync_directory(state_dir)
    except OSError as error:
        raise StoreError(f"the root file {path} cannot be written: {error.strerror}") from error
    return root


def _read_blob(path: Path, secret: Secret) -> SealedBlob:
    """Return what the root file holds. Raises StateError: there is none, or it is damaged or of another root key."""
    data = read_file(path, _WHAT, MAX_BLOB_BYTES)
    if data is None:
        raise StateError(f"there is no root file {path}")
    blob = SealedBlob.from_bytes(data)
    blob.verify(secret)
    return blob


def _change_policy(path: Path, blob: SealedBlob, tpm: PlatformTpm, secret: Secret, new: NewRoot) -> RootKey:
    now = tpm.pcr_set(RECOVERED_LABEL, new.selection)
    blob = tpm.replace(
        blob,
        secret,
        (now,),
        lambda changed: save_root_file(path.parent, changed),
        zero_pcrs=new.zero_pcrs,
        fence_pcr=new.fence_pcr,
        services_pcr=new.services_pcr,
    )
    return _open(path, blob.to_bytes(), tpm)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _discard(temporary: Path, tpm: PlatformTpm) -> None:
    """Undefine the indexes of a start that was cut short; its key was never used."""
    data = read_file(temporary, _WHAT, MAX_BLOB_BYTES)
    if data is not None:
        try:
            blob = SealedBlob.from_bytes(data)
        except StateError:
            return  # cut short while it was written: nothing was made in the TPM yet
        tpm.discard(blob)
