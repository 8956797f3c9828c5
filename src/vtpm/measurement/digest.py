"""One digest over names and contents of files. Pure but for reading. For closures, and for the kinds of domain."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

Contents = dict[str, tuple[str, str]]
"""What the kernel said of each file when it was read, and the digest of its content in hex, by its name."""

_LABEL = b"vtpm measurement 1"


def measure(files: Iterable[tuple[str, Path]]) -> str:
    """Return SHA-256, in hex, over files in the order of their names.

    Args:
        files: name and place of each. The name is measured and the place is not, so the same software elsewhere has
            the same measurement.
    Raises:
        OSError: a file cannot be read.
    """
    return combine((name, content_digest(path)) for name, path in files)


def combine(contents: Iterable[tuple[str, bytes]]) -> str:
    """Return what `measure` returns.

    Args:
        contents: name of each file, and `content_digest` of it.
    """
    total = hashlib.sha256(_LABEL)
    for name, digest in sorted(contents):
        encoded = name.encode("utf-8", "surrogateescape")
        total.update(len(encoded).to_bytes(4, "big") + encoded + digest)
    return total.hexdigest()


def content_digest(path: Path) -> bytes:
    """Return SHA-256 over what counts of one file: all of it, but of a .pth file the code. Raises OSError."""
    # Through one descriptor: a file that is replaced meanwhile is measured as what it was, whole.
    with path.open("rb") as file:
        if path.suffix != ".pth":
            return hashlib.file_digest(file, "sha256").digest()
        # site runs the lines that begin so. The others are folders, which are measured themselves, by their names.
        lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines()
        code = [line for line in lines if line.startswith((b"import ", b"import\t"))]
        return hashlib.file_digest(io.BytesIO(b"\n".join(code)), "sha256").digest()
