"""The recovery key opens the root key when the platform TPM does not, and seals it again; nothing else does."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from tests.integration.keeper.conftest import Connect
from tests.support.processes import KeeperProcess, killed_at
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError, StateError, UsageError, VtpmError
from vtpm.keeper.root_key import ROOT_FILE
from vtpm.platform_tpm.pcrs import PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.recovery_key import RecoveryKey, RecoveryPublicKey
from vtpm.secret import Secret
from vtpm.tpm.types import VtpmId
from vtpm.wire.keeper import AnchorState, NewKey
from vtpm.wire.keeper_client import KeeperClient

pytestmark = pytest.mark.timeout(90)

Keep = Callable[[KeeperProcess], KeeperProcess]
VTPM = VtpmId(UUID("6ad77c2a-96b5-4b26-8c8d-2f9ba4e8a4fe"))
ANCHOR = AnchorState(3, bytes(range(32)))


def make_recovery_key(client: KeeperClient) -> str:
    """Make one and say that it is there."""
    text = client.new_recovery_key()
    client.confirm_recovery_key(RecoveryKey.from_text(text).public.to_text())
    return text


class Known:
    """What a keeper was given, and must know again."""

    def __init__(self, client: KeeperClient) -> None:
        client.write_anchor(ANCHOR)
        self.recovery_key = make_recovery_key(client)
        self.key: NewKey = client.new_key(VTPM)
        self.anchor_key = client.anchor_key()
        self.channel_key = client.channel_key()
        assert self.channel_key != self.anchor_key

    def check(self, client: KeeperClient) -> None:
        assert client.unwrap_key(VTPM, self.key.wrapped).key == self.key.key
        assert client.anchor_key() == self.anchor_key
        assert client.channel_key() == self.channel_key
        assert client.status().recovery == RecoveryKey.from_text(self.recovery_key).public.fingerprint


@pytest.fixture
def keeper(directory: Path, swtpm: SwtpmPlatform, keepers: Keep) -> KeeperProcess:
    return keepers(KeeperProcess(directory, swtpm.tcti))


@pytest.fixture
def known(keeper: KeeperProcess, connect: Connect) -> Known:
    known = Known(connect(keeper.start()))
    keeper.terminate()
    return known


def test_key_opens_and_the_anchor_stays_when_pcrs_changed(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    swtpm.extend(7)
    client = connect(keeper.start())
    assert "PCRs changed in bank sha256: 7" in client.status().locked
    client.recover(known.recovery_key)
    assert client.status().locked == ""
    known.check(client)
    assert client.read_anchor() == ANCHOR
    assert [found.label for found in client.policy().sets] == ["recovered"]
    # From here on it opens by itself, and under the old PCRs no more.
    keeper.terminate()
    client = connect(keeper.start())
    known.check(client)
    # The keeper says that it was recovered until somebody has noted it.
    fingerprint = RecoveryKey.from_text(known.recovery_key).public.fingerprint
    assert client.status().recovery_unnoted == fingerprint
    client.recovery_noted()
    assert client.status().recovery_unnoted == ""
    client.recovery_noted()
    keeper.terminate()
    assert connect(keeper.start()).status().recovery_unnoted == ""
    keeper.terminate()
    swtpm.reboot()
    assert "PCRs changed in bank sha256: 7" in connect(keeper.start()).status().locked


def test_key_opens_and_the_root_file_before_is_kept_when_the_tpm_was_lost(
    keeper: KeeperProcess, directory: Path, keepers: Keep, connect: Connect, known: Known
) -> None:
    before = keeper.root_file.read_bytes()
    (directory / "other").mkdir()
    with SwtpmPlatform(directory / "other") as other:
        other.extend(0, "firmware")
        second = keepers(KeeperProcess(directory, other.tcti)).start()
        client = connect(second)
        assert "is not the one" in client.status().locked
        client.recover(known.recovery_key)
        known.check(client)
        # The anchor went with the TPM: the store's freshness rests on the operator's word.
        assert not client.recover(known.recovery_key)
        assert client.read_anchor().version == 0
        (evidence,) = keeper.state_dir.glob(f"{ROOT_FILE}.before-*")
        assert evidence.read_bytes() == before
        second.terminate()
        known.check(connect(second.start()))
        second.terminate()


def test_key_opens_and_the_anchor_stays_when_the_root_file_is_lost(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    indexes = swtpm.nv_handles()
    keeper.root_file.unlink()
    client = connect(keeper.start())
    assert "is missing, although its key is in escrow" in client.status().locked
    assert not keeper.root_file.exists()
    assert client.recover(known.recovery_key)
    known.check(client)
    assert client.read_anchor() == ANCHOR
    assert swtpm.nv_handles() == indexes
    keeper.terminate()
    client = connect(keeper.start())
    known.check(client)
    assert client.read_anchor() == ANCHOR


def test_anchor_stays_when_the_root_file_is_damaged_or_names_other_indexes(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    good = keeper.root_file.read_bytes()
    fields = json.loads(good)
    fields["anchor_index"]["handle"] += 8
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    for bad in (good[:-2], canonical, b""):
        keeper.root_file.write_bytes(bad)
        client = connect(keeper.start())
        assert client.status().locked
        assert client.recover(known.recovery_key)
        assert client.read_anchor() == ANCHOR
        keeper.terminate()
    swtpm.extend(7)
    client = connect(keeper.start())
    assert client.recover(known.recovery_key)
    assert client.read_anchor() == ANCHOR


def test_the_root_file_before_opens_no_more_when_the_key_was_sealed_again(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    before = keeper.root_file.read_bytes()
    keeper.root_file.unlink()
    swtpm.extend(7)
    connect(keeper.start()).recover(known.recovery_key)
    keeper.terminate()
    swtpm.reboot()
    swtpm.extend(0, "firmware")
    keeper.root_file.write_bytes(before)
    assert "older than the last change of the policy" in connect(keeper.start()).status().locked


def test_a_new_anchor_is_made_when_the_old_one_was_undefined(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    handle = json.loads(keeper.root_file.read_bytes())["anchor_index"]["handle"]
    subprocess.run(["tpm2_nvundefine", "-T", swtpm.tcti, hex(handle)], check=True, timeout=20, capture_output=True)
    client = connect(keeper.start())
    assert not client.recover(known.recovery_key)
    known.check(client)
    assert client.read_anchor().version == 0


def test_nothing_changes_when_the_recovery_key_is_another_or_damaged(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    swtpm.extend(7)
    before = {path.name: path.read_bytes() for path in keeper.state_dir.iterdir() if path.suffix != ".lock"}
    client = connect(keeper.start())
    with pytest.raises(StateError, match="is sealed to recovery key"):
        client.recover(RecoveryKey.generate().to_text())
    with pytest.raises(UsageError, match="recovery key"):
        client.recover(known.recovery_key[:-1])
    escrow = keeper.state_dir / "root.escrow"
    good = escrow.read_bytes()
    escrow.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(StateError, match="damaged"):
        client.recover(known.recovery_key)
    escrow.unlink()
    with pytest.raises(StateError, match="no recovery key was ever made"):
        client.recover(known.recovery_key)
    escrow.write_bytes(good)
    assert client.status().locked
    assert {path.name: path.read_bytes() for path in keeper.state_dir.iterdir() if path.suffix != ".lock"} == before
    assert known.recovery_key.splitlines()[1] not in keeper.log
    # Whoever asked and heard no answer may ask again.
    assert client.recover(known.recovery_key)
    assert client.recover(known.recovery_key)
    with pytest.raises(StateError, match="is sealed to recovery key"):
        client.recover(RecoveryKey.generate().to_text())


def test_root_key_of_another_is_refused_when_an_escrow_was_made_with_the_public_half(
    keeper: KeeperProcess, connect: Connect, known: Known
) -> None:
    public = RecoveryKey.from_text(known.recovery_key).public
    before = keeper.root_file.read_bytes()
    keeper.root_file.write_bytes(before[:-2])
    for context in (b"", bytes(32)):
        (keeper.state_dir / "root.escrow").write_bytes(public.seal(Secret(bytes(range(32))), "root key", context))
        client = connect(keeper.start())
        assert client.status().locked
        with pytest.raises(StateError, match="was not sealed for this"):
            client.recover(known.recovery_key)
        assert client.status().locked
        keeper.terminate()


def test_no_root_key_is_made_when_the_root_file_is_lost_and_the_escrow_is_damaged(
    keeper: KeeperProcess, connect: Connect, known: Known
) -> None:
    keeper.root_file.unlink()
    escrow = keeper.state_dir / "root.escrow"
    escrow.write_bytes(escrow.read_bytes()[:-1])
    client = connect(keeper.start())
    assert "is missing, although its key is in escrow" in client.status().locked
    assert not keeper.root_file.exists()
    with pytest.raises(StateError, match="damaged"):
        client.recover(known.recovery_key)


def test_fence_is_closed_when_the_anchor_index_was_undefined(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    keeper = keepers(KeeperProcess(directory, swtpm.tcti, "--pcrs", "sha256:0,7,12", "--fence-pcr", "12"))
    keeper.start().terminate()
    handle = json.loads(keeper.root_file.read_bytes())["anchor_index"]["handle"]
    subprocess.run(["tpm2_nvundefine", "-T", swtpm.tcti, hex(handle)], check=True, timeout=20, capture_output=True)
    swtpm.reboot()
    assert "anchor" in connect(keeper.start()).status().locked
    keeper.terminate()
    with PlatformTpm(swtpm.tcti) as tpm:
        # It was unsealed in this boot, so nobody may unseal it again.
        assert any(tpm.pcr_values(PcrSelection.parse("sha256:12"))[12])


def test_an_older_recovery_key_opens_nothing_when_a_new_one_was_made(
    keeper: KeeperProcess, swtpm: SwtpmPlatform, connect: Connect, known: Known
) -> None:
    newer = make_recovery_key(connect(keeper.start()))
    keeper.terminate()
    swtpm.extend(7)
    client = connect(keeper.start())
    with pytest.raises(StateError, match="is sealed to recovery key"):
        client.recover(known.recovery_key)
    client.recover(newer)
    assert client.unwrap_key(VTPM, known.key.wrapped).key == known.key.key


@pytest.mark.parametrize("lost", [False, True], ids=["pcrs-changed", "tpm-lost"])
@pytest.mark.parametrize("number", range(1, 8))
def test_recovery_can_be_done_again_when_killed_at_a_step(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect, known: Known, lost: bool, number: int
) -> None:
    (directory / "other").mkdir()
    with SwtpmPlatform(directory / "other") as other:
        other.extend(0, "firmware")
        swtpm.extend(7)
        tcti = other.tcti if lost else swtpm.tcti
        # Every durable call of recovery, each once; the steps after the last one need no kill.
        prelude = killed_at(number, "os.fsync", "os.link", "pathlib.Path.rename")
        doomed = keepers(KeeperProcess(directory, tcti, prelude=prelude)).start()
        try:
            connect(doomed).recover(known.recovery_key)
        except Exception as error:  # noqa: BLE001 - whatever the client makes of a keeper that is gone
            assert "vtpm-keeper" in str(error), error
            assert doomed.wait() == -signal.SIGKILL
        else:
            doomed.terminate()
        client = connect(keepers(KeeperProcess(directory, tcti)).start())
        if client.status().locked:
            client.recover(known.recovery_key)
        known.check(client)
        if not lost:
            assert client.read_anchor() == ANCHOR


@pytest.mark.parametrize("number", range(1, 7))
def test_the_earlier_recovery_key_opens_until_the_second_is_confirmed_when_killed_at_a_step(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect, known: Known, number: int
) -> None:
    """Two durable calls and a rename make the second; the confirmation begins with the next rename."""
    prelude = killed_at(number, "os.fsync", "pathlib.Path.rename")
    doomed = keepers(KeeperProcess(directory, swtpm.tcti, prelude=prelude)).start()
    client, second = connect(doomed), ""
    with pytest.raises(VtpmError, match="vtpm-keeper"):
        second = client.new_recovery_key()
        client.confirm_recovery_key(RecoveryKey.from_text(second).public.to_text())
    assert doomed.wait() == -signal.SIGKILL
    assert bool(second) == (number > 3)
    swtpm.extend(7)
    client = connect(keepers(KeeperProcess(directory, swtpm.tcti)).start())
    if number <= 4:
        client.recover(known.recovery_key)
    if second:
        assert client.recover(second)


def test_fence_lets_the_key_open_once_in_each_boot(
    directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect
) -> None:
    fenced = ("--pcrs", "sha256:0,7,12", "--fence-pcr", "12")
    keeper = keepers(KeeperProcess(directory, swtpm.tcti, *fenced))
    known = Known(connect(keeper.start()))
    current = connect(keeper).policy()
    assert [found.matches for found in current.sets] == [True], "a fence that is closed is no change of the boot"
    keeper.terminate()
    client = connect(keeper.start())
    assert "fence" in client.status().locked
    # Not by recovery either: it would allow the closed fence, and so any later start in any boot.
    with pytest.raises(PlatformTpmError, match=r"Reboot|reboot"):
        client.recover(known.recovery_key)
    keeper.terminate()
    for _ in range(2):
        swtpm.reboot()
        known.check(connect(keeper.start()))
        keeper.terminate()


def test_fence_is_set_on_an_existing_host_by_what_the_refusal_says(
    keeper: KeeperProcess, directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect, known: Known
) -> None:
    unfenced = keepers(KeeperProcess(directory, swtpm.tcti, "--fence-pcr", "12"))
    status = connect(unfenced.start()).status()
    assert "the allowed set 'set-up' does not have it" in status.locked
    assert "Set pcrs" in status.locked_next_step and "vtpm recover" in status.locked_next_step
    unfenced.terminate()
    fenced = keepers(KeeperProcess(directory, swtpm.tcti, "--pcrs", "sha256:0,7,12", "--fence-pcr", "12"))
    client = connect(fenced.start())
    assert client.status().locked
    assert client.recover(known.recovery_key)
    known.check(client)
    fenced.terminate()
    swtpm.reboot()
    known.check(connect(fenced.start()))


def test_public_half_is_kept_when_a_recovery_key_was_made(keeper: KeeperProcess, connect: Connect) -> None:
    client = connect(keeper.start())
    assert client.recovery_public_key() == ""
    for _ in range(2):
        made = RecoveryKey.from_text(make_recovery_key(client))
        assert RecoveryPublicKey.from_text(client.recovery_public_key()) == made.public
    keeper.terminate()
    assert RecoveryPublicKey.from_text(connect(keeper.start()).recovery_public_key()) == made.public


def test_public_half_is_refused_when_another_was_put_there(keeper: KeeperProcess, connect: Connect) -> None:
    client = connect(keeper.start())
    make_recovery_key(client)
    public = keeper.state_dir / "recovery.public"
    good = public.read_bytes()
    foreign = RecoveryKey.generate().public.raw
    for bad in (foreign + good[32:], good[:-1] + bytes([good[-1] ^ 1]), good + b"x", good[:32], b""):
        public.write_bytes(bad)
        with pytest.raises(StateError, match="was not written by this host's keeper"):
            client.recovery_public_key()
    public.write_bytes(good)
    assert client.recovery_public_key()


@pytest.mark.parametrize("number", range(1, 8))
def test_public_half_is_that_of_the_escrow_or_none_when_killed_at_a_step(
    keeper: KeeperProcess, directory: Path, swtpm: SwtpmPlatform, keepers: Keep, connect: Connect, number: int
) -> None:
    """Seven durable calls; a public key without an escrow would seal to a key that nobody was shown."""
    client = connect(keeper.start())
    make_recovery_key(client)
    old = client.status().recovery
    keeper.terminate()
    doomed = keepers(
        KeeperProcess(directory, swtpm.tcti, prelude=killed_at(number, "os.fsync", "os.link", "pathlib.Path.rename"))
    ).start()
    with pytest.raises(VtpmError, match="vtpm-keeper"):
        make_recovery_key(connect(doomed))
    assert doomed.wait() == -signal.SIGKILL
    client = connect(keepers(KeeperProcess(directory, swtpm.tcti)).start())
    kept, escrowed_to = client.recovery_public_key(), client.status().recovery
    if kept:
        assert RecoveryPublicKey.from_text(kept).fingerprint == escrowed_to
    assert bool(kept) or escrowed_to != old
    assert (escrowed_to == old) == (number <= 4)
    made = RecoveryKey.from_text(make_recovery_key(client))
    assert RecoveryPublicKey.from_text(client.recovery_public_key()) == made.public
