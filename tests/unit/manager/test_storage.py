"""The anchor as the manager writes it through the keeper."""

from __future__ import annotations

from typing import cast

import pytest

from vtpm.errors import ConflictError, StateError
from vtpm.manager.storage import KeeperAnchor
from vtpm.vault.root_record import AnchorValue
from vtpm.wire.keeper import AnchorState, KeeperClient

MINE = AnchorValue(5, b"m" * 32)


class RefusingKeeper:
    """Stands where a keeper would whose platform TPM has an anchor that is not older."""

    def __init__(self, there: AnchorValue) -> None:
        self._there = there

    def read_anchor(self) -> AnchorState:
        return AnchorState(self._there.version, self._there.digest)

    def write_anchor(self, anchor: AnchorState) -> None:
        raise ConflictError(f"the anchor has version {self._there.version}: it cannot go to {anchor.version}")


def _write(there: AnchorValue) -> None:
    KeeperAnchor(cast(KeeperClient, RefusingKeeper(there))).write(MINE)


@pytest.mark.parametrize(
    "there", [AnchorValue(6, b"m" * 32), AnchorValue(5, b"o" * 32), AnchorValue(4, b"m" * 32)], ids=str
)
def test_write_is_refused_for_good_when_another_value_is_anchored(there: AnchorValue) -> None:
    with pytest.raises(StateError, match="is not the newest") as refusal:
        _write(there)
    assert str(there) in str(refusal.value)
    assert "keep the files" in refusal.value.next_step


def test_write_succeeds_when_its_value_is_there_because_an_answer_was_lost() -> None:
    _write(MINE)
