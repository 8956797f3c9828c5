"""Opens an image to run it: every byte is verified, and what was verified cannot change any more. For the launcher.

Kernel and initramfs are copied, as they are hashed, into sealed memory files: whoever may write the image's folder can
change nothing of what has been checked, and QEMU reads it as /proc/self/fd/N. One opened image serves many machines.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from vtpm.errors import ImageError, NotFoundError, VtpmError
from vtpm.image.manifest import INITRAMFS, KERNEL, MANIFEST, MAX_MANIFEST_BYTES, Manifest, Part, decode

_CHUNK_BYTES = 1024 * 1024
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class OpenImage:
    """A verified image; a context manager that closes its descriptors.

    Args:
        folder: holds vmlinuz, initramfs and manifest.json.
    Raises:
        NotFoundError: one of the three is not there.
        ImageError: a file is not what the manifest says, is no regular file, or cannot be read; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        place = _open(folder, folder, os.O_DIRECTORY, None)
        try:
            self.manifest: Manifest = _read_manifest(folder, place)
            self._kernel_fd = _verified(folder, place, KERNEL, self.manifest.kernel)
            try:
                self._initramfs_fd = _verified(folder, place, INITRAMFS, self.manifest.initramfs)
            except VtpmError:
                os.close(self._kernel_fd)
                raise
        finally:
            os.close(place)
        self._closed = False

    @property
    def measurement(self) -> str:
        """SHA-256 in hex over what the descriptors hold and the command line; see manifest.measure."""
        return self.manifest.measurement

    @property
    def kernel_fd(self) -> int:
        """The kernel: a sealed memory file, close-on-exec."""
        return self._kernel_fd

    @property
    def initramfs_fd(self) -> int:
        """The initramfs: a sealed memory file, close-on-exec."""
        return self._initramfs_fd

    def close(self) -> None:
        """Close both descriptors; nothing the second time."""
        if not self._closed:
            self._closed = True
            os.close(self._kernel_fd)
            os.close(self._initramfs_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def image_folders(images: Path) -> list[Path]:
    """Return the folders of all images in `images`, sorted: NAME/MEASUREMENT. What they hold is not looked at."""
    # Drafts have a name with a dot at its start.
    return sorted(folder for folder in images.glob("*/[0-9a-f]*") if folder.is_dir())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the image in `folder`, whose parts are not looked at.

    Raises:
        NotFoundError, ImageError: as OpenImage, for the manifest alone.
    """
    place = _open(folder, folder, os.O_DIRECTORY, None)
    try:
        return _read_manifest(folder, place)
    finally:
        os.close(place)


def _read_manifest(folder: Path, place: int) -> Manifest:
    fd = _open(folder / MANIFEST, Path(MANIFEST), 0, place)
    try:
        _check_regular(folder / MANIFEST, fd)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    return decode(data)


def _verified(folder: Path, place: int, name: str, part: Part) -> int:
    path = folder / name
    source = _open(path, Path(name), 0, place)
    copy = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _check_regular(path, source)
        digest = hashlib.sha256()
        size = 0
        # One byte more than the manifest tells is enough to refuse.
        while chunk := os.read(source, min(_CHUNK_BYTES, part.size - size + 1)):
            digest.update(chunk)
            size += len(chunk)
            if size > part.size:
                break
            _write(copy, chunk)
        if size != part.size or digest.hexdigest() != part.sha256:
            raise ImageError(
                f"{path} is not the file that the image was built with: it has been changed or is damaged",
                next_step="Keep it as evidence, and build the image again: vtpm image build",
            )
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(copy)
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    except ImageError:
        os.close(copy)
        raise
    finally:
        os.close(source)
    return copy


def _open(path: Path, name: Path, flags: int, place: int | None) -> int:
    try:
        # Not waiting: a FIFO in an image's place must not stop whoever opens it.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=place)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no image {path}", next_step="Build one: vtpm image build") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from error


def _check_regular(path: Path, fd: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ImageError(f"{path} is no regular file")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
