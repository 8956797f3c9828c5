"""A small image to look at, tamper with and refuse."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vtpm.image.manifest import INITRAMFS, KERNEL, MANIFEST, ListedFile, Manifest, Part, encode

KERNEL_BYTES = b"kernel" * 1000
INITRAMFS_BYTES = b"initramfs" * 300_000
"""More than is read at once."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


EXAMPLE = Manifest(
    name="vtpmd",
    kernel=Part(sha256(KERNEL_BYTES), len(KERNEL_BYTES), "linux 6.1"),
    initramfs=Part(sha256(INITRAMFS_BYTES), len(INITRAMFS_BYTES), "made of the files below"),
    command_line="quiet panic=-1",
    engine_version=0x000902,
    unpacked_bytes=4096,
    built_with=("gcc 12", "cffi 2"),
    files=(ListedFile("/init", sha256(b"#!"), 2, "vtpm 0.1"),),
)


def write_image(folder: Path, image: Manifest = EXAMPLE) -> Path:
    """Write the example, or one of other words, below `folder` as the builder does; return its own folder."""
    place = folder / image.name / image.measurement
    place.mkdir(parents=True)
    (place / KERNEL).write_bytes(KERNEL_BYTES)
    (place / INITRAMFS).write_bytes(INITRAMFS_BYTES)
    (place / MANIFEST).write_bytes(encode(image))
    return place
