"""The NV indexes that vtpm makes in the platform TPM, and how they are written. For platform_tpm alone.

An index's Name covers its handle, attributes, policy and size, and whether it was ever written; not its content and not
its authValue. So whoever can undefine an index can define one with the same public area, but not one that was written:
writing takes the write authority, which is in the public area. What the Name is to be is known beforehand, and is
compared before each use.

Spec: TPM 2.0 Part 1 (revision 1.59), 16 (Names), 37 (NV memory); Part 2, 13.4 (TPMA_NV).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_SE,
    TPM2B_NV_PUBLIC,
    TPMA_NV,
    TPMA_SESSION,
    TPMS_NV_PUBLIC,
    TSS2_Exception,
)

from vtpm.errors import PlatformTpmError
from vtpm.platform_tpm import faults
from vtpm.platform_tpm.connection import Connection
from vtpm.platform_tpm.sealed_blob import IndexRef
from vtpm.platform_tpm.write_authority import WriteAuthority, write_cp_hash

FIRST_HANDLE = 0x01815650
"""Where vtpm looks for free handles. Spec: TCG Registry of Reserved TPM 2.0 Handles, NV indexes of the owner."""
LAST_HANDLE = FIRST_HANDLE + 63
_ATTRIBUTES = TPMA_NV.POLICYWRITE | TPMA_NV.AUTHREAD | TPMA_NV.NO_DA

RECOVER = "Find out who did this; then run `vtpm recover` with the recovery key"


@dataclass(frozen=True)
class NvIndex:
    """An ordinary NV index of the owner that everybody may read and one write authority may write.

    Args:
        title: for errors, such as "policy index".
        handle: TPM handle.
        size_bytes: of its content, written whole.
        policy_ref: what the write authority signs beside the command: tells indexes of one authority apart.
        policy: the digest of PolicySigned with that reference.
    """

    title: str
    handle: int
    size_bytes: int
    policy_ref: bytes
    policy: bytes

    @classmethod
    def of(cls, title: str, handle: int, size_bytes: int, policy_ref: bytes, authority: WriteAuthority) -> Self:
        """Make one that an authority writes."""
        return cls(title, handle, size_bytes, policy_ref, authority.policy_digest(policy_ref))

    @property
    def ref(self) -> IndexRef:
        """Its handle and the Name that it has once it is written."""
        return IndexRef(self.handle, self.name(written=True))

    def name(self, *, written: bool) -> bytes:
        """Return its TPM Name."""
        return bytes(self.public(written=written).nvPublic.get_name())

    def public(self, *, written: bool = False) -> TPM2B_NV_PUBLIC:
        """Return its public area."""
        attributes = _ATTRIBUTES | TPMA_NV.WRITTEN if written else _ATTRIBUTES
        area = TPMS_NV_PUBLIC(
            nvIndex=self.handle,
            nameAlg=TPM2_ALG.SHA256,
            attributes=attributes,
            authPolicy=self.policy,
            dataSize=self.size_bytes,
        )
        return TPM2B_NV_PUBLIC(area)


def free_handles(connection: Connection, count: int) -> list[int]:
    """Return handles between FIRST_HANDLE and LAST_HANDLE that no index has.

    Raises:
        PlatformTpmError: there are not so many.
    """
    taken = set(taken_handles(connection))
    free = [handle for handle in range(FIRST_HANDLE, LAST_HANDLE + 1) if handle not in taken]
    if len(free) < count:
        raise PlatformTpmError(
            f"the platform TPM {connection.tcti!r} has no {count} free NV indexes from 0x{FIRST_HANDLE:08x} to "
            f"0x{LAST_HANDLE:08x}",
            next_step="Undefine what is no longer in use: tpm2_getcap handles-nv-index, tpm2_nvundefine",
        )
    return free[:count]


def taken_handles(connection: Connection, session: Any = ESYS_TR.NONE) -> list[int]:
    """Return the handles between FIRST_HANDLE and LAST_HANDLE that an index has.

    Args:
        session: an audit session, with which the answer is authenticated.
    """
    found: list[int] = []
    more, first = True, FIRST_HANDLE
    while more and first <= LAST_HANDLE:
        more, capability = connection.esapi.get_capability(
            TPM2_CAP.HANDLES, first, LAST_HANDLE - first + 1, session1=session
        )
        part = [int(handle) for handle in capability.data.handles]
        if not part:
            break
        found += part
        first = part[-1] + 1
    return [handle for handle in found if handle <= LAST_HANDLE]


def find(connection: Connection, handle: int, session: Any) -> tuple[Any, bytes]:
    """Return the index under a handle, and its Name.

    Args:
        session: an audit session, with which the answer is authenticated.
    """
    index = connection.esapi.tr_from_tpmpublic(handle, session1=session)
    return index, bytes(connection.esapi.tr_get_name(index))


def locate(connection: Connection, ref: IndexRef, title: str) -> Any:
    """Return the index, checked by its Name.

    Raises:
        PlatformTpmError: it is missing, or is another index under the same handle.
    """
    whose = f"the {title} 0x{ref.handle:08x} of the platform TPM {connection.tcti!r}"
    try:
        index = connection.esapi.tr_from_tpmpublic(ref.handle)
    except TSS2_Exception as error:
        if faults.tpm_code(error) != faults.RC_HANDLE:
            raise
        raise PlatformTpmError(f"{whose} is missing: somebody undefined it", next_step=RECOVER) from error
    if bytes(connection.esapi.tr_get_name(index)) != ref.name:
        raise redefined(connection, ref, title)
    return index


def redefined(connection: Connection, ref: IndexRef, title: str) -> PlatformTpmError:
    """Return the error for an index that is not the one that was made."""
    return PlatformTpmError(
        f"the {title} 0x{ref.handle:08x} of the platform TPM {connection.tcti!r} is not the one that was made: "
        "somebody undefined it and defined another",
        next_step=RECOVER,
    )


def read(connection: Connection, index: Any, ref: IndexRef, title: str, size_bytes: int, session: Any) -> bytes:
    """Return the content of an index that `locate` returned.

    Args:
        session: ESYS_TR.PASSWORD, or an HMAC session, with which the answer is authenticated.
    Raises:
        PlatformTpmError: it was redefined with an authValue, or was never written.
    """
    try:
        return bytes(connection.esapi.nv_read(index, size_bytes, session1=session))
    except TSS2_Exception as error:
        if faults.tpm_code(error) in faults.NOT_OUR_INDEX:
            raise redefined(connection, ref, title) from error
        raise


def undefine(connection: Connection, ref: IndexRef) -> None:
    """Undefine an index if it is exactly this one, written or not; leave any other alone."""
    try:
        found = connection.esapi.tr_from_tpmpublic(ref.handle)
    except TSS2_Exception as error:
        if faults.tpm_code(error) != faults.RC_HANDLE:
            raise
        return
    public, _ = connection.esapi.nv_read_public(found)
    public.nvPublic.attributes |= TPMA_NV.WRITTEN
    if bytes(public.nvPublic.get_name()) == ref.name:
        connection.esapi.nv_undefine_space(found)


class IndexWriter:
    """The write authority loaded, and a session to write with; kept until `close`, so that a write is two commands.

    Args:
        connection: to the TPM, in whose thread this is used.
        authority: the key.
        srk_name: what the storage primary key's Name is to be: nothing is sent to another one.
    Raises:
        PlatformTpmError: the storage primary key is another.
        TSS2_Exception: the TPM's refusal.
    """

    def __init__(self, connection: Connection, authority: WriteAuthority, srk_name: bytes) -> None:
        self._connection = connection
        self._authority = authority
        self._key: Any = None
        self._session: Any = None
        esapi = connection.esapi
        with connection.storage_primary(srk_name) as (srk, _):
            try:
                with connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION.DECRYPT) as session:
                    self._key = esapi.load_external(
                        authority.public(), authority.sensitive(), ESYS_TR.NULL, session1=session
                    )
                self._session = connection.start_session(srk, TPM2_SE.POLICY, 0)
            except TSS2_Exception:
                self.close()
                raise

    def define(self, index: NvIndex) -> Any:
        """Define an index; it is not written yet."""
        return self._connection.esapi.nv_define_space(b"", index.public())

    def write(self, handle: Any, index: NvIndex, data: bytes, *, first: bool = False) -> None:
        """Write the whole of an index.

        Args:
            handle: as `define` or `locate` returned it.
            first: whether it was never written.
        Raises:
            TSS2_Exception: the TPM's refusal; this writer is of no more use.
            PlatformTpmError: the caller waits no more; nothing was written.
        """
        cp_hash = write_cp_hash(index.name(written=not first), data)
        esapi = self._connection.esapi
        nonce = bytes(esapi.trsess_get_nonce_tpm(self._session))
        signature = self._authority.sign(nonce, cp_hash, index.policy_ref)
        esapi.policy_signed(self._key, self._session, signature, nonce, cp_hash, index.policy_ref, 0)
        # What is signed now can be written later than what others sign, and would put an older content back.
        self._connection.refuse_late()
        esapi.nv_write(handle, data, session1=self._session)

    def close(self) -> None:
        """Flush both."""
        for handle in (self._session, self._key):
            if handle is not None:
                self._connection.flush(handle)
