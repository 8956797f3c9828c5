"""Sealing the root key, opening it, and rewriting the policy that opens it. For platform_tpm alone.

Everything here runs in a connection's thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tpm2_pytss import (
    ESYS_TR,
    TPM2_SE,
    TPM2B_DATA,
    TPM2B_DIGEST,
    TPM2B_PRIVATE,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_SENSITIVE_DATA,
    TPMA_SESSION,
    TPML_DIGEST,
    TPML_PCR_SELECTION,
    TPMS_SENSITIVE_CREATE,
    TSS2_Exception,
)

from vtpm.errors import PlatformTpmError, StateError
from vtpm.platform_tpm import faults, nv_index
from vtpm.platform_tpm.anchor import ANCHOR_BYTES, FIRST_ANCHOR, Anchor, anchor_index
from vtpm.platform_tpm.connection import Connection
from vtpm.platform_tpm.fence import is_fenced
from vtpm.platform_tpm.nv_index import IndexWriter, NvIndex
from vtpm.platform_tpm.objects import read_sealed_public, sealed_template
from vtpm.platform_tpm.pcr_access import TRIES, always_changing, read_pcrs
from vtpm.platform_tpm.root_policy import (
    APPROVED_BYTES,
    PcrSet,
    PcrSets,
    approved,
    authorize_nv_digest,
    branches,
)
from vtpm.platform_tpm.sealed_blob import Indexes, IndexRef, SealedBlob
from vtpm.platform_tpm.write_authority import WriteAuthority
from vtpm.secret import Secret

_TITLE = "policy index"
_POLICY_REF = b"vtpm root policy"


@dataclass(frozen=True)
class OpenedRoot:
    """The root key, out of its seal.

    Args:
        root: the key.
        allowed: the PCR sets that may open it now.
        opened_by: the one of them that did.
    """

    root: Secret = field(repr=False)
    allowed: PcrSets
    opened_by: PcrSet


def policy_index(handle: int, authority: WriteAuthority) -> NvIndex:
    """Return the policy index of an authority at a handle."""
    return NvIndex.of(_TITLE, handle, APPROVED_BYTES, _POLICY_REF, authority)


def find_indexes(connection: Connection, root: Secret) -> Indexes:
    """Return the indexes of a root key that the TPM has; of several anchors the one with the greatest version.

    Each answer is authenticated, so that nobody on the bus can hide one. What a sealing that was cut short has defined
    and not written holds nothing, and is undefined.
    """
    authority = WriteAuthority(root)
    policy: IndexRef | None = None
    anchors: list[tuple[int, IndexRef]] = []
    with connection.storage_primary() as (srk, srk_name):
        with connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION.AUDIT) as session:
            named = [
                (handle, *nv_index.find(connection, handle, session))
                for handle in nv_index.taken_handles(connection, session)
            ]
        with connection.session(srk, TPM2_SE.HMAC, 0) as session:
            for handle, index, name in named:
                wanted = policy_index(handle, authority), anchor_index(handle, authority)
                if name in (one.name(written=False) for one in wanted):
                    connection.esapi.nv_undefine_space(index)
                elif name == wanted[1].ref.name:
                    data = nv_index.read(connection, index, wanted[1].ref, wanted[1].title, ANCHOR_BYTES, session)
                    anchors.append((Anchor.from_bytes(data).version, wanted[1].ref))
                elif name == wanted[0].ref.name:
                    policy = wanted[0].ref
    return Indexes(policy, max(anchors, key=lambda found: found[0])[1] if anchors else None, srk_name)


def seal(connection: Connection, root: Secret, first: PcrSet, kept: Indexes) -> SealedBlob:
    """Seal a root key for indexes that are kept, and others yet to be made at handles that are free now."""
    authority = WriteAuthority(root)
    handles = nv_index.free_handles(connection, (kept.policy is None) + (kept.anchor is None))
    policy = kept.policy or policy_index(handles.pop(0), authority).ref
    anchor = kept.anchor or anchor_index(handles.pop(0), authority).ref
    sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=TPM2B_SENSITIVE_DATA(root.reveal())))
    both_ways = TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
    with (
        connection.storage_primary() as (srk, srk_name),
        connection.session(srk, TPM2_SE.HMAC, both_ways) as session,
    ):
        private, public, *_ = connection.esapi.create(
            srk,
            sensitive,
            sealed_template(authorize_nv_digest(policy.name)),
            TPM2B_DATA(),
            TPML_PCR_SELECTION(),
            session1=session,
        )
    return SealedBlob(
        srk_name=srk_name,
        ek_name=connection.endorsement_name(),
        policy_index=policy,
        anchor_index=anchor,
        lists=((first,),),
        public=public.publicArea.marshal(),
        private=bytes(private),
    ).signed(root)


def make_indexes(connection: Connection, blob: SealedBlob, root: Secret, kept: Indexes) -> None:
    """Define and write the policy index and the anchor index of a blob; one that is kept is not defined anew.

    The anchor of one that is kept stays as it is.
    """
    authority = WriteAuthority(root)
    writer = IndexWriter(connection, authority, blob.srk_name)
    try:
        policy, anchor = (
            policy_index(blob.policy_index.handle, authority),
            anchor_index(blob.anchor_index.handle, authority),
        )
        if kept.policy is None:
            writer.write(writer.define(policy), policy, approved(blob.lists[0]), first=True)
        else:
            writer.write(nv_index.locate(connection, policy.ref, _TITLE), policy, approved(blob.lists[0]))
        if kept.anchor is None:
            writer.write(writer.define(anchor), anchor, FIRST_ANCHOR.to_bytes(), first=True)
    finally:
        writer.close()


def undefine_indexes(connection: Connection, blob: SealedBlob) -> None:
    """Undefine what was made of the indexes of a blob; indexes with other Names are left alone."""
    for ref in (blob.policy_index, blob.anchor_index):
        nv_index.undefine(connection, ref)


def current_list(connection: Connection, blob: SealedBlob) -> PcrSets:
    """Return the PCR sets that may open the root key now, by an answer that only the TPM can have made.

    Raises:
        PlatformTpmError: the index is missing or was redefined, or the TPM is another.
        StateError: the blob does not list what the index holds.
    """
    with (
        connection.storage_primary(blob.srk_name) as (srk, _),
        connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION(0)) as session,
    ):
        return _held_list(connection, blob, session)


def _held_list(connection: Connection, blob: SealedBlob, session: Any) -> PcrSets:
    ref = blob.policy_index
    index = nv_index.locate(connection, ref, _TITLE)
    sets = blob.list_of(nv_index.read(connection, index, ref, _TITLE, APPROVED_BYTES, session))
    if sets is None:
        raise StateError(
            f"the {_TITLE} of the platform TPM {connection.tcti!r} holds a policy that the root file does not list: "
            "the file is older than the last change of the policy",
            next_step="Put back the newest root file, or run `vtpm recover` with the recovery key",
        )
    return sets


def write_list(connection: Connection, blob: SealedBlob, root: Secret, sets: PcrSets) -> None:
    """Write a list of PCR sets into the policy index."""
    authority = WriteAuthority(root)
    index = policy_index(blob.policy_index.handle, authority)
    writer = IndexWriter(connection, authority, blob.srk_name)
    try:
        writer.write(nv_index.locate(connection, index.ref, _TITLE), index, approved(sets))
    finally:
        writer.close()


def unseal(connection: Connection, blob: SealedBlob) -> OpenedRoot:
    """Open the root key; see PlatformTpm.unseal_root."""
    public = read_sealed_public(blob)
    with connection.storage_primary() as (srk, name):
        # Before anything is salted to it: what answers may be another TPM, or stand between.
        if name != blob.srk_name:
            raise _other_tpm(connection, blob)
        nv_index.locate(connection, blob.policy_index, _TITLE)
        with connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION.DECRYPT) as session:
            try:
                handle = connection.esapi.load(srk, TPM2B_PRIVATE(blob.private), public, session1=session)
            except TSS2_Exception as error:
                if faults.tpm_code(error) in faults.NO_ROOM | faults.NO_USE | {None}:
                    raise
                raise StateError(
                    f"the sealed key is damaged: the TPM refuses it ({error})",
                    next_step="Put back the root file from a backup",
                ) from error
        with connection.flushed(handle):
            opened = _open(connection, srk, handle, blob)
    blob.verify(opened.root)
    return opened


def _open(connection: Connection, srk: Any, handle: Any, blob: SealedBlob) -> OpenedRoot:
    for _ in range(TRIES):
        # Not authenticated: it only says what to try, and the TPM itself decides.
        sets = _held_list(connection, blob, ESYS_TR.PASSWORD)
        matching = _matching(connection, sets)
        with connection.session(srk, TPM2_SE.POLICY, TPMA_SESSION.ENCRYPT) as session:
            try:
                _apply(connection, session, blob, sets, matching)
                secret = bytes(connection.esapi.unseal(handle, session1=session))
            except TSS2_Exception as error:
                # A PCR or the index changed since it was read.
                if faults.tpm_code(error) not in (faults.RC_PCR_CHANGED, faults.RC_VALUE, faults.RC_POLICY_FAIL):
                    raise
            else:
                return OpenedRoot(Secret(secret), sets, matching)
    raise always_changing(connection)


def _matching(connection: Connection, sets: PcrSets) -> PcrSet:
    """Return the set that the PCRs are now, or raise with the PCRs that differ from the nearest one."""
    differing = {}
    fenced: list[int] = []
    for one in sets:
        now = read_pcrs(connection, one.selection)
        changed = one.differing(now)
        if not changed:
            return one
        differing[one] = changed
        if is_fenced(one, now):
            fenced += changed
    if fenced:
        raise PlatformTpmError(
            "the root key does not open: it was opened already since the platform started, and then the fence in "
            f"PCR {fenced[0]} was closed",
            next_step="Reboot the host",
        )
    nearest = min(differing, key=lambda one: len(differing[one]))
    raise PlatformTpmError(
        f"the root key does not open: PCRs changed in bank {nearest.selection.bank}: "
        f"{', '.join(map(str, differing[nearest]))} (against {nearest.label!r}, the nearest of {len(sets)} allowed)",
        next_step="Boot what is allowed, or run `vtpm recover` with the recovery key",
    )


def _apply(connection: Connection, session: Any, blob: SealedBlob, sets: PcrSets, matching: PcrSet) -> None:
    """Bring a policy session to the digest that the sealed key wants."""
    esapi = connection.esapi
    ref = blob.policy_index
    esapi.policy_pcr(session, TPM2B_DIGEST(), TPML_PCR_SELECTION.parse(str(matching.selection)))
    esapi.policy_or(session, TPML_DIGEST(branches(sets)))
    index = nv_index.locate(connection, ref, _TITLE)
    try:
        esapi.policy_authorize_nv(index, session)
    except TSS2_Exception as error:
        if faults.tpm_code(error) in faults.NOT_OUR_INDEX:
            raise nv_index.redefined(connection, ref, _TITLE) from error
        raise


def _other_tpm(connection: Connection, blob: SealedBlob) -> PlatformTpmError:
    whose = f"the platform TPM {connection.tcti!r}"
    if connection.endorsement_name() == blob.ek_name:
        return PlatformTpmError(
            f"{whose} was cleared since the root key was sealed by it: it cannot open the key any more",
            next_step="Run `vtpm recover` with the recovery key",
        )
    return PlatformTpmError(
        f"{whose} is not the one that the root key was sealed by",
        next_step="Connect the TPM that sealed it, or run `vtpm recover` with the recovery key",
    )
