"""Attacks on the root key and the anchor by somebody who may send the platform TPM any command, or listens to it.

The attacker has the owner hierarchy (its authorization is empty), the state directory and the bus; not the root key.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_HC,
    TPM2_SE,
    TPM2B_NV_PUBLIC,
    TPM2B_PRIVATE,
    TPM2B_SENSITIVE_CREATE,
    TPMA_NV,
    TPMT_SIGNATURE,
    TSS2_Exception,
)

from tests.integration.keeper.recording_proxy import RecordingProxy
from tests.support.processes import short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.errors import PlatformTpmError, StateError
from vtpm.platform_tpm.anchor import Anchor
from vtpm.platform_tpm.nv_index import IndexWriter
from vtpm.platform_tpm.objects import parent_template, read_sealed_public
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrBank, PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.platform_tpm.root_policy import PcrSet, approved, branches
from vtpm.platform_tpm.sealed_blob import IndexRef, SealedBlob
from vtpm.platform_tpm.sealing import policy_index
from vtpm.platform_tpm.write_authority import WriteAuthority, write_cp_hash
from vtpm.secret import Secret

pytestmark = pytest.mark.timeout(60)

ROOT = Secret(bytes(range(100, 132)))
FENCED = PcrSelection.parse("sha256:0,2,4,7,12")
OLD, NEW = Anchor(1, b"o" * 32), Anchor(2, b"n" * 32)


@pytest.fixture(autouse=True)
def quiet_tss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSS2_LOG", "all+none")


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def swtpm(directory: Path) -> Iterator[SwtpmPlatform]:
    with SwtpmPlatform(directory) as started:
        yield started


@pytest.fixture
def platform(swtpm: SwtpmPlatform) -> Iterator[PlatformTpm]:
    """The keeper's connection, on a host that booted its firmware."""
    with PlatformTpm(swtpm.tcti) as connected:
        connected.extend(0, PcrBank.SHA256, b"f" * 32)
        yield connected


@pytest.fixture
def blob(platform: PlatformTpm) -> SealedBlob:
    return seal(platform)


@pytest.fixture
def attacker(swtpm: SwtpmPlatform) -> Iterator[ESAPI]:
    with ESAPI(swtpm.tcti) as esapi:
        yield esapi


def seal(platform: PlatformTpm) -> SealedBlob:
    return platform.seal_root(ROOT, platform.pcr_set("set-up", DEFAULT_PCRS), lambda _: None)


def redefine(
    attacker: ESAPI, ref: IndexRef, *, more: int = 0, less: int = 0, policy: bytes | None = None, password: bytes = b""
) -> ESYS_TR:
    """Undefine an index and define it anew as it was, but for what is named; return it."""
    old = attacker.tr_from_tpmpublic(ref.handle)
    public, _ = attacker.nv_read_public(old)
    attacker.nv_undefine_space(old)
    area = public.nvPublic
    area.attributes = (area.attributes & ~(TPMA_NV.WRITTEN | less)) | more
    if policy is not None:
        area.authPolicy = policy
    return attacker.nv_define_space(password, TPM2B_NV_PUBLIC(area))


def write_everything(attacker: ESAPI, index: ESYS_TR, data: bytes) -> int:
    """Try every authorization that the attacker has; return how many let the index be written."""
    policy = attacker.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, "aes128cfb", TPM2_ALG.SHA256)
    tries = [(index, ESYS_TR.PASSWORD), (ESYS_TR.OWNER, ESYS_TR.PASSWORD), (index, policy)]
    tries.append((ESYS_TR.PLATFORM, ESYS_TR.PASSWORD))
    written = 0
    for authority, session in tries:
        try:
            attacker.nv_write(index, data, auth_handle=authority, session1=session)
            written += 1
        except TSS2_Exception:
            continue
    attacker.flush_context(policy)
    return written


def loaded_key(attacker: ESAPI) -> ESYS_TR:
    """The one object that is loaded: the write authority, as another client finds it without a resource manager."""
    _, capability = attacker.get_capability(TPM2_CAP.HANDLES, TPM2_HC.TRANSIENT_FIRST, 8)
    (handle,) = capability.data.handles
    return attacker.tr_from_tpmpublic(handle)


def wanted_by_attacker(platform: PlatformTpm) -> bytes:
    """The policy index's content that would open the root key under the PCRs of now."""
    return approved((platform.pcr_set("attacker", DEFAULT_PCRS),))


def refused(platform: PlatformTpm, blob: SealedBlob) -> str:
    with pytest.raises(PlatformTpmError) as error:
        platform.unseal_root(blob)
    return str(error.value)


def test_policy_index_does_not_open_when_redefined_with_the_same_public_area(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    platform.extend(4, PcrBank.SHA256, b"x" * 32)
    index = redefine(attacker, blob.policy_index)
    assert write_everything(attacker, index, wanted_by_attacker(platform)) == 0
    words = refused(platform, blob)
    assert "somebody undefined it and defined another" in words
    assert "`vtpm recover`" in words
    # Also with a changed root file that says that the index's Name is right.
    unwritten = bytes(attacker.tr_get_name(index))
    with pytest.raises(StateError, match="public area"):
        platform.unseal_root(replace(blob, policy_index=IndexRef(blob.policy_index.handle, unwritten)))


def test_policy_index_is_refused_when_redefined_with_authwrite(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    platform.extend(4, PcrBank.SHA256, b"x" * 32)
    index = redefine(attacker, blob.policy_index, more=int(TPMA_NV.AUTHWRITE))
    attacker.nv_write(index, wanted_by_attacker(platform))
    words = refused(platform, blob)
    assert "somebody undefined it and defined another" in words
    assert "`vtpm recover`" in words
    # Also with a root file that names the attacker's index.
    named = IndexRef(blob.policy_index.handle, bytes(attacker.tr_get_name(index)))
    with pytest.raises(StateError, match="public area"):
        platform.unseal_root(replace(blob, policy_index=named))


def test_policy_index_is_refused_when_redefined_with_another_policy(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    redefine(attacker, blob.policy_index, policy=b"\xff" * 32)
    assert "somebody undefined it and defined another" in refused(platform, blob)


def test_policy_index_is_refused_when_redefined_with_a_password(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    redefine(attacker, blob.policy_index, password=b"password")
    assert "somebody undefined it and defined another" in refused(platform, blob)


def test_policy_index_is_said_to_be_missing_when_undefined(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    attacker.nv_undefine_space(attacker.tr_from_tpmpublic(blob.policy_index.handle))
    words = refused(platform, blob)
    assert "is missing: somebody undefined it" in words
    assert "`vtpm recover`" in words


def open_by_hand(attacker: ESAPI, blob: SealedBlob, now: PcrSet) -> bytes:
    """Open the root key with commands of one's own, without any check but the TPM's."""
    srk, *_ = attacker.create_primary(TPM2B_SENSITIVE_CREATE(), parent_template())
    session = attacker.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, "aes128cfb", TPM2_ALG.SHA256)
    sealed = attacker.load(srk, TPM2B_PRIVATE(blob.private), read_sealed_public(blob))
    try:
        attacker.policy_pcr(session, b"", str(now.selection))
        attacker.policy_or(session, branches((now,)))
        attacker.policy_authorize_nv(attacker.tr_from_tpmpublic(blob.policy_index.handle), session)
        return bytes(attacker.unseal(sealed, session1=session))
    finally:
        for handle in (srk, session, sealed):
            attacker.flush_context(handle)


def open_by_password(attacker: ESAPI, blob: SealedBlob) -> bytes:
    """Open the root key without its policy, by its own authorization, which is empty."""
    srk, *_ = attacker.create_primary(TPM2B_SENSITIVE_CREATE(), parent_template())
    sealed = attacker.load(srk, TPM2B_PRIVATE(blob.private), read_sealed_public(blob))
    try:
        return bytes(attacker.unseal(sealed))
    finally:
        for handle in (srk, sealed):
            attacker.flush_context(handle)


def test_tpm_itself_refuses_when_the_attacker_runs_the_policy(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    allowed = platform.pcr_set("set-up", DEFAULT_PCRS)
    with pytest.raises(TSS2_Exception, match="authValue or authPolicy"):
        open_by_password(attacker, blob)
    # On an allowed boot whoever reaches the TPM opens it: that is what the PCRs stand for, and what the fence is for.
    assert open_by_hand(attacker, blob, allowed) == ROOT.reveal()
    platform.extend(4, PcrBank.SHA256, b"x" * 32)
    now = platform.pcr_set("attacker", DEFAULT_PCRS)
    for one in (allowed, now):
        with pytest.raises(TSS2_Exception, match="value is out of range"):
            open_by_hand(attacker, blob, one)
    # With an index of the attacker's at the same handle the index says yes, and its Name is in the digest.
    index = redefine(attacker, blob.policy_index, more=int(TPMA_NV.AUTHWRITE))
    attacker.nv_write(index, wanted_by_attacker(platform))
    with pytest.raises(TSS2_Exception, match="a policy check failed"):
        open_by_hand(attacker, blob, now)
    # With one of the right public area there is nothing to say yes.
    redefine(attacker, blob.policy_index, less=int(TPMA_NV.AUTHWRITE))
    with pytest.raises(TSS2_Exception, match="before being initialized"):
        open_by_hand(attacker, blob, now)


@pytest.mark.parametrize("how", ["same public area", "authwrite", "missing"])
def test_older_anchor_is_not_accepted_when_its_index_was_redefined(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI, how: str
) -> None:
    with platform.open_anchor(blob, ROOT) as anchor:
        anchor.write(OLD)
        anchor.write(NEW)
        if how == "missing":
            attacker.nv_undefine_space(attacker.tr_from_tpmpublic(blob.anchor_index.handle))
        elif how == "authwrite":
            index = redefine(attacker, blob.anchor_index, more=int(TPMA_NV.AUTHWRITE))
            attacker.nv_write(index, OLD.to_bytes())
        else:
            index = redefine(attacker, blob.anchor_index)
            assert write_everything(attacker, index, OLD.to_bytes()) == 0
        for use in (anchor.read, lambda: anchor.write(Anchor(3, bytes(32)))):
            with pytest.raises(PlatformTpmError, match="somebody undefined it"):
                use()
    # Nor does a fresh keeper write what it finds unwritten.
    with pytest.raises(PlatformTpmError, match="somebody undefined it"):
        platform.open_anchor(blob, ROOT)


def test_signature_does_not_serve_when_kept_for_another_session_or_other_data(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands on the bus at a write: key, nonce, cpHash and signature. The key is loaded still.
    seen: list[tuple[bytes, bytes, bytes, TPMT_SIGNATURE]] = []
    real = WriteAuthority.sign

    def tapped(self: WriteAuthority, nonce: bytes, cp_hash: bytes, policy_ref: bytes) -> TPMT_SIGNATURE:
        signature = real(self, nonce, cp_hash, policy_ref)
        seen.append((nonce, cp_hash, policy_ref, signature))
        return signature

    monkeypatch.setattr(WriteAuthority, "sign", tapped)
    with platform.open_anchor(blob, ROOT) as anchor:
        anchor.write(OLD)
        anchor.write(NEW)
        key = loaded_key(attacker)
        session = attacker.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, "aes128cfb", TPM2_ALG.SHA256)
        nonce, cp_hash, policy_ref, signature = seen[0]
        # Each was for its own moment, and for exactly this write of exactly this index.
        assert seen[0][0] != seen[1][0]
        assert [one[1] for one in seen] == [
            write_cp_hash(blob.anchor_index.name, written.to_bytes()) for written in (OLD, NEW)
        ]
        own_nonce = bytes(attacker.trsess_get_nonce_tpm(session))
        for tried in (nonce, own_nonce, b""):
            with pytest.raises(TSS2_Exception):
                attacker.policy_signed(key, session, signature, tried, cp_hash, policy_ref, 0)
        # A keeper that was made to sign for the attacker's session signed one write only.
        index = attacker.tr_from_tpmpublic(blob.anchor_index.handle)
        authority = WriteAuthority(ROOT)
        cp_hash = write_cp_hash(blob.anchor_index.name, Anchor(3, b"3" * 32).to_bytes())
        signature = real(authority, own_nonce, cp_hash, policy_ref)
        attacker.policy_signed(key, session, signature, own_nonce, cp_hash, policy_ref, 0)
        with pytest.raises(TSS2_Exception, match="policy check failed"):
            attacker.nv_write(index, OLD.to_bytes(), session1=session)
        attacker.flush_context(session)
        assert anchor.read() == NEW


def test_signature_for_the_anchor_does_not_write_the_policy_when_exchanged(
    platform: PlatformTpm, blob: SealedBlob
) -> None:
    authority = WriteAuthority(ROOT)
    right = policy_index(blob.policy_index.handle, authority)
    wrong = replace(right, policy_ref=b"vtpm anchor")
    connection = platform._connection

    def write() -> None:
        writer = IndexWriter(connection, authority, blob.srk_name)
        index = connection.esapi.tr_from_tpmpublic(blob.policy_index.handle)
        try:
            writer.write(index, wrong, bytes(34))
        finally:
            writer.close()

    with pytest.raises(PlatformTpmError, match="policy"):
        connection.run("write", write)
    assert platform.unseal_root(blob).root == ROOT


def test_loaded_authority_signs_for_nobody_when_another_client_tries(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    with platform.open_anchor(blob, ROOT):
        key = loaded_key(attacker)
        assert bytes(attacker.tr_get_name(key)) == WriteAuthority(ROOT).name
        policy = attacker.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, "aes128cfb", TPM2_ALG.SHA256)
        for session in (ESYS_TR.PASSWORD, policy):
            with pytest.raises(TSS2_Exception, match=r"authValue or authPolicy|policy check failed"):
                attacker.hmac(key, b"message", TPM2_ALG.SHA256, session1=session)
        attacker.flush_context(policy)


def test_root_is_lost_and_said_to_be_cleared_when_the_tpm_was_cleared(
    swtpm: SwtpmPlatform, platform: PlatformTpm, blob: SealedBlob
) -> None:
    subprocess.run(["tpm2_clear", "-T", swtpm.tcti, "-c", "p"], check=True, timeout=10, capture_output=True)
    words = refused(platform, blob)
    assert "was cleared" in words
    assert "`vtpm recover`" in words
    with pytest.raises(PlatformTpmError, match="was cleared"):
        platform.open_anchor(blob, ROOT)


def test_root_does_not_open_when_the_tpm_is_another(blob: SealedBlob) -> None:
    with short_directory() as elsewhere, SwtpmPlatform(elsewhere) as other, PlatformTpm(other.tcti) as platform:
        platform.extend(0, PcrBank.SHA256, b"f" * 32)
        assert "is not the one that the root key was sealed by" in refused(platform, blob)
        # Also when that one has an index of the same Name.
        with pytest.raises(PlatformTpmError, match="is not the one"):
            platform.open_anchor(blob, ROOT)


@pytest.mark.parametrize("index", DEFAULT_PCRS.indexes)
def test_root_does_not_open_when_one_pcr_is_wrong(platform: PlatformTpm, blob: SealedBlob, index: int) -> None:
    platform.extend(index, PcrBank.SHA256, b"x" * 32)
    assert f"PCRs changed in bank sha256: {index} " in refused(platform, blob)


def test_dropped_pcrs_open_no_more_when_an_old_root_file_is_put_back(
    platform: PlatformTpm, blob: SealedBlob, attacker: ESAPI
) -> None:
    other = PcrSet("other", DEFAULT_PCRS, (b"1" * 32,) * 4)
    files: list[SealedBlob] = []
    both = platform.allow(blob, ROOT, other, files.append)
    after = platform.drop(both, ROOT, "set-up", files.append)
    assert "PCRs changed" in refused(platform, after)
    for old in (blob, both):
        with pytest.raises(StateError, match="older than the last change of the policy"):
            platform.unseal_root(old)
    for old in files:  # also those of a crash in between
        with pytest.raises((StateError, PlatformTpmError)):
            platform.unseal_root(old)


def test_second_opening_is_refused_when_the_fence_was_extended(swtpm: SwtpmPlatform, platform: PlatformTpm) -> None:
    blob = platform.seal_root(ROOT, platform.pcr_set("set-up", FENCED), lambda _: None, fence_pcr=12)
    platform.extend_fence(blob, platform.unseal_root(blob).root, 12)
    assert "the fence in PCR 12 was closed" in refused(platform, blob)
    with PlatformTpm(swtpm.tcti) as second, ESAPI(swtpm.tcti) as attacker:
        with pytest.raises(TSS2_Exception):
            attacker.pcr_reset(ESYS_TR.PCR12)
        assert "the fence in PCR 12 was closed" in refused(second, blob)
    swtpm.stop()
    swtpm.start()
    platform.extend(0, PcrBank.SHA256, b"f" * 32)
    assert platform.unseal_root(blob).root == ROOT


@contextmanager
def listened(directory: Path, swtpm: SwtpmPlatform) -> Iterator[tuple[PlatformTpm, RecordingProxy]]:
    with RecordingProxy(directory / "bus", swtpm.socket_path) as proxy, PlatformTpm(proxy.tcti) as platform:
        yield platform, proxy


def test_listener_hears_neither_root_nor_authority_when_all_is_used(directory: Path, swtpm: SwtpmPlatform) -> None:
    with listened(directory, swtpm) as (platform, proxy):
        platform.extend(0, PcrBank.SHA256, b"f" * 32)
        blob = platform.seal_root(ROOT, platform.pcr_set("set-up", FENCED), lambda _: None)
        platform.unseal_root(blob)
        blob = platform.allow(blob, ROOT, PcrSet("other", FENCED, (b"1" * 32,) * 5), lambda _: None)
        with platform.open_anchor(blob, ROOT) as anchor:
            anchor.write(NEW)
            assert anchor.read() == NEW
        platform.extend_fence(blob, ROOT, 12)
        recorded = bytes(proxy.recorded)
    authority = WriteAuthority(ROOT)
    # The listener does hear the rest: LoadExternal, its public part, and what was written.
    for public in (bytes.fromhex("00000167"), authority.public().publicArea.marshal(), NEW.to_bytes()):
        assert public in recorded
    for hidden in (ROOT, authority._key, authority._seed):
        secret = hidden.reveal()
        assert not any(secret[at : at + 8] in recorded for at in range(len(secret) - 7))
