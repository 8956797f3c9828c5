"""Opens the stores on a disk that a power loss left, and holds them against the marks. Needs no privilege.

e2fsck replays the file system's journal and debugfs takes the files out; the stores that open them are the real ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from tests.fault.powerloss.content import MAC_KEY, VTPM_NAMES, version_of, vtpm_id
from tests.fault.powerloss.log import Answer, State
from vtpm.embedded_tpm.store import EmbeddedStore
from vtpm.errors import NotFoundError, StateError, VtpmError
from vtpm.platform_tpm.sealed_blob import SealedBlob
from vtpm.secret import Secret
from vtpm.tpm.types import InstanceId, VtpmId
from vtpm.vault.records import PermitState
from vtpm.vault.root_record import NOTHING_ANCHORED, AnchorValue
from vtpm.vault.sqlite_store import SqliteStore

LIMIT_S = 60.0
_NO_DATABASE = "vtpm.db"


class LostError(Exception):
    """An answered write is not there, or a store does not open."""


@dataclass(frozen=True)
class Later:
    """What became of it: a thief may have kept a copy of the disk, and put it back then.

    Args:
        anchors: what was anchored after the disk was so.
        answers: what was answered after that.
    """

    anchors: Sequence[str]
    answers: Sequence[Answer]


class AnchorOf:
    """What the platform TPM has when a store is opened."""

    def __init__(self, words: str) -> None:
        self._value = value_of(words)

    def read(self) -> AnchorValue:
        return self._value

    def write(self, value: AnchorValue) -> None:
        raise LostError(f"opening a store anchored {value}")


def value_of(words: str) -> AnchorValue:
    """The value in a mark."""
    if not words:
        return NOTHING_ANCHORED
    version, digest = words.split(":")
    return AnchorValue(int(version), bytes.fromhex(digest))


def make_file_system(path: Path, size_bytes: int) -> None:
    """Make an empty ext4 as small as one with a journal can be."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    options = ("-q", "-F", "-b", "1024", "-m", "0", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0")
    subprocess.run(["/sbin/mkfs.ext4", *options, path], check=True, timeout=LIMIT_S, capture_output=True)


def check(state: State, later: Later, work: Path) -> None:
    """Recover the disk and check every mark, under each anchor; and that it cannot be put back later.

    Args:
        work: an empty folder, filled here.
    Raises:
        LostError: says what is lost.
    """
    image, out = work / "disk", work / "out"
    image.write_bytes(state.disk)
    out.mkdir()
    recovered = subprocess.run(
        ["/sbin/e2fsck", "-E", "journal_only", "-y", image],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if recovered.returncode > 1:
        raise LostError(f"the file system does not recover: {recovered.stdout} {recovered.stderr}")
    dump = subprocess.run(
        ["/sbin/debugfs", "-R", f"rdump / {out}", image], capture_output=True, timeout=LIMIT_S, check=True
    )
    if b"while reading" in dump.stderr:
        raise LostError(f"the file system cannot be read: {dump.stderr!r}")
    try:
        for anchor in reversed(state.anchors):
            held = _check_vault(out, state.marks, anchor)
        _check_later(out, held, later)
        _check_embedded(out, state.marks)
        _check_roots(out, state.marks)
    except (VtpmError, ValueError) as error:
        raise LostError(str(error)) from error


@dataclass(frozen=True)
class _Held:
    """Version of the store's record, and of each vTPM's state; 0 where there is none."""

    record: int
    states: Mapping[str, int]


@contextlib.contextmanager
def _opened(out: Path, anchor: str) -> Iterator[SqliteStore]:
    """Open a copy: opening changes files."""
    with tempfile.TemporaryDirectory(dir=out.parent) as copy:
        shutil.copytree(out / "vault", Path(copy, "vault"))
        with contextlib.closing(SqliteStore(Path(copy, "vault"), Secret(MAC_KEY), AnchorOf(anchor))) as store:
            yield store


def _check_vault(out: Path, marks: Mapping[str, str], anchor: str) -> _Held:
    if "vault" in marks and not (out / "vault" / _NO_DATABASE).exists():
        raise LostError("the vault that was made is not there")
    if not (out / "vault").exists():
        return _Held(0, {})
    states = {}
    with _opened(out, anchor) as store:
        for name in VTPM_NAMES:
            own = VtpmId(vtpm_id(name))
            try:
                record = store.get_vtpm(own)
            except NotFoundError:
                if f"record.{name}" in marks:
                    raise
                continue
            if f"bound.{name}" in marks and record.instance_id != InstanceId(UUID(int=own.int ^ 1)):
                raise LostError(f"the binding of {name} is lost")
            if f"permit.{name}" in marks and record.permit.state is PermitState.OPEN:
                raise LostError(f"the permit of {name} is lost")
            found = max((version_of(name, state.envelope) for state in store.read_state(own)), default=0)
            if found < int(marks.get(f"state.{name}", 0)):
                raise LostError(f"{name} is at version {found}, answered was {marks[f'state.{name}']}")
            states[name] = found
        return _Held(store.value.version, states)


def _check_later(out: Path, held: _Held, later: Later) -> None:
    if not (out / "vault").exists():
        return
    for anchor in later.anchors:
        if value_of(anchor).version > held.record and not _is_refused(out, anchor):
            raise LostError(f"a store of version {held.record} would be accepted under the anchor {anchor}")
    for answer in later.answers:
        lacks = answer.version > held.states.get(answer.name, 0)
        if lacks and not _is_refused(out, answer.anchor):
            raise LostError(f"{answer.name} was answered {answer.version}, and a store without it would be accepted")


def _is_refused(out: Path, anchor: str) -> bool:
    try:
        with _opened(out, anchor):
            return False
    except StateError as error:
        if not re.search("older than the anchor|is missing", str(error)):
            raise
        return True


def _check_embedded(out: Path, marks: Mapping[str, str]) -> None:
    if not (out / "embedded").exists():
        if "embedded" in marks:
            raise LostError("the embedded TPM's store is lost")
        return
    store = EmbeddedStore(out / "embedded")
    data = store.load()
    found = 0 if data is None else version_of("embedded", data)
    if found < int(marks.get("embedded", 0)):
        raise LostError(f"the embedded TPM is at version {found}, answered was {marks['embedded']}")
    if "initialised" in marks and not store.is_initialised:
        raise LostError("the embedded TPM's marker is lost")


def _check_roots(out: Path, marks: Mapping[str, str]) -> None:
    for folder in out.glob("root-*"):
        file = folder / "root.sealed"
        if not file.exists():
            continue
        key = SealedBlob.from_bytes(file.read_bytes()).private
        if folder.name in marks and hashlib.sha256(key).hexdigest() != marks[folder.name]:
            raise LostError(f"{folder.name} holds another key")
    for name in marks:
        if name.startswith("root-") and not (out / name / "root.sealed").exists():
            raise LostError(f"{name} has no root file")
