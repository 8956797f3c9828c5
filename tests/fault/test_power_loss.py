"""Power loss: at every flush boundary of a run of writes the stores open and hold every write that was answered.

The writes run in a guest on dm-log-writes; the disks that a power loss could have left are made and checked here.
Each mutant lacks one kind of flush, and is caught. ext4 makes up for two flushes with later ones; that these are
there is checked by their calls.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fault.powerloss import checker, content, log
from tests.support.guest import Guest, GuestConfig, ImageSpec, build_image
from tests.unit.vault.world import new_record, open_store
from vtpm.embedded_tpm import store as embedded_store
from vtpm.vault import sqlite_file

CHECKOUT = Path(__file__).resolve().parents[2]
# What a mutant loses first.
MUTANTS = {
    "anchor-late": "a store without it would be accepted",
    "vault-OFF": "older than the anchor",
    "vault-NORMAL": "older than the anchor",
    "vault-directories": "the vault that was made is not there",
    "embedded-files": "embedded TPM's state .* is damaged",
    "embedded-directories": "embedded TPM is at version",
    "root-files": "sealed key is damaged",
    "root-directories": "root-1 has no root file",
}
SEED = 20261124
_VARIANTS = ("none", "interval", *MUTANTS)
_LATER = 3
"""How many anchors and answers after a state are tried against it."""
_PACKAGES = ("errors.py", "secret.py", "durable_file.py", "__init__.py")
_WIRE = ("__init__.py", "migration.py", "fields.py", "message_codec.py", "names.py")
"""What a store knows of moves between hosts."""
_TREES = ("vault", "tpm", "embedded_tpm", "keeper")
_SPEC = ImageSpec(
    name="powerloss",
    modules=("virtio_pci", "virtio_blk", "dm-log-writes", "ext4"),
    packages=("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
    trees={f"/opt/vtpm/{name}": CHECKOUT / "src" / "vtpm" / name for name in _TREES}
    | {"/opt/tests/fault/powerloss": CHECKOUT / "tests" / "fault" / "powerloss"},
    files={f"/opt/vtpm/{name}": (CHECKOUT / "src" / "vtpm" / name).read_bytes() for name in _PACKAGES}
    | {f"/opt/vtpm/wire/{name}": (CHECKOUT / "src" / "vtpm" / "wire" / name).read_bytes() for name in _WIRE}
    | {
        f"/opt/vtpm/platform_tpm/{name}": (CHECKOUT / "src" / "vtpm" / "platform_tpm" / name).read_bytes()
        for name in ("__init__.py", "pcrs.py", "root_policy.py", "sealed_blob.py")
    },
)


@dataclass(frozen=True)
class Recording:
    """File system before the first write, and the drive with every variant's log."""

    base: bytes
    logs: Path
    variants: tuple[str, ...]

    def states(self, variant: str, subsets: int) -> Iterator[tuple[log.State, checker.Later]]:
        """Every state, and what came after it; nothing of that where an answer may come before its anchor."""
        with self.logs.open("rb") as file:
            entries = log.read_log(file, self.variants.index(variant) * content.LOG_BYTES)
        anchors, answers = log.anchorings(entries), log.answers(entries)
        if variant == "interval":
            answers = []
        for state in log.states(self.base, entries, random.Random(SEED), subsets):
            later = checker.Later(
                [words for position, words in anchors if position > state.position][:_LATER],
                [answer for answer in answers if answer.position > state.position][:_LATER],
            )
            yield state, checker.Later((), ()) if state.subset else later


def record(folder: Path, rounds: int, timeout_s: float, variants: tuple[str, ...] = _VARIANTS) -> Recording:
    """Let the guest write all variants."""
    base, data, logs = folder / "base.img", folder / "data.img", folder / "log.img"
    checker.make_file_system(base, content.IMAGE_BYTES)
    with data.open("wb") as file:
        for _ in variants:
            file.write(base.read_bytes())
    with logs.open("wb") as file:
        file.truncate(len(variants) * content.LOG_BYTES)
    config = GuestConfig(build_image(_SPEC), drives=(data, logs), memory_mib=384)
    with Guest(config, folder / "vm") as guest:
        command = f"cd /opt && PYTHONPATH=/opt python3.11 -B -m tests.fault.powerloss.writer {rounds}"
        guest.check(f"{command} {' '.join(variants)}", timeout_s)
        guest.power_off()
    return Recording(base.read_bytes(), logs, variants)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("power"), rounds=13, timeout_s=150)


@pytest.fixture
def work() -> Iterator[Path]:
    # The check flushes too, and those flushes prove nothing: memory serves where there is some.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="vtpm-power-") as folder:
        yield Path(folder)


@dataclass
class Replayed:
    """What was tried."""

    boundaries: int = 0
    states: int = 0
    openings: int = 0
    put_back: int = 0
    answered: int = 0

    def __str__(self) -> str:
        return (
            f"seed {SEED}: {self.boundaries} flush boundaries, {self.states} states of the disk, opened under"
            f" {self.openings} values of the anchor, and put back under {self.put_back} later ones;"
            f" {self.answered} answered writes"
        )


def replay(states: Iterator[tuple[log.State, checker.Later]], work: Path) -> Replayed:
    """Check every state. Raises LostError at the first loss."""
    done = Replayed()
    seen: set[tuple[str, str]] = set()
    for state, later in states:
        folder = work / str(done.states)
        folder.mkdir()
        checker.check(state, later, folder)
        shutil.rmtree(folder)
        done.states += 1
        done.openings += len(state.anchors)
        done.put_back += len(later.anchors) + len(later.answers)
        done.boundaries = max(done.boundaries, state.boundary)
        seen |= {(name, value) for name, value in state.marks.items() if not name.startswith("anchor")}
    done.answered = len(seen)
    return done


@pytest.mark.parametrize("mode", ["none", "interval"])
def test_every_answered_write_is_there_when_power_fails_at_any_flush(
    recording: Recording, mode: str, work: Path
) -> None:
    """With the platform TPM as it may have been at any moment until the next flush; and nothing older comes back."""
    done = replay(recording.states(mode, subsets=1), work)
    print(f"{mode}: {done}")
    assert done.answered >= 40
    assert done.boundaries >= 40
    assert done.states > done.boundaries
    # In some states a value was on its way to the platform TPM.
    assert done.openings > done.states
    assert done.put_back > 0


@pytest.mark.parametrize("variant", MUTANTS)
def test_loss_is_seen_when_a_flush_is_taken_away(recording: Recording, variant: str, work: Path) -> None:
    with pytest.raises(checker.LostError, match=MUTANTS[variant]):
        replay(recording.states(variant, subsets=0), work)


class FlushesSeen:
    """The module os, for one module, which writes down what is flushed."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        self.paths.append(Path(f"/proc/self/fd/{fd}").readlink())


def test_names_and_log_are_flushed_when_a_store_opens_that_another_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    with contextlib.closing(open_store(tmp_path / "vault")) as store:
        store.create_vtpm(new_record())
        shutil.copytree(tmp_path / "vault", killed)
    killed.chmod(0o700)
    seen = FlushesSeen()
    monkeypatch.setattr(sqlite_file, "os", seen)
    open_store(killed).close()
    # Its maker may have been killed before it had flushed them.
    assert seen.paths == [killed, tmp_path, killed / "vtpm.db-wal"]


def test_parent_is_flushed_when_the_embedded_store_makes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = FlushesSeen()
    monkeypatch.setattr(embedded_store, "os", seen)
    embedded_store.EmbeddedStore(tmp_path / "embedded")
    assert seen.paths == [tmp_path]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_answered_write_is_there_when_power_fails_in_a_long_run(tmp_path: Path, work: Path) -> None:
    recording = record(tmp_path, rounds=120, timeout_s=900, variants=("none", "interval"))
    for mode in recording.variants:
        done = replay(recording.states(mode, subsets=8), work)
        print(f"{mode}: {done}")
        assert done.answered >= 350
        assert done.states > done.boundaries
