"""An anchor in a file, for tests whose manager is another process; it outlives that one, and tells of writes."""

from __future__ import annotations

from pathlib import Path

from vtpm.errors import StateError
from vtpm.vault.root_record import NOTHING_ANCHORED, AnchorValue


class AnchorFile:
    """Stands for the platform TPM; safe against kills, not against power loss."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> AnchorValue:
        if not self._path.exists():
            return NOTHING_ANCHORED
        version, digest = self._path.read_text().split()
        return AnchorValue(int(version), bytes.fromhex(digest))

    def write(self, value: AnchorValue) -> None:
        present = self.read()
        if value == present:
            return
        if value.version <= present.version:
            raise StateError(f"the anchor has {present}; {value} is not later")
        draft = self._path.with_name(f"{self._path.name}.new")
        draft.write_text(f"{value.version} {value.digest.hex()}")
        draft.replace(self._path)
