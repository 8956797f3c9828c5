"""What the writer in the guest writes and the checker on the host expects: recognisable content for each version."""

from __future__ import annotations

from uuid import UUID

VTPM_NAMES = ("web1", "web2")
MAC_KEY = bytes(range(32))
IMAGE_BYTES = 16 << 20
LOG_BYTES = 48 << 20
DEVICE_SECTOR_BYTES = 512


def vtpm_id(name: str) -> UUID:
    return UUID(bytes=name.encode().ljust(16, b"\0"))


def blob(what: str, version: int) -> bytes:
    """Some 6 KB, more than a page of any store, so that a torn one is told from a whole one."""
    return f"{what} {version}\n".encode() * (200 + 17 * (version % 20))


def version_of(what: str, data: bytes) -> int:
    """The version that this content is of.

    Raises:
        ValueError: it is no version's whole content.
    """
    version = int(data.split(b"\n", 1)[0].split()[-1])
    if data != blob(what, version):
        raise ValueError(f"the content of {what} is no whole version")
    return version
