"""What every platform TPM must do for the anchor."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tpm2_pytss import ESAPI, TPM2_ALG, TPM2_SU, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

from tests.contract.conftest import Tpm
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import ConflictError, PlatformTpmError, StateError, UsageError
from vtpm.platform_tpm.anchor import FIRST_ANCHOR, MAX_VERSION, Anchor, AnchorIndex, anchor_index
from vtpm.platform_tpm.nv_index import taken_handles
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import ZeroPcrs
from vtpm.platform_tpm.sealed_blob import Indexes, SealedBlob
from vtpm.platform_tpm.write_authority import WriteAuthority
from vtpm.secret import Secret

pytestmark = pytest.mark.timeout(60)

ROOT = Secret(bytes(range(100, 132)))
DIGEST = bytes(range(32))


@pytest.fixture
def blob(platform: PlatformTpm) -> SealedBlob:
    first = platform.pcr_set("set-up", DEFAULT_PCRS)
    return platform.seal_root(ROOT, first, lambda _: None, zero_pcrs=ZeroPcrs.ALLOW)


@pytest.fixture
def anchor(platform: PlatformTpm, blob: SealedBlob) -> Iterator[AnchorIndex]:
    with platform.open_anchor(blob, ROOT) as opened:
        yield opened


def test_anchor_is_what_was_written_when_read(platform: PlatformTpm, blob: SealedBlob, anchor: AnchorIndex) -> None:
    assert anchor.read() == FIRST_ANCHOR
    for version in (1, 2, 7, MAX_VERSION):
        anchor.write(Anchor(version, DIGEST))
        assert anchor.read() == Anchor(version, DIGEST)
    anchor.close()
    with platform.open_anchor(blob, ROOT) as again:
        assert again.read() == Anchor(MAX_VERSION, DIGEST)


def test_write_is_refused_when_the_version_is_not_above(anchor: AnchorIndex) -> None:
    anchor.write(Anchor(5, DIGEST))
    for version in (0, 4, 5):
        with pytest.raises(ConflictError, match="has version 5"):
            anchor.write(Anchor(version, bytes(32)))
    assert anchor.read() == Anchor(5, DIGEST)
    anchor.write(Anchor(6, DIGEST))


@pytest.mark.parametrize(("version", "size"), [(-1, 32), (MAX_VERSION + 1, 32), (1, 31), (1, 33), (1, 0)])
def test_anchor_is_refused_when_it_has_another_form(version: int, size: int) -> None:
    with pytest.raises(UsageError):
        Anchor(version, bytes(size))


def test_nothing_is_written_when_another_keeper_has_moved_the_anchor(
    platform: PlatformTpm, blob: SealedBlob, anchor: AnchorIndex
) -> None:
    """The root key is in every copy of a state directory, and the TPM is one."""
    anchor.write(Anchor(3, DIGEST))
    with platform.open_anchor(blob, ROOT) as second:
        second.write(Anchor(9, bytes(32)))
        for version in (4, 10, 4):
            with pytest.raises(PlatformTpmError, match="another keeper has moved the anchor"):
                anchor.write(Anchor(version, DIGEST))
        assert second.read() == Anchor(9, bytes(32))
        second.write(Anchor(10, bytes(32)))


def test_last_write_is_there_when_the_tpm_was_killed(tpm: Tpm, anchor: AnchorIndex) -> None:
    anchor.write(Anchor(1, DIGEST))
    assert not anchor.reset_seen
    tpm.stop()
    tpm.start()
    anchor.write(Anchor(2, DIGEST))
    assert anchor.reset_seen
    assert anchor.read() == Anchor(2, DIGEST)


def test_read_comes_back_when_the_tpm_was_killed(tpm: Tpm, anchor: AnchorIndex) -> None:
    anchor.write(Anchor(1, DIGEST))
    tpm.stop()
    tpm.start()
    assert anchor.read() == Anchor(1, DIGEST)
    assert anchor.reset_seen


def test_write_fails_and_goes_on_later_when_the_tpm_is_away(tpm: Tpm, anchor: AnchorIndex) -> None:
    tpm.stop()
    for _ in range(2):
        with pytest.raises(PlatformTpmError):
            anchor.write(Anchor(1, DIGEST))
    tpm.start()
    anchor.write(Anchor(1, DIGEST))
    assert anchor.read() == Anchor(1, DIGEST)


def test_write_counts_once_when_its_answer_was_lost(
    tpm: Tpm, anchor: AnchorIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ESAPI.nv_write
    written: list[Any] = []

    def answer_lost(self: ESAPI, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        written.append(args)
        if len(written) == 1:
            tpm.stop()
            tpm.start()
            real(self, *args, **kwargs)  # finds the connection cut

    monkeypatch.setattr(ESAPI, "nv_write", answer_lost)
    anchor.write(Anchor(1, DIGEST))
    assert len(written) == 1
    assert anchor.read() == Anchor(1, DIGEST)


def test_write_goes_on_when_another_client_flushed_what_was_loaded(platform: PlatformTpm, anchor: AnchorIndex) -> None:
    anchor.write(Anchor(1, DIGEST))
    # What a client without a resource manager does that finds the TPM full.
    platform._connection.run("flush", platform._connection._flush_leftovers)
    platform._connection.generation -= 1  # somebody else did it: this connection does not know
    anchor.write(Anchor(2, DIGEST))
    platform._connection.run("flush", platform._connection._flush_leftovers)
    anchor.write(Anchor(3, DIGEST))
    assert anchor.read() == Anchor(3, DIGEST)
    assert not anchor.reset_seen


def test_root_and_policy_are_served_when_the_anchor_is_open(
    platform: PlatformTpm, blob: SealedBlob, anchor: AnchorIndex
) -> None:
    anchor.write(Anchor(1, DIGEST))
    more = platform.pcr_set("more", DEFAULT_PCRS)
    assert platform.unseal_root(blob).root == ROOT
    changed = platform.replace(blob, ROOT, (more,), lambda _: None, zero_pcrs=ZeroPcrs.ALLOW)
    assert platform.unseal_root(changed).opened_by == more
    assert len(platform.random(100)) == 100
    anchor.write(Anchor(2, DIGEST))
    assert anchor.read() == Anchor(2, DIGEST)


@pytest.mark.parametrize("shared", [False, True])
def test_write_takes_few_commands_when_nothing_was_lost(
    platform: PlatformTpm, blob: SealedBlob, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    anchor = platform.open_anchor(blob, ROOT, shared=shared)
    sent: list[str] = []

    def count(name: str) -> None:
        real = getattr(ESAPI, name)

        def counted(self: ESAPI, *args: Any, **kwargs: Any) -> Any:
            sent.append(name)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(ESAPI, name, counted)

    for name in ("policy_signed", "nv_write", "nv_read", "create_primary", "start_auth_session", "load_external"):
        count(name)
    for version in range(1, 4):
        anchor.write(Anchor(version, DIGEST))
    assert sent == [*["nv_read"] * shared, "policy_signed", "nv_write"] * 3


def test_anchor_is_refused_when_the_root_key_is_another(platform: PlatformTpm, blob: SealedBlob) -> None:
    with pytest.raises(StateError, match="not of this root key"):
        platform.open_anchor(blob, Secret(bytes(32)))


def test_write_is_refused_when_closed(anchor: AnchorIndex) -> None:
    anchor.close()
    with pytest.raises(StateError):
        anchor.write(Anchor(1, DIGEST))


def test_error_comes_in_time_when_the_tpm_hangs_in_a_write(tpm: Tpm, blob: SealedBlob, platform: PlatformTpm) -> None:
    platform.close()
    pid = tpm.pid if isinstance(tpm, SwtpmPlatform) else tpm.process.pid  # type: ignore[union-attr]
    with PlatformTpm(tpm.tcti, timeout_s=1.0) as impatient:
        anchor = impatient.open_anchor(blob, ROOT)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(PlatformTpmError, match="no answer within 1 s"):
            anchor.write(Anchor(1, DIGEST))
        os.kill(pid, signal.SIGCONT)


def test_indexes_are_closed_to_owner_and_empty_password_when_written_to(
    tpm: Tpm, platform: PlatformTpm, blob: SealedBlob
) -> None:
    platform.close()
    for index in (blob.policy_index, blob.anchor_index):
        for authority in ("o", "p", f"0x{index.handle:x}"):
            done = subprocess.run(
                ["tpm2_nvwrite", "-T", tpm.tcti, "-C", authority, f"0x{index.handle:x}", "-i", "-"],
                input=bytes(34),
                timeout=10,
                capture_output=True,
            )
            assert done.returncode != 0
            assert b"authoriz" in done.stderr or b"auth" in done.stderr


@pytest.mark.parametrize(("ending", "kept"), [(None, False), (TPM2_SU.CLEAR, False), (TPM2_SU.STATE, True)])
def test_orderly_index_is_no_anchor_when_the_tpm_is_reset(
    tpm: Tpm, platform: PlatformTpm, blob: SealedBlob, ending: int | None, kept: bool
) -> None:
    # Decision record 17 rests on this: with TPMA_NV_ORDERLY a reset leaves an index that was never written.
    platform.close()
    attributes = TPMA_NV.AUTHWRITE | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA | TPMA_NV.ORDERLY
    area = TPMS_NV_PUBLIC(nvIndex=0x01800001, nameAlg=TPM2_ALG.SHA256, attributes=attributes, dataSize=40)
    with ESAPI(tpm.tcti) as esapi:
        index = esapi.nv_define_space(b"", TPM2B_NV_PUBLIC(area))
        esapi.nv_write(index, Anchor(1, DIGEST).to_bytes())
        if ending is not None:
            esapi.shutdown(ending)
    tpm.stop()
    tpm.start()
    with ESAPI(tpm.tcti) as esapi:
        public, _ = esapi.nv_read_public(esapi.tr_from_tpmpublic(0x01800001))
        assert bool(public.nvPublic.attributes & TPMA_NV.WRITTEN) == kept


def test_the_newest_anchor_is_found_when_there_are_several_and_others_indexes(
    platform: PlatformTpm, blob: SealedBlob, anchor: AnchorIndex
) -> None:
    anchor.write(Anchor(7, DIGEST))
    anchor.close()
    first = platform.pcr_set("set-up", DEFAULT_PCRS)
    other = Secret(bytes(range(32)))
    platform.seal_root(other, first, lambda _: None, zero_pcrs=ZeroPcrs.ALLOW)
    second = platform.seal_root(ROOT, first, lambda _: None, zero_pcrs=ZeroPcrs.ALLOW)
    found = platform.find_indexes(ROOT)
    assert found.anchor == blob.anchor_index != second.anchor_index
    assert found.policy in (blob.policy_index, second.policy_index)
    assert platform.find_indexes(Secret(b"3" * 32)) == Indexes(srk_name=blob.srk_name)
    third = platform.seal_root(ROOT, first, lambda _: None, zero_pcrs=ZeroPcrs.ALLOW, kept=found)
    assert platform.unseal_root(third).root == ROOT
    with platform.open_anchor(third, ROOT) as opened:
        assert opened.read() == Anchor(7, DIGEST)


def test_what_was_defined_and_never_written_is_undefined_when_looking_for_indexes(
    platform: PlatformTpm, blob: SealedBlob
) -> None:
    handle = blob.anchor_index.handle + 5
    platform._connection.run(
        "define",
        lambda: platform._connection.esapi.nv_define_space(b"", anchor_index(handle, WriteAuthority(ROOT)).public()),
    )
    assert platform.find_indexes(ROOT) == Indexes(blob.policy_index, blob.anchor_index, blob.srk_name)
    taken = platform._connection.run("list", lambda: taken_handles(platform._connection))
    assert handle not in taken
    assert blob.anchor_index.handle in taken


def test_nothing_is_written_when_the_caller_waits_no_more(
    tpm: Tpm, blob: SealedBlob, platform: PlatformTpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.close()
    answered, written = threading.Event(), []
    policy_signed = ESAPI.policy_signed

    def answer_late(self: ESAPI, *args: Any, **kwargs: Any) -> Any:
        response = policy_signed(self, *args, **kwargs)
        answered.wait()
        return response

    with PlatformTpm(tpm.tcti, timeout_s=2.0) as impatient:
        anchor = impatient.open_anchor(blob, ROOT)
        monkeypatch.setattr(ESAPI, "policy_signed", answer_late)
        monkeypatch.setattr(ESAPI, "nv_write", lambda *_args, **_kwargs: written.append(True))
        with pytest.raises(PlatformTpmError, match="no answer within 2 s"):
            anchor.write(Anchor(1, DIGEST))
        thread = next(found for found in threading.enumerate() if found.name == "platform-tpm")
        answered.set()
    thread.join(10)
    assert not thread.is_alive()
    assert not written
