"""Folders of services: what is made lasts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vtpm.wire import daemon
from vtpm.wire.daemon import make_directory


class FlushesSeen:
    """The os module, noting which folders are flushed."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.unreadable: Path | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int) -> int:
        if path == self.unreadable:
            raise PermissionError(13, "Permission denied")
        return os.open(path, flags)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        self.paths.append(Path(f"/proc/self/fd/{fd}").readlink())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> FlushesSeen:
    seen = FlushesSeen()
    monkeypatch.setattr(daemon, "os", seen)
    return seen


def test_every_folder_above_a_new_one_is_flushed_when_it_is_made(tmp_path: Path, seen: FlushesSeen) -> None:
    assert make_directory(tmp_path / "lib" / "vtpm", 0o700)
    assert seen.paths == [tmp_path / "lib", tmp_path]
    assert (tmp_path / "lib" / "vtpm").stat().st_mode & 0o777 == 0o700


def test_folder_above_is_flushed_again_when_the_maker_may_have_been_killed_before(
    tmp_path: Path, seen: FlushesSeen
) -> None:
    (tmp_path / "vtpm").mkdir()
    assert not make_directory(tmp_path / "vtpm", 0o700)
    assert seen.paths == [tmp_path]


def test_only_a_new_folder_needs_one_above_that_can_be_read(tmp_path: Path, seen: FlushesSeen) -> None:
    seen.unreadable = tmp_path
    with pytest.raises(PermissionError):
        make_directory(tmp_path / "vtpm", 0o700)
    assert not make_directory(tmp_path / "vtpm", 0o700)
