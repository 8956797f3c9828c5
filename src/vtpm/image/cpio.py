"""Writes initramfs archives in cpio's "newc" form, the same bytes for the same content. Pure; for `build`.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_TRAILER = "TRAILER!!!"
_DEVICE = (5, 1)
"""Major and minor number of /dev/console, the one device there can be before devtmpfs is mounted."""


@dataclass(frozen=True)
class File:
    """A regular file."""

    content: bytes
    executable: bool = False

    @property
    def mode(self) -> int:
        """Permission bits."""
        return 0o755 if self.executable else 0o644


def archive(files: Mapping[str, File], directories: tuple[str, ...] = (), *, console: bool = True) -> bytes:
    """Return an archive of root's files with their parents, in the order of their names, with no times.

    Args:
        files: by absolute path.
        directories: absolute paths of folders that are there beside the files' parents.
        console: whether there is a /dev/console.
    """
    entries: dict[str, tuple[int, bytes]] = {
        path: (stat.S_IFREG | file.mode, file.content) for path, file in files.items()
    }
    if console:
        entries["/dev/console"] = (stat.S_IFCHR | 0o600, b"")
    parents = {str(parent) for path in entries for parent in PurePosixPath(path).parents}
    for path in parents | set(directories):
        entries[path] = (stat.S_IFDIR | 0o755, b"")
    entries.pop("/", None)
    # A parent's name is a prefix of its children's, so it comes before them.
    parts = [_entry(path[1:], number, *entries[path]) for number, path in enumerate(sorted(entries), 1)]
    body = b"".join([*parts, _entry(_TRAILER, 0, 0, b"")])
    return body + bytes(-len(body) % 512)


def _entry(name: str, inode: int, mode: int, content: bytes) -> bytes:
    raw_name = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    device = _DEVICE if stat.S_ISCHR(mode) else (0, 0)
    # ino, mode, uid, gid, nlink, mtime, filesize, device of the entry, of a special file, namesize, check
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(raw_name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw_name
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
