"""The anchor as the manager writes it through the keeper."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from vtpm.errors import ConflictError, StateError, UnavailableError
from vtpm.manager.storage import KeeperAnchor, Storage, VaultDoor
from vtpm.vault.root_record import AnchorValue
from vtpm.wire.keeper import AnchorState
from vtpm.wire.keeper_client import KeeperClient

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


class LockedKeeper(RefusingKeeper):
    """A keeper that was started again and has no root key yet."""

    def write_anchor(self, anchor: AnchorState) -> None:
        raise StateError("the root file is missing")


def test_write_may_go_through_later_when_the_keeper_is_locked() -> None:
    # Were it the anchor's refusal, the committer would never write again.
    with pytest.raises(UnavailableError, match="the root file is missing"):
        KeeperAnchor(cast(KeeperClient, LockedKeeper(MINE))).write(MINE)


class Opened:
    """Stands where an open vault would."""

    def close(self) -> None:
        pass


def test_vault_is_taken_up_again_when_taking_up_failed() -> None:
    opened, taken_up = [], []

    def open_storage(_: object) -> Storage:
        opened.append(True)
        return cast(Storage, Opened())

    async def take_up() -> None:
        taken_up.append(True)
        if len(taken_up) == 1:
            raise UnavailableError("the launcher does not answer")

    async def test() -> None:
        door = VaultDoor(open_storage, take_up)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="launcher"):
                await (door.open() if not taken_up else door.opened())
            assert not door.is_open
        await door.open()
        assert door.is_open
        await door.opened()
        await door.open()

    asyncio.run(test())
    assert (len(opened), len(taken_up)) == (1, 2)
