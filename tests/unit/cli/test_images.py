"""The commands on images that need no build: list, show, lock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli
from tests.unit.image.examples import EXAMPLE, write_image
from tests.unit.image.test_packages import APT_CACHE, FakePrograms, programs
from vtpm.image.definition import read_lock
from vtpm.image.manifest import INITRAMFS

__all__ = ["programs"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_image(tmp_path / "images")
    return tmp_path / "images"


def test_images_are_listed_without_drafts_when_there_are_some(cli: Cli, images: Path) -> None:
    (images / "vtpmd" / ".draft-x").mkdir()
    listed = json.loads(cli("image", "list", "--images", str(images), "--json").out)
    folder = str(images / "vtpmd" / EXAMPLE.measurement)
    assert listed == [{"name": "vtpmd", "make": "libtpms", "measurement": EXAMPLE.measurement, "folder": folder}]
    assert EXAMPLE.measurement[:16] in cli("image", "list", "--images", str(images)).out


def test_image_is_shown_by_the_start_of_its_measurement_or_its_folder(cli: Cli, images: Path) -> None:
    by_start = cli("image", "show", EXAMPLE.measurement[:6], "--images", str(images), "--json")
    by_folder = cli("image", "show", str(images / "vtpmd" / EXAMPLE.measurement), "--json")
    assert by_start == by_folder
    shown = json.loads(by_start.out)
    assert (shown["measurement"], shown["command_line"]) == (EXAMPLE.measurement, EXAMPLE.command_line)
    assert shown["files"][0]["path"] == "/init"


def test_image_is_shown_for_people_when_not_asked_for_json(cli: Cli, images: Path) -> None:
    words = ("image", "show", EXAMPLE.measurement[:6], "--images", str(images))
    assert "0.9.2" in cli(*words).out
    assert cli(*words, "--files").out.splitlines()[1].split()[:2] == ["/init", "2"]


def test_image_is_refused_and_the_file_named_when_one_byte_was_changed(cli: Cli, images: Path) -> None:
    path = images / "vtpmd" / EXAMPLE.measurement / INITRAMFS
    path.write_bytes(b"I" + path.read_bytes()[1:])
    ended = cli("image", "show", EXAMPLE.measurement[:6], "--images", str(images))
    assert (ended.status, ended.out) == (14, "")
    assert f"{path} is not the file" in ended.err


@pytest.mark.parametrize(("start", "status"), [("abc", 2), ("000000", 3)])
def test_image_is_refused_when_its_start_is_too_short_or_unknown(
    cli: Cli, images: Path, start: str, status: int
) -> None:
    assert cli("image", "show", start, "--images", str(images)).status == status


def test_lock_is_replaced_whole_when_apt_knows_the_packages(cli: Cli, programs: FakePrograms, tmp_path: Path) -> None:
    programs.write("apt-cache", APT_CACHE.format(sha256="d" * 64))
    path = tmp_path / "lock.toml"
    path.write_text("old")
    assert cli("image", "lock", "--lock", str(path)).status == 0
    assert read_lock(path).packages["libc6"].sha256 == "d" * 64


def test_lock_stays_when_apt_knows_too_little(cli: Cli, programs: FakePrograms, tmp_path: Path) -> None:
    programs.write("apt-cache", "exit 0")
    path = tmp_path / "lock.toml"
    path.write_text("old")
    ended = cli("image", "lock", "--lock", str(path), "--json")
    assert (ended.status, json.loads(ended.err)["code"]) == (6, "unavailable")
    assert path.read_text() == "old"


def test_lock_says_so_when_it_cannot_be_written(cli: Cli, programs: FakePrograms, tmp_path: Path) -> None:
    programs.write("apt-cache", APT_CACHE.format(sha256="d" * 64))
    assert cli("image", "lock", "--lock", str(tmp_path / "none" / "lock.toml")).status == 9
