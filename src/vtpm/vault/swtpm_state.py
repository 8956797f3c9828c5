"""The state directory of one swtpm, for `vtpm import`; docs/state-format.md, "State directory of swtpm".

Reads and changes nothing. Imported by the command line, which has its caller's rights. C: swtpm_nvstore_dir.c of swtpm.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vtpm.errors import ConflictError, StateError, UsageError
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.vault.swtpm_blob import MAX_FILE_BYTES, SwtpmKey, open_blob

_LOCK_FILE = ".lock"
_PREFIX = {TpmVersion.V1_2: "tpm-00.", TpmVersion.V2_0: "tpm2-00."}
_SUFFIX = {StateKind.PERMANENT: "permall", StateKind.VOLATILE: "volatilestate", StateKind.SAVESTATE: "savestate"}
# Never through a link and never waiting: another user may own the directory, and put a pipe there.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


@dataclass(frozen=True)
class SwtpmState:
    """What a state directory holds.

    Args:
        states: plain state as libtpms wrote it, unverified where swtpm did not encrypt; permanent state is there.
    """

    tpm_version: TpmVersion
    states: Mapping[StateKind, bytes] = field(repr=False)


def read_state(directory: Path, key: SwtpmKey | None = None) -> SwtpmState:
    """Read the state directory of an swtpm that does not run.

    swtpm's lock is held meanwhile, so that none can start. It says nothing of a swtpm that was told to give it up for a
    migration, nor of a copy of the directory elsewhere: whoever imports declares that no other will run this TPM again.

    Args:
        directory: that of `--tpmstate dir=`.
        key: as swtpm was given it with `--key`; None where it was given none.
    Raises:
        ConflictError: a running swtpm holds the lock.
        StateError: no state, damaged, of an unknown format, or not what the key fits; the message names the file.
        UsageError: not a directory that can be read, or the key is missing.
    """
    try:
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{directory} cannot be read as a state directory: {error.strerror}") from error
    try:
        with _locked(directory, directory_fd):
            return _read(directory, directory_fd, key)
    finally:
        os.close(directory_fd)


@contextmanager
def _locked(directory: Path, directory_fd: int) -> Iterator[None]:
    fd = _open(directory, directory_fd, _LOCK_FILE)
    if fd is None:
        # swtpm makes it before all else, since 0.1: without it, none has run here or it is older.
        yield
        return
    try:
        # A shared lock needs no right to write, and stands against swtpm's exclusive one.
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConflictError(
                f"the state directory {directory} is in use by a running swtpm",
                next_step="Shut its VM down, and see that swtpm has ended",
            ) from None
        yield
    finally:
        os.close(fd)


def _read(directory: Path, directory_fd: int, key: SwtpmKey | None) -> SwtpmState:
    found: dict[TpmVersion, dict[StateKind, bytes]] = {}
    for version, prefix in _PREFIX.items():
        for kind, suffix in _SUFFIX.items():
            content = _content(directory, directory_fd, prefix + suffix)
            if content is not None:
                found.setdefault(version, {})[kind] = content
    if not found:
        raise StateError(
            f"there is no state of swtpm in {directory}",
            next_step="libvirt keeps it one folder further down, in tpm2 or tpm1.2",
        )
    if len(found) > 1:
        raise StateError(
            f"{directory} has state of both a TPM 1.2 and a TPM 2.0",
            next_step="Copy the files of one of them to a directory of their own",
        )
    ((version, contents),) = found.items()
    if StateKind.PERMANENT not in contents:
        raise StateError(
            f"{directory} has no permanent state: {_PREFIX[version]}{_SUFFIX[StateKind.PERMANENT]} is missing",
            next_step="Where there is one that ends in .bak, let swtpm restore it",
        )
    return SwtpmState(
        version,
        {
            kind: open_blob(str(directory / (_PREFIX[version] + _SUFFIX[kind])), content, key)
            for kind, content in contents.items()
        },
    )


def _content(directory: Path, directory_fd: int, name: str) -> bytes | None:
    fd = _open(directory, directory_fd, name)
    if fd is None:
        return None
    with open(fd, "rb") as file:
        # One byte more than allowed, so that it is seen.
        return file.read(MAX_FILE_BYTES + 1)


def _open(directory: Path, directory_fd: int, name: str) -> int | None:
    try:
        fd = os.open(name, _OPEN_FLAGS, dir_fd=directory_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{directory / name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StateError(f"{directory / name} is no regular file")
    return fd
