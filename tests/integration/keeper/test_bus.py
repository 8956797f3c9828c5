"""What somebody sees who listens on the bus between the keeper and its TPM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.keeper.recording_proxy import RecordingProxy
from tests.support.processes import KeeperProcess
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError
from vtpm.keeper.custody import Custody
from vtpm.keeper.platforms import HardwarePlatform
from vtpm.keeper.root_key import NewRoot, open_root_key
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import ZeroPcrs
from vtpm.platform_tpm.sealed_blob import SealedBlob
from vtpm.secret import Secret

pytestmark = pytest.mark.timeout(30)

_TPM2_UNSEAL = bytes.fromhex("0000015e")


def test_no_secret_is_on_the_bus_when_sealed_and_opened(directory: Path, swtpm: SwtpmPlatform) -> None:
    secret = bytes(range(60, 92))
    with RecordingProxy(directory / "bus", swtpm.socket_path) as proxy:
        with PlatformTpm(proxy.tcti) as tpm:
            blob = tpm.seal_root(Secret(secret), tpm.pcr_set("set-up", DEFAULT_PCRS), lambda _: None)
            assert tpm.unseal_root(blob).root.reveal() == secret
            randomness = tpm.random(32)
        recorded = bytes(proxy.recorded)
    # The eavesdropper does hear the rest.
    assert blob.public in recorded
    assert blob.policy_digest in recorded
    assert _TPM2_UNSEAL in recorded
    for hidden in (secret, randomness):
        assert not any(hidden[at : at + 8] in recorded for at in range(len(hidden) - 7))


def test_forged_pcr_values_are_not_offered_to_be_allowed_when_somebody_stands_on_the_bus(
    directory: Path, swtpm: SwtpmPlatform
) -> None:
    state_dir = directory / "custody"
    state_dir.mkdir()
    with RecordingProxy(directory / "bus", swtpm.socket_path) as proxy:
        custody = Custody(state_dir, HardwarePlatform(proxy.tcti), NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE))
        custody.open()
        _, now = custody.policy()
        real = next(value for value in now.values if any(value))
        proxy.forged = (real, b"evil" * 8)
        with pytest.raises(PlatformTpmError):
            custody.policy()
        custody.close()


def test_root_key_is_not_on_the_bus_when_the_keeper_makes_and_opens_it(
    directory: Path, swtpm: SwtpmPlatform, keepers: Callable[[KeeperProcess], KeeperProcess]
) -> None:
    with RecordingProxy(directory / "bus", swtpm.socket_path) as proxy:
        keeper = keepers(KeeperProcess(directory, proxy.tcti))
        assert keeper.start().terminate() == 0
        assert keeper.start().terminate() == 0
        recorded = bytes(proxy.recorded)
    with PlatformTpm(swtpm.tcti) as tpm:
        root = open_root_key(keeper.state_dir, tpm, NewRoot(DEFAULT_PCRS, ZeroPcrs.REFUSE)).secret.reveal()
    assert SealedBlob.from_bytes(keeper.root_file.read_bytes()).public in recorded
    assert not any(root[at : at + 8] in recorded for at in range(len(root) - 7))
    assert root.hex() not in keeper.log
