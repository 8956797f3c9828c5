"""The root key: made once, sealed by the platform TPM, opened at every start. For the keeper alone.

The root file is a SealedBlob. It appears whole or not at all, is proven to open before it appears, and is never
replaced by another key's: one that does not open is evidence. What a start that was cut short left in the TPM is found
by the temporary file that it left on disk.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vtpm.errors import PlatformTpmError, StateError, StoreError
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import PcrSet, ZeroPcrs
from vtpm.platform_tpm.sealed_blob import MAX_BLOB_BYTES, SealedBlob
from vtpm.secret import KEY_BYTES, Secret

ROOT_FILE = "root.sealed"
FIRST_LABEL = "set-up"
"""Of the PCR set that a new root key is sealed under."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RootKey:
    """The open root key, the blob that it came from and the PCR set that it opened by."""

    secret: Secret
    blob: SealedBlob
    opened_by: PcrSet


def open_root_key(state_dir: Path, tpm: PlatformTpm, selection: PcrSelection, zero_pcrs: ZeroPcrs) -> RootKey:
    """Open the root key, or make one where there has never been one.

    Args:
        state_dir: the keeper's own; locked by the caller.
        tpm: the platform TPM.
        selection, zero_pcrs: for a new root key; an old one keeps its PCRs.
    Raises:
        PlatformTpmError: the TPM refuses or went away.
        StateError: the root file is damaged; it is left as it is.
        StoreError: a new root file cannot be made durable.
    """
    path = state_dir / ROOT_FILE
    data = _read(path)
    if data is None:
        return _make(path, tpm, selection, zero_pcrs)
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


def _make(path: Path, tpm: PlatformTpm, selection: PcrSelection, zero_pcrs: ZeroPcrs) -> RootKey:
    # Of two sources, so that neither a weak TPM nor a weak kernel generator alone makes a weak key.
    randomness = tpm.random(KEY_BYTES) + os.urandom(KEY_BYTES)
    secret = Secret(HKDF(SHA256(), KEY_BYTES, None, b"vtpm keeper root key").derive(randomness))
    temporary = _temporary(path)
    _discard(temporary, tpm)
    try:
        blob = tpm.seal_root(
            secret,
            tpm.pcr_set(FIRST_LABEL, selection),
            lambda blob: _write_temporary(temporary, blob.to_bytes()),
            zero_pcrs=zero_pcrs,
        )
        data = blob.to_bytes()
        reread = _read(temporary)
        if reread != data:
            raise StoreError(f"the root file {temporary} does not read as it was written")
        root = _open(temporary, reread, tpm)
        if root.secret.reveal() != secret.reveal():
            raise PlatformTpmError(f"the platform TPM {tpm.tcti!r} opens another key than it sealed")
        # A link, not a rename: it cannot replace anything.
        os.link(temporary, path)
        temporary.unlink()
        _sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"the root file {path} cannot be written: {error.strerror}", next_step="Make room on the disk"
        ) from error
    _log.info("made a root key, sealed under PCRs %s", selection)
    return root


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _discard(temporary: Path, tpm: PlatformTpm) -> None:
    """Undefine the indexes of a start that was cut short; its key was never used."""
    data = _read(temporary)
    if data is not None:
        try:
            blob = SealedBlob.from_bytes(data)
        except StateError:
            return  # cut short while it was written: nothing was made in the TPM yet
        tpm.discard(blob)


def _write_temporary(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # of a start that was cut short; nothing uses it
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _read(path: Path) -> bytes | None:
    """Return the file's content, None when there is no such file and never anything else in its place."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            return file.read(MAX_BLOB_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"the root file {path} cannot be read: {error.strerror}") from error


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
