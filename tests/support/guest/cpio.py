"""Writes initramfs archives in cpio's "newc" form, the same bytes for the same content on every machine.

Pure: no file is read or written here. Used by `image` alone.
Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat

_TRAILER = "TRAILER!!!"


class CpioArchive:
    """A growing newc archive. Parents are added before their children; owner is root, times are zero."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        """Add a directory and its parents, each once. `name` is relative to the root, as "usr/bin"."""
        if name in ("", "."):
            return
        parent, _, _ = name.rpartition("/")
        self.directory(parent)
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file with its parents. The first content given for a name stays."""
        self.directory(name.rpartition("/")[0])
        self._add(name, stat.S_IFREG | mode, content)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link with its parents."""
        self.directory(name.rpartition("/")[0])
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        """The whole archive, ended by the trailer and padded to 512 bytes."""
        body = b"".join([*self._parts, _entry(_TRAILER, 0, 0, b"")])
        return body + bytes(-len(body) % 512)

    def _add(self, name: str, mode: int, content: bytes) -> None:
        if name in self._names:
            return
        self._names.add(name)
        self._parts.append(_entry(name, len(self._names), mode, content))


def _entry(name: str, inode: int, mode: int, content: bytes) -> bytes:
    name_bytes = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, device numbers of entry and special file, namesize, check
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name_bytes), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    head = header + name_bytes
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
