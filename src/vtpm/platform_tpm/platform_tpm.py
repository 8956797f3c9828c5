"""PlatformTpm: one connection to the host's TPM. For the keeper alone.

The bus to the TPM is not trusted: everything secret crosses it in a session whose salt is encrypted to the storage
primary key, with AES-128-CFB on parameters and HMAC on both ways. FAPI and tpm2-pytss' policy class are not used.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_HC,
    TPM2_SE,
    TPM2_SU,
    TPM2B_DATA,
    TPM2B_PRIVATE,
    TPM2B_SENSITIVE_CREATE,
    TPM2B_SENSITIVE_DATA,
    TPMA_SESSION,
    TPML_PCR_SELECTION,
    TPMS_SENSITIVE_CREATE,
    TSS2_Exception,
)

from vtpm.errors import PlatformTpmError, StateError, UnavailableError
from vtpm.platform_tpm import faults
from vtpm.platform_tpm.bounded import BoundedThread
from vtpm.platform_tpm.objects import parent_template, read_sealed_public, sealed_template
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection, all_zero, pcr_policy_digest
from vtpm.platform_tpm.policy import apply_pcr_policy
from vtpm.platform_tpm.sealed_blob import SealedBlob

DEFAULT_TIMEOUT_S = 20.0
"""For one method. Hardware makes an ECC primary key in well under a second; a TPM's longest command is RSA's."""
MAX_SECRET_BYTES = 128
"""MAX_SYM_DATA of TPM 2.0 Part 2 (revision 1.59), A.1: what a TPM must be able to seal."""
MAX_RANDOM_BYTES = 1024

# TPM_PT. Spec: TPM 2.0 Part 2 (revision 1.59), 6.13.
_PT_MANUFACTURER = 0x105
_PT_VENDOR_STRINGS = (0x106, 0x107, 0x108, 0x109)
_PT_FIRMWARE_VERSIONS = (0x10B, 0x10C)

_PCR_READ_TRIES = 5
_MAX_HANDLES = 254

ResultT = TypeVar("ResultT")


class ZeroPcrs(enum.Enum):
    """What to do when all PCRs of a selection are zero, so that nothing measured this boot."""

    REFUSE = "refuse"
    ALLOW = "allow"


@dataclass(frozen=True)
class TpmInfo:
    """What a TPM says of itself.

    Args:
        manufacturer: four characters, such as "INTC".
        vendor: vendor's string.
        firmware: version, such as "7.85.4555.0".
        banks: names of PCR banks in use, such as "sha256"; also ones that vtpm does not use.
    """

    manufacturer: str
    vendor: str
    firmware: str
    banks: tuple[str, ...]


class PlatformTpm:
    """One connection to the host's TPM; a context manager, for one thread at a time.

    Every method ends within the time limit. After one that did not, the connection is of no more use.

    Args:
        tcti: any tpm2-tss TCTI configuration, such as "device:/dev/tpmrm0" or "swtpm:path=SOCKET".
        timeout_s: limit of connecting, and of each method.
    Raises:
        PlatformTpmError: it is absent, not a TPM, in failure mode, or does not answer.
    """

    def __init__(self, tcti: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.tcti = tcti
        self._timeout_s = timeout_s
        self._thread = BoundedThread("platform-tpm")
        self._esapi: Any = None
        try:
            self._run("answer", self._connect)
        except PlatformTpmError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""

        def disconnect() -> None:
            if self._esapi is not None:
                self._esapi.close()
                self._esapi = None

        with contextlib.suppress(UnavailableError):  # stuck; nothing more can be done than to leave it
            self._thread.run(disconnect, self._timeout_s)
        self._thread.close(self._timeout_s)

    def info(self) -> TpmInfo:
        """Return what the TPM says of itself.

        Raises:
            PlatformTpmError: it failed or went away.
        """
        return self._run("say what it is", self._info)

    def pcr_values(self, selection: PcrSelection) -> dict[int, bytes]:
        """Return the present value of each PCR of a selection.

        Raises:
            PlatformTpmError: the TPM lacks the bank or a PCR, failed or went away.
        """
        return self._run("read PCRs", lambda: self._pcr_values(selection))

    def random(self, size_bytes: int) -> bytes:
        """Return random bytes of the TPM's, encrypted on the way.

        Args:
            size_bytes: 1 to MAX_RANDOM_BYTES.
        Raises:
            PlatformTpmError: it failed or went away.
        """
        if not 1 <= size_bytes <= MAX_RANDOM_BYTES:
            raise PlatformTpmError(f"{size_bytes} random bytes cannot be had at once; 1 to {MAX_RANDOM_BYTES} can")
        return self._run("give random bytes", lambda: self._random(size_bytes))

    def seal(self, secret: bytes, selection: PcrSelection, *, zero_pcrs: ZeroPcrs = ZeroPcrs.REFUSE) -> SealedBlob:
        """Seal a secret under the present values of some PCRs; nothing stays in the TPM.

        Args:
            secret: 1 to MAX_SECRET_BYTES bytes.
            selection: PCRs whose values must be the same at `unseal`.
            zero_pcrs: whether PCRs that are all zero will do.
        Raises:
            PlatformTpmError: the TPM lacks the bank or a PCR, the PCRs are all zero, it failed or went away.
        """
        if not 1 <= len(secret) <= MAX_SECRET_BYTES:
            raise PlatformTpmError(f"a secret of {len(secret)} bytes cannot be sealed; 1 to {MAX_SECRET_BYTES} can")
        return self._run("seal a key", lambda: self._seal(secret, selection, zero_pcrs))

    def unseal(self, blob: SealedBlob) -> bytes:
        """Return the secret of a sealed blob.

        Args:
            blob: untrusted.
        Raises:
            PlatformTpmError: PCRs differ (the message names them), another TPM sealed it, it failed or went away.
            StateError: the blob is damaged.
        """
        return self._run("open a sealed key", lambda: self._unseal(blob))

    def _run(self, doing: str, call: Callable[[], ResultT]) -> ResultT:
        """Run a call in the thread, within the time limit; make room in the TPM and try again when there is none."""

        def with_room() -> ResultT:
            try:
                return call()
            except TSS2_Exception as error:
                if faults.tpm_code(error) not in faults.NO_ROOM:
                    raise
            self._flush_leftovers()
            return call()

        try:
            return self._thread.run(with_room, self._timeout_s)
        except UnavailableError as error:
            raise PlatformTpmError(
                f"the platform TPM {self.tcti!r} cannot {doing}: {error.message}",
                next_step="Check that nothing else holds it, or start it again",
            ) from None
        except TSS2_Exception as error:
            raise faults.failed(self.tcti, doing, error) from error

    # What follows runs in the thread.

    def _connect(self) -> None:
        try:
            self._esapi = ESAPI(self.tcti)
        except (TSS2_Exception, ValueError) as error:
            if not isinstance(error, TSS2_Exception):
                raise PlatformTpmError(f"{self.tcti!r} is no TCTI configuration") from None
            raise faults.cannot_connect(self.tcti, error) from error
        try:
            self._property(_PT_MANUFACTURER)
        except TSS2_Exception as error:
            if faults.tpm_code(error) != faults.RC_INITIALIZE:
                raise
            self._esapi.startup(TPM2_SU.CLEAR)

    def _flush_leftovers(self) -> None:
        """Flush what a client that was killed left loaded; a resource manager shows none but our own."""
        for first in (TPM2_HC.TRANSIENT_FIRST, TPM2_HC.HMAC_SESSION_FIRST, TPM2_HC.POLICY_SESSION_FIRST):
            _, capability = self._esapi.get_capability(TPM2_CAP.HANDLES, first, _MAX_HANDLES)
            for handle in capability.data.handles:
                self._esapi.flush_context(self._esapi.tr_from_tpmpublic(handle))

    def _property(self, name: int) -> int:
        _, capability = self._esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, name, 1)
        found = {int(item.property): int(item.value) for item in capability.data.tpmProperties}
        return found.get(int(name), 0)

    def _info(self) -> TpmInfo:
        versions = [self._property(name) for name in _PT_FIRMWARE_VERSIONS]
        _, capability = self._esapi.get_capability(TPM2_CAP.PCRS, 0, 1)
        return TpmInfo(
            manufacturer=_text(self._property(_PT_MANUFACTURER)),
            vendor="".join(_text(self._property(name)) for name in _PT_VENDOR_STRINGS).strip(),
            firmware=".".join(str(half) for version in versions for half in (version >> 16, version & 0xFFFF)),
            banks=tuple(_bank_name(pcrs) for pcrs in capability.data.assignedPCR if any(bytes(pcrs.pcrSelect))),
        )

    def _pcr_values(self, selection: PcrSelection) -> dict[int, bytes]:
        for _ in range(_PCR_READ_TRIES):
            values: dict[int, bytes] = {}
            counters = set()
            while missing := [index for index in selection.indexes if index not in values]:
                # One answer holds at most eight digests.
                asked = TPML_PCR_SELECTION.parse(str(PcrSelection(selection.bank, tuple(missing[:8]))))
                counter, _, digests = self._esapi.pcr_read(asked)
                counters.add(counter)
                read = dict(zip(missing, (bytes(digest) for digest in digests), strict=False))
                if not read or any(len(value) != selection.bank.digest_bytes for value in read.values()):
                    raise PlatformTpmError(
                        f"the platform TPM {self.tcti!r} has no PCR {missing[0]} in the bank {selection.bank}",
                        next_step="Enable the bank in the firmware's settings, or name another with --pcrs",
                    )
                values |= read
            if len(counters) == 1:
                return values
        raise PlatformTpmError(f"the PCRs of the platform TPM {self.tcti!r} change all the time")

    @contextmanager
    def _parent(self) -> Iterator[tuple[Any, bytes]]:
        """Make the storage primary key and yield it with its Name."""
        handle, public, *_ = self._esapi.create_primary(TPM2B_SENSITIVE_CREATE(), parent_template(), ESYS_TR.OWNER)
        with self._flushed(handle):
            yield handle, bytes(public.get_name())

    @contextmanager
    def _session(self, parent: Any, kind: int, attributes: int) -> Iterator[Any]:
        """Start a session salted to the parent, with parameter encryption."""
        session = self._esapi.start_auth_session(parent, ESYS_TR.NONE, kind, "aes128cfb", TPM2_ALG.SHA256)
        with self._flushed(session):
            self._esapi.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION | attributes)
            yield session

    @contextmanager
    def _flushed(self, handle: Any) -> Iterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(TSS2_Exception):  # the TPM is gone; a cause that raised already says more
                self._esapi.flush_context(handle)

    def _random(self, size_bytes: int) -> bytes:
        found = b""
        with self._parent() as (parent, _), self._session(parent, TPM2_SE.HMAC, TPMA_SESSION.ENCRYPT) as session:
            while len(found) < size_bytes:
                found += bytes(self._esapi.get_random(size_bytes - len(found), session1=session))
        return found

    def _seal(self, secret: bytes, selection: PcrSelection, zero_pcrs: ZeroPcrs) -> SealedBlob:
        values = self._pcr_values(selection)
        if zero_pcrs is ZeroPcrs.REFUSE and len(all_zero(values)) == len(values):
            raise PlatformTpmError(
                f"the PCRs {selection} of the platform TPM {self.tcti!r} are all zero: nothing measured this boot",
                next_step="Name PCRs that the firmware extends with --pcrs",
            )
        template = sealed_template(pcr_policy_digest(selection, values))
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=TPM2B_SENSITIVE_DATA(secret)))
        both_ways = TPMA_SESSION.DECRYPT | TPMA_SESSION.ENCRYPT
        with self._parent() as (parent, name), self._session(parent, TPM2_SE.HMAC, both_ways) as session:
            private, public, *_ = self._esapi.create(
                parent, sensitive, template, TPM2B_DATA(), TPML_PCR_SELECTION(), session1=session
            )
        return SealedBlob(
            parent_name=name,
            selection=selection,
            pcr_values=tuple(values[index] for index in selection.indexes),
            public=public.publicArea.marshal(),
            private=bytes(private),
        )

    def _unseal(self, blob: SealedBlob) -> bytes:
        public = read_sealed_public(blob)
        with self._parent() as (parent, name):
            # Before anything is salted to it: what answers may be another TPM, or stand between.
            if name != blob.parent_name:
                raise PlatformTpmError(
                    f"the platform TPM {self.tcti!r} is not the one that the root key was sealed by, or was cleared",
                    next_step="Connect the TPM that sealed it; a cleared TPM cannot open it any more",
                )
            with self._session(parent, TPM2_SE.HMAC, TPMA_SESSION.DECRYPT) as session:
                try:
                    handle = self._esapi.load(parent, TPM2B_PRIVATE(blob.private), public, session1=session)
                except TSS2_Exception as error:
                    if faults.tpm_code(error) in faults.NO_ROOM | {faults.RC_FAILURE, faults.RC_LOCKOUT, None}:
                        raise
                    raise StateError(
                        f"the sealed key is damaged: the TPM refuses it ({error})",
                        next_step="Put back the root file from a backup",
                    ) from error
            with self._flushed(handle):
                return self._open(parent, handle, blob)

    def _open(self, parent: Any, handle: Any, blob: SealedBlob) -> bytes:
        for _ in range(_PCR_READ_TRIES):
            with self._session(parent, TPM2_SE.POLICY, TPMA_SESSION.ENCRYPT) as session:
                try:
                    apply_pcr_policy(self._esapi, session, blob.selection)
                    return bytes(self._esapi.unseal(handle, session1=session))
                except TSS2_Exception as error:
                    code = faults.tpm_code(error)
                    if code == faults.RC_POLICY_FAIL:
                        raise self._pcrs_differ(blob) from error
                    if code != faults.RC_PCR_CHANGED:
                        raise
        raise PlatformTpmError(f"the PCRs of the platform TPM {self.tcti!r} change all the time")

    def _pcrs_differ(self, blob: SealedBlob) -> PlatformTpmError:
        now = self._pcr_values(blob.selection)
        sealed = zip(blob.selection.indexes, blob.pcr_values, strict=True)
        changed = ", ".join(str(index) for index, value in sealed if now[index] != value) or "unknown, changed back"
        return PlatformTpmError(
            f"the root key does not open: since it was sealed, PCRs changed in bank {blob.selection.bank}: {changed}",
            next_step="Boot what was booted when it was sealed",
        )


def _text(value: int) -> str:
    """Return four characters that a TPM packs into a property; anything unprintable is left out."""
    return "".join(chr(byte) for byte in value.to_bytes(4, "big") if 0x20 <= byte < 0x7F).strip()


def _bank_name(pcrs: Any) -> str:
    known = {bank.algorithm_id: bank.value for bank in PcrBank} | {0x0004: "sha1", 0x000D: "sha512", 0x0012: "sm3"}
    return known.get(int(pcrs.hash), f"0x{int(pcrs.hash):04x}")
