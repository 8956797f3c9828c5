"""Opening an image: what was verified is what a machine gets, and nothing else is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.image.examples import EXAMPLE, INITRAMFS_BYTES, KERNEL_BYTES, write_image
from vtpm.errors import ImageError, NotFoundError
from vtpm.image.manifest import INITRAMFS, KERNEL, MANIFEST
from vtpm.image.opened import OpenImage, read_manifest

PARTS = (KERNEL, INITRAMFS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_image(tmp_path)


def _open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_descriptors_hold_the_verified_content_when_opened_anew(folder: Path) -> None:
    with OpenImage(folder) as image:
        assert Path(f"/proc/self/fd/{image.kernel_fd}").read_bytes() == KERNEL_BYTES
        assert Path(f"/proc/self/fd/{image.initramfs_fd}").read_bytes() == INITRAMFS_BYTES
        assert image.measurement == EXAMPLE.measurement
        assert not os.get_inheritable(image.kernel_fd)


@pytest.mark.parametrize("name", PARTS)
def test_descriptors_keep_their_content_when_the_file_changes_afterwards(folder: Path, name: str) -> None:
    with OpenImage(folder) as image:
        with (folder / name).open("r+b") as file:
            file.write(b"evil")
        assert Path(f"/proc/self/fd/{image.kernel_fd}").read_bytes() == KERNEL_BYTES
        assert Path(f"/proc/self/fd/{image.initramfs_fd}").read_bytes() == INITRAMFS_BYTES


def test_descriptors_cannot_be_changed_when_somebody_tries(folder: Path) -> None:
    with OpenImage(folder) as image:
        for fd in (image.kernel_fd, image.initramfs_fd):
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)


@pytest.mark.parametrize("place", [0, 1_500_000, -1])
@pytest.mark.parametrize("name", PARTS)
def test_image_is_refused_and_the_file_named_when_one_byte_differs(folder: Path, name: str, place: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[place % len(data)] ^= 0x01
    (folder / name).write_bytes(data)
    before = _open_fds()
    with pytest.raises(ImageError, match=f"{name} is not the file that the image was built with"):
        OpenImage(folder)
    assert _open_fds() == before


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
@pytest.mark.parametrize("name", PARTS)
def test_image_is_refused_when_a_file_is_shorter_or_longer(folder: Path, name: str, change: object) -> None:
    assert callable(change)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ImageError, match=name):
        OpenImage(folder)


def test_image_is_refused_when_kernel_and_initramfs_change_places(folder: Path) -> None:
    (folder / KERNEL).rename(folder / "x")
    (folder / INITRAMFS).rename(folder / KERNEL)
    (folder / "x").rename(folder / INITRAMFS)
    with pytest.raises(ImageError, match=KERNEL):
        OpenImage(folder)


@pytest.mark.parametrize("name", [*PARTS, MANIFEST])
def test_image_is_refused_when_a_file_is_a_symlink(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to("elsewhere")
    with pytest.raises(ImageError, match=name):
        OpenImage(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [*PARTS, MANIFEST])
def test_image_is_refused_at_once_when_a_file_is_a_pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ImageError, match=f"{name} is no regular file"):
        OpenImage(folder)


@pytest.mark.parametrize("name", [*PARTS, MANIFEST])
def test_image_is_not_found_when_a_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(NotFoundError, match=name):
        OpenImage(folder)


def test_image_is_not_found_when_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no image"):
        OpenImage(tmp_path / "none")


def test_manifest_is_read_when_the_parts_are_damaged(folder: Path) -> None:
    (folder / KERNEL).write_bytes(b"")
    assert read_manifest(folder) == EXAMPLE


def test_descriptors_are_closed_once_when_closed_twice(folder: Path) -> None:
    before = _open_fds()
    image = OpenImage(folder)
    assert len(_open_fds()) == len(before) + 2
    image.close()
    assert _open_fds() == before
    image.close()
