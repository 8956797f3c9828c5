"""Measures files: one digest over names and contents. Pure but for reading. For the kinds of domain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def measure_files(files: Iterable[Path]) -> str:
    """Return SHA-256, in hex, over the files in the order of their names.

    Each contributes the last three parts of its path, so that the same software at another place has the same
    measurement, and the SHA-256 of its content.

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.sha256(b"vtpm measurement 1")
    entries = []
    for path in files:
        with path.open("rb") as file:
            entries.append(("/".join(path.parts[-3:]), hashlib.file_digest(file, "sha256").digest()))
    for name, digest in sorted(entries):
        encoded = name.encode()
        total.update(len(encoded).to_bytes(4, "big") + encoded + digest)
    return total.hexdigest()
