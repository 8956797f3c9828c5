"""The image builder: what a spec names is in the guest, and what it cannot bring is refused by name."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.guest import Guest, GuestConfig, GuestImageError, ImageSpec, build_image
from tests.support.guest.cpio import CpioArchive


def test_guest_has_modules_packages_trees_and_drives_when_the_spec_names_them(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "package" / "__pycache__").mkdir(parents=True)
    (tree / "package" / "__pycache__" / "left_out.pyc").touch()
    (tree / "package" / "module.py").write_text("import sqlite3; print(sqlite3.connect(':memory:').total_changes)")
    drive = tmp_path / "drive.img"
    drive.write_bytes(b"first bytes" + bytes(1 << 20))
    spec = ImageSpec(
        name="test",
        modules=("virtio_pci", "virtio_blk", "dm-log-writes", "dm_flakey", "ext4"),
        later_modules=("dm_zero",),
        packages=("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
        trees={"/opt/code": tree},
        files={"/etc/script": b"#!/bin/sh\necho from a file"},
        links={"/usr/bin/linked": "/etc/script"},
        setup="grep -o '^dm_flakey' /proc/modules > /run/setup",
    )
    image = build_image(spec)
    with Guest(GuestConfig(image, drives=(drive,)), tmp_path / "vm") as guest:
        assert guest.check("cat /run/setup") == "dm_flakey"
        assert guest.check("linked") == "from a file"
        assert (
            guest.check("grep -c '^dm_zero' /proc/modules; insmod /usr/lib/modules/dm-zero.ko && echo loaded")
            == "0\nloaded"
        )
        assert guest.check("head -c 11 /dev/vda") == "first bytes"
        assert guest.check("python3.11 /opt/code/package/module.py") == "0"
        assert guest.check("find /opt/code -name '*.pyc'") == ""
        guest.check("printf changed | dd of=/dev/vda conv=fsync 2> /dev/null")
        guest.power_off()
    assert drive.read_bytes().startswith(b"changedytes")


def test_image_is_found_again_when_nothing_changed() -> None:
    spec = ImageSpec(name="test", files={"/etc/word": b"one"})
    first = build_image(spec)
    written_at = first.initramfs.stat().st_mtime_ns
    assert build_image(spec) == first
    assert first.initramfs.stat().st_mtime_ns == written_at
    assert build_image(ImageSpec(name="test", files={"/etc/word": b"two"})).initramfs != first.initramfs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ImageSpec(name="test", modules=("no-such-module",)), "no module no_such_module"),
        (ImageSpec(name="test", programs={"no-such-program": "a-package"}), "apt-get install a-package"),
        (ImageSpec(name="test", packages=("no-such-package",)), "no-such-package"),
        (ImageSpec(name="test", fetched=("no-such-package",)), "apt knows no package no-such-package"),
        (ImageSpec(name="test", kernel="linux-image-no-such"), "apt knows no package linux-image-no-such"),
    ],
)
def test_build_names_the_missing_part_when_it_is_not_there(spec: ImageSpec, message: str) -> None:
    with pytest.raises(GuestImageError, match=message):
        build_image(spec)


def test_archive_is_read_by_cpio_when_it_holds_every_kind_of_entry(tmp_path: Path) -> None:
    archive = CpioArchive()
    archive.file("etc/deep/file", b"content", mode=0o640)
    archive.symlink("etc/link", "deep/file")
    archive.file("etc/deep/file", b"a second content is not taken")
    subprocess.run(
        ["cpio", "--extract", "--quiet", "--make-directories"],
        input=archive.finish(),
        cwd=tmp_path,
        timeout=20,
        check=True,
    )
    assert (tmp_path / "etc/link").read_bytes() == b"content"
    assert (tmp_path / "etc/deep/file").stat().st_mode & 0o777 == 0o640
