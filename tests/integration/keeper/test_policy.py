"""The root key's policy through the keeper: allow the next boot, boot it, drop the last one; and the anchor."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import Connect
from tests.support.processes import KeeperProcess, killed_at
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import ConflictError, NotFoundError, PlatformTpmError, UsageError
from vtpm.wire.keeper import AnchorState

pytestmark = pytest.mark.timeout(90)

Keep = Callable[[KeeperProcess], KeeperProcess]
ZERO = bytes(32).hex()


@pytest.fixture
def keeper(directory: Path, swtpm: SwtpmPlatform, keepers: Keep) -> KeeperProcess:
    return keepers(KeeperProcess(directory, swtpm.tcti))


def _measured(text: str) -> str:
    return hashlib.sha256(bytes(32) + hashlib.sha256(text.encode()).digest()).hexdigest()


def test_next_boot_opens_and_the_last_does_not_when_allowed_rebooted_and_dropped(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect
) -> None:
    client = connect(keeper.start())
    (first,) = client.policy().sets
    assert (first.label, first.matches) == ("set-up", True)
    assert first.values == client.policy().current
    client.policy_allow("firmware 2", (_measured("firmware 2"), *first.values[1:]))
    keeper.terminate()

    swtpm.reboot("firmware 2")
    client = connect(keeper.start())
    assert client.status().locked == ""
    assert [(found.label, found.matches) for found in client.policy().sets] == [("set-up", False), ("firmware 2", True)]
    client.policy_drop("set-up")
    keeper.terminate()

    swtpm.reboot("firmware")
    assert "PCRs changed in bank sha256: 0" in connect(keeper.start()).status().locked
    keeper.terminate()
    swtpm.reboot("firmware 2")
    assert connect(keeper.start()).status().locked == ""


def test_nothing_changes_when_a_set_cannot_be_allowed_or_dropped(keeper: KeeperProcess, connect: Connect) -> None:
    client = connect(keeper.start())
    before = client.policy()
    values = (_measured("x"), ZERO, ZERO, ZERO)
    for label, given, error in (
        ("set-up", values, ConflictError),
        ("again", before.current, ConflictError),
        ("short", values[:2], UsageError),
        ("not hex", ("xy" * 32, *values[1:]), UsageError),
        ("zeros", (ZERO,) * 4, PlatformTpmError),
        ("\x1b[2J", values, UsageError),
    ):
        with pytest.raises(error):
            client.policy_allow(label, given)
    with pytest.raises(NotFoundError):
        client.policy_drop("nobody")
    with pytest.raises(ConflictError, match="last"):
        client.policy_drop("set-up")
    assert client.policy() == before


@pytest.mark.parametrize("number", range(1, 7))
def test_key_opens_when_killed_while_the_policy_changes(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect, keeper: KeeperProcess, number: int
) -> None:
    keeper.start().terminate()
    prelude = killed_at(number, "os.fsync", "pathlib.Path.rename")
    doomed = keepers(KeeperProcess(directory, swtpm.tcti, prelude=prelude)).start()
    with pytest.raises(Exception, match="vtpm-keeper"):
        connect(doomed).policy_allow("next", (_measured("next"), ZERO, ZERO, ZERO))
    assert doomed.wait() == -signal.SIGKILL
    client = connect(keepers(KeeperProcess(directory, swtpm.tcti)).start())
    assert client.status().locked == ""
    assert client.policy().sets[0].label == "set-up"


def test_anchor_moves_forward_alone_and_outlives_keeper_and_tpm(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect
) -> None:
    client = connect(keeper.start())
    assert client.read_anchor() == AnchorState(0, bytes(32))
    values = [AnchorState(version, os.urandom(32)) for version in (1, 2, 70)]
    for value in values:
        client.write_anchor(value)
        assert client.read_anchor() == value
    assert client.status().anchor_writes == 3
    for older in (values[0], values[2], AnchorState(70, bytes(32)), AnchorState(69, bytes(32))):
        with pytest.raises(ConflictError):
            client.write_anchor(older)
    # A TPM that is reset under the keeper is told, and asked on: the anchor is not in its PCRs.
    swtpm.reboot()
    assert client.read_anchor() == values[2]
    client.write_anchor(AnchorState(71, bytes(32)))
    status = client.status()
    assert status.resets == 1
    assert any("was reset" in warning for warning in status.warnings)
    keeper.terminate()
    assert connect(keeper.start()).read_anchor() == AnchorState(71, bytes(32))
