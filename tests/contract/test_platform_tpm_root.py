"""What every platform TPM must do for the root key: sealing, opening, and a policy that can be changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from tpm2_pytss import ESAPI, TPM2B_SENSITIVE_CREATE

from tests.contract.conftest import Tpm
from tests.support.processes import short_directory
from vtpm.errors import ConflictError, NotFoundError, PlatformTpmError, StateError, UsageError
from vtpm.platform_tpm.objects import parent_template
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrBank, PcrSelection, predict_pcr
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import MAX_SETS, PcrSet, ZeroPcrs
from vtpm.platform_tpm.sealed_blob import SealedBlob
from vtpm.secret import Secret

pytestmark = pytest.mark.timeout(60)

ROOT = Secret(bytes(range(100, 132)))
FIRMWARE, KERNEL, OTHER = b"f" * 32, b"k" * 32, b"o" * 32
FENCE = 12


class PowerLossError(Exception):
    """In the place of a crash."""


@dataclass
class Disk:
    """Keeps what was saved last, and can lose its power."""

    files: list[bytes] = field(default_factory=list)
    fails_at: int = 0

    def save(self, blob: SealedBlob) -> None:
        if len(self.files) + 1 == self.fails_at:
            raise PowerLossError
        self.files.append(blob.to_bytes())

    @property
    def blob(self) -> SealedBlob:
        return SealedBlob.from_bytes(self.files[-1])


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def measured(platform: PlatformTpm) -> Iterator[PlatformTpm]:
    """A platform that booted its firmware."""
    platform.extend(0, PcrBank.SHA256, FIRMWARE)
    yield platform


def seal(platform: PlatformTpm, disk: Disk, selection: PcrSelection = DEFAULT_PCRS) -> SealedBlob:
    return platform.seal_root(ROOT, platform.pcr_set("set-up", selection), disk.save)


def boots(platform: PlatformTpm, label: str, digest: bytes) -> PcrSet:
    """The set of PCRs of this platform after one more measurement into PCR 4."""
    values = platform.pcr_values(DEFAULT_PCRS)
    return PcrSet.of(label, DEFAULT_PCRS, values | {4: predict_pcr(PcrBank.SHA256, values[4], [digest])})


def restart(tpm: Tpm, platform: PlatformTpm, *measured: tuple[int, bytes]) -> None:
    """Cut the power, and boot with these measurements."""
    tpm.stop()
    tpm.start()
    for index, digest in measured:
        platform.extend(index, PcrBank.SHA256, digest)


def test_root_opens_when_nothing_changed(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    assert disk.blob == blob
    opened = measured.unseal_root(disk.blob)
    assert opened.root == ROOT
    assert opened.opened_by.label == "set-up"
    assert opened.allowed == (opened.opened_by,)


def test_root_opens_when_the_tpm_was_killed_and_booted_the_same(tpm: Tpm, measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    restart(tpm, measured, (0, FIRMWARE))
    assert measured.unseal_root(blob).root == ROOT


def test_refusal_names_the_pcrs_of_the_nearest_set_when_they_changed(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    blob = measured.allow(blob, ROOT, boots(measured, "kernel", KERNEL), disk.save)
    for index, digest in ((4, KERNEL), (7, OTHER), (9, OTHER)):  # 9 is not of the selection
        measured.extend(index, PcrBank.SHA256, digest)
    with pytest.raises(PlatformTpmError, match=r"PCRs changed in bank sha256: 7 \(against 'kernel'"):
        measured.unseal_root(blob)


def test_other_bank_protects_when_selected(platform: PlatformTpm, disk: Disk) -> None:
    platform.extend(1, PcrBank.SHA384, b"x" * 48)
    blob = seal(platform, disk, PcrSelection.parse("sha384:1,10"))
    assert platform.unseal_root(blob).root == ROOT
    platform.extend(10, PcrBank.SHA384, b"x" * 48)
    with pytest.raises(PlatformTpmError, match="sha384: 10"):
        platform.unseal_root(blob)


def test_sealing_is_refused_when_all_pcrs_are_zero(platform: PlatformTpm, disk: Disk) -> None:
    zeros = platform.pcr_set("set-up", DEFAULT_PCRS)
    with pytest.raises(PlatformTpmError, match="all zero"):
        platform.seal_root(ROOT, zeros, disk.save)
    assert not disk.files
    blob = platform.seal_root(ROOT, zeros, disk.save, zero_pcrs=ZeroPcrs.ALLOW)
    assert platform.unseal_root(blob).root == ROOT


def test_new_boot_opens_when_it_was_allowed_before(tpm: Tpm, measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    sealed = blob.private
    blob = measured.allow(blob, ROOT, boots(measured, "kernel", KERNEL), disk.save)
    assert [one.label for one in measured.allowed(blob, ROOT)] == ["set-up", "kernel"]
    assert measured.unseal_root(disk.blob).opened_by.label == "set-up"
    measured.extend(4, PcrBank.SHA256, KERNEL)
    assert measured.unseal_root(disk.blob).opened_by.label == "kernel"
    blob = measured.drop(blob, ROOT, "set-up", disk.save)
    assert measured.unseal_root(disk.blob).root == ROOT
    assert blob.private == sealed  # nothing was sealed anew
    restart(tpm, measured, (0, FIRMWARE))
    with pytest.raises(PlatformTpmError, match="PCRs changed in bank sha256: 4"):
        measured.unseal_root(disk.blob)


def test_policy_is_replaced_when_the_selection_changes(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    blob = measured.replace(blob, ROOT, (measured.pcr_set("fewer", PcrSelection.parse("sha256:0")),), disk.save)
    measured.extend(4, PcrBank.SHA256, OTHER)
    assert measured.unseal_root(blob).opened_by.label == "fewer"


def test_root_opens_under_each_when_eight_sets_are_allowed(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    blob = measured.replace(
        blob, ROOT, tuple(boots(measured, f"kernel {number}", bytes([number]) * 32) for number in range(7)), disk.save
    )
    blob = measured.allow(blob, ROOT, measured.pcr_set("now", DEFAULT_PCRS), disk.save)
    assert len(measured.allowed(blob, ROOT)) == MAX_SETS
    assert measured.unseal_root(blob).opened_by.label == "now"
    with pytest.raises(ConflictError, match="9 sets"):
        measured.allow(blob, ROOT, boots(measured, "one more", OTHER), disk.save)
    measured.extend(4, PcrBank.SHA256, bytes([6]) * 32)
    assert measured.unseal_root(blob).opened_by.label == "kernel 6"


def test_change_is_refused_and_nothing_is_written_when_it_makes_no_sense(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    written = len(disk.files)
    now, later = measured.pcr_set("again", DEFAULT_PCRS), boots(measured, "set-up", KERNEL)
    zeros = PcrSet("zeros", DEFAULT_PCRS, (bytes(32),) * 4)
    with pytest.raises(ConflictError, match="the last"):
        measured.drop(blob, ROOT, "set-up", disk.save)
    with pytest.raises(NotFoundError):
        measured.drop(blob, ROOT, "nothing", disk.save)
    with pytest.raises(ConflictError, match="allowed already"):
        measured.allow(blob, ROOT, now, disk.save)
    with pytest.raises(ConflictError, match="a set of PCRs 'set-up' is allowed already"):
        measured.allow(blob, ROOT, later, disk.save)
    with pytest.raises(PlatformTpmError, match="all zero"):
        measured.allow(blob, ROOT, zeros, disk.save)
    with pytest.raises(ConflictError, match="0 sets"):
        measured.replace(blob, ROOT, (), disk.save)
    with pytest.raises(StateError, match="not of this root key"):
        measured.drop(blob, Secret(bytes(32)), "set-up", disk.save)
    assert len(disk.files) == written
    assert measured.unseal_root(blob).root == ROOT
    blob = measured.allow(blob, ROOT, zeros, disk.save, zero_pcrs=ZeroPcrs.ALLOW)
    assert measured.unseal_root(blob).root == ROOT


@pytest.mark.parametrize("lost", ["the file with both lists", "the write to the TPM", "the file with the new list"])
def test_root_opens_when_power_is_lost_in_a_change(tpm: Tpm, measured: PlatformTpm, disk: Disk, lost: str) -> None:
    blob = seal(measured, disk)
    later = boots(measured, "kernel", KERNEL)
    if lost == "the write to the TPM":

        def save(blob: SealedBlob) -> None:
            disk.save(blob)
            raise PowerLossError
    else:
        disk.fails_at = 2 if lost == "the file with both lists" else 3
        save = disk.save
    with pytest.raises(PowerLossError):
        measured.allow(blob, ROOT, later, save)
    disk.fails_at = 0
    restart(tpm, measured, (0, FIRMWARE))
    opened = measured.unseal_root(disk.blob)
    assert opened.root == ROOT
    arrived = lost == "the file with the new list"
    assert [one.label for one in opened.allowed] == (["set-up", "kernel"] if arrived else ["set-up"])
    # The next change mends the file.
    if not arrived:
        measured.allow(disk.blob, ROOT, later, disk.save)
    measured.drop(disk.blob, ROOT, "set-up", disk.save)
    assert len(disk.blob.lists) == 1
    measured.extend(4, PcrBank.SHA256, KERNEL)
    assert measured.unseal_root(disk.blob).opened_by.label == "kernel"


def test_nothing_stays_when_sealing_was_cut_short_and_discarded(tpm: Tpm, measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    disk.fails_at = 2
    with pytest.raises(PowerLossError):
        seal(measured, disk)
    disk.fails_at = 0
    other = seal(measured, disk)
    measured.discard(other)
    measured.discard(other)  # gone already
    with pytest.raises(PlatformTpmError, match="is missing"):
        measured.unseal_root(other)
    assert measured.unseal_root(blob).root == ROOT
    # Handles of the discarded one are those of a third; discarding the second again leaves them alone.
    third = measured.seal_root(Secret(b"3" * 32), measured.pcr_set("set-up", DEFAULT_PCRS), disk.save)
    assert third.policy_index.handle == other.policy_index.handle
    measured.discard(other)
    assert measured.unseal_root(third).root == Secret(b"3" * 32)


def test_damage_is_refused_when_any_byte_of_a_part_flips(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    for name in ("public", "private", "mac", "ek_name"):
        part = getattr(blob, name)
        for place in range(0, len(part), 3):
            flipped = bytearray(part)
            flipped[place] ^= 1
            with pytest.raises(StateError, match="damaged"):
                measured.unseal_root(replace(blob, **{name: bytes(flipped)}))
    assert measured.unseal_root(blob).root == ROOT


def test_labels_are_refused_when_somebody_exchanged_them(measured: PlatformTpm, disk: Disk) -> None:
    blob = measured.allow(seal(measured, disk), ROOT, boots(measured, "kernel", KERNEL), disk.save)
    first, second = blob.lists[0]
    exchanged = replace(blob, lists=((replace(first, label="kernel"), replace(second, label="set-up")),))
    with pytest.raises(StateError, match="not as it was written"):
        measured.unseal_root(exchanged)
    with pytest.raises(StateError, match="not as it was written"):
        measured.drop(exchanged, ROOT, "set-up", disk.save)


def test_fence_keeps_the_root_shut_when_extended_until_a_reset(tpm: Tpm, measured: PlatformTpm, disk: Disk) -> None:
    selection = PcrSelection.parse(f"sha256:0,4,{FENCE}")
    blob = seal(measured, disk, selection)
    measured.extend_fence(blob, measured.unseal_root(blob).root, FENCE)
    with pytest.raises(PlatformTpmError, match="the fence in PCR 12 was closed") as refused:
        measured.unseal_root(blob)
    assert "Reboot" in refused.value.next_step
    # The one that has the key can still change the policy.
    now = {index: value for index, value in measured.pcr_values(selection).items() if index != FENCE}
    now |= {4: predict_pcr(PcrBank.SHA256, now[4], [KERNEL]), FENCE: bytes(32)}
    blob = measured.allow(blob, ROOT, PcrSet.of("kernel", selection, now), disk.save, fence_pcr=FENCE)
    restart(tpm, measured, (0, FIRMWARE), (4, KERNEL))
    assert measured.unseal_root(blob).opened_by.label == "kernel"


def test_fence_is_refused_when_it_would_not_hold(measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk, PcrSelection.parse("sha256:0,12,16"))
    for index in (16, 17, 22, 23, 24, -1):
        with pytest.raises(UsageError, match="can be reset"):
            measured.extend_fence(blob, ROOT, index)
    with pytest.raises(UsageError, match="does not have it"):
        measured.extend_fence(blob, ROOT, 11)
    with pytest.raises(UsageError, match="does not have it"):
        measured.allow(blob, ROOT, measured.pcr_set("x", PcrSelection.parse("sha256:0")), disk.save, fence_pcr=12)
    assert measured.unseal_root(blob).root == ROOT


def test_zero_rule_exempts_the_fence_when_named(platform: PlatformTpm, disk: Disk) -> None:
    selection = PcrSelection.parse(f"sha256:0,{FENCE}")
    platform.extend(FENCE, PcrBank.SHA256, OTHER)
    with pytest.raises(PlatformTpmError, match="all zero"):
        platform.seal_root(ROOT, platform.pcr_set("set-up", selection), disk.save, fence_pcr=FENCE)


def test_another_tpm_is_told_apart_when_it_stands_in(kind: type[Tpm], measured: PlatformTpm, disk: Disk) -> None:
    blob = seal(measured, disk)
    with (
        short_directory() as elsewhere,
        kind(elsewhere) as other,
        PlatformTpm(other.tcti) as platform,
        pytest.raises(PlatformTpmError, match="is not the one that the root key was sealed by"),
    ):
        platform.unseal_root(blob)


def test_sealing_works_when_a_killed_client_left_the_tpm_full(tpm: Tpm, disk: Disk) -> None:
    # What a client does that is killed before it can flush: an ESAPI context that is left without a flush.
    for _ in range(3):
        with ESAPI(tpm.tcti) as esapi:
            esapi.create_primary(TPM2B_SENSITIVE_CREATE(), parent_template())
    with PlatformTpm(tpm.tcti) as platform:
        platform.extend(0, PcrBank.SHA256, FIRMWARE)
        assert platform.unseal_root(seal(platform, disk)).root == ROOT


def test_nothing_stays_loaded_in_the_tpm_when_closed(tpm: Tpm, disk: Disk) -> None:
    for number in range(3):
        with PlatformTpm(tpm.tcti) as platform:
            platform.extend(0, PcrBank.SHA256, FIRMWARE)
            blob = seal(platform, disk)
            blob = platform.allow(blob, ROOT, boots(platform, f"kernel {number}", KERNEL), disk.save)
            platform.unseal_root(blob)
            platform.random(8)
            with platform.open_anchor(blob, ROOT) as anchor:
                anchor.read()
    for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session", "handles-persistent"):
        listed = subprocess.run(
            ["tpm2_getcap", "-T", tpm.tcti, kind], check=True, timeout=10, capture_output=True, text=True
        )
        assert listed.stdout.strip() == ""
