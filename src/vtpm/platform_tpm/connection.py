"""Connection: one ESAPI context to the host's TPM, in a thread that can be given up on. For platform_tpm alone.

The bus to the TPM is not trusted: everything secret crosses it in a session whose salt is encrypted to the storage
primary key, with AES-128-CFB on parameters and HMAC on both ways. FAPI and tpm2-pytss' policy class are not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_HC,
    TPM2_SE,
    TPM2_SU,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_SESSION,
    TSS2_Exception,
)

from vtpm.errors import PlatformTpmError, UnavailableError
from vtpm.platform_tpm import faults
from vtpm.platform_tpm.bounded import BoundedThread
from vtpm.platform_tpm.objects import endorsement_template, parent_template

PT_MANUFACTURER = 0x105
"""TPM_PT_MANUFACTURER. Spec: TPM 2.0 Part 2 (revision 1.59), 6.13."""
_MAX_HANDLES = 254

ResultT = TypeVar("ResultT")


class Connection:
    """One connection to the host's TPM, for one thread at a time.

    Args:
        tcti: any tpm2-tss TCTI configuration.
        timeout_s: limit of connecting, and of each `run`.
    Raises:
        PlatformTpmError: it is absent, not a TPM, in failure mode, or does not answer.
    """

    def __init__(self, tcti: str, timeout_s: float) -> None:
        self.tcti = tcti
        self.generation = 0
        """Grows when everything that was loaded is gone: what a caller kept loaded is to be loaded anew."""
        self.reset_seen = False
        """Whether the TPM was reset (the platform lost its power, or booted) since the first `note_reset`."""
        self._reset_count: int | None = None
        self._timeout_s = timeout_s
        self._thread = BoundedThread("platform-tpm")
        self.esapi: Any = None
        """ESAPI; inside `run` it is connected."""
        try:
            self.run("answer", lambda: None)
        except PlatformTpmError:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect."""
        with contextlib.suppress(UnavailableError):  # stuck; nothing more can be done than to leave it
            self._thread.run(self._disconnect, self._timeout_s)
        self._thread.close(self._timeout_s)

    def run(self, doing: str, call: Callable[[], ResultT]) -> ResultT:
        """Run a call in the thread, within the time limit; make room in the TPM and try again when there is none.

        When the TPM has gone away, the next call connects anew.

        Args:
            doing: what is being done, such as "read PCRs", for errors.
        Raises:
            PlatformTpmError: the TPM refused, failed, went away or did not answer in time.
        """

        def connected() -> ResultT:
            if self.esapi is None:
                self._connect()
            try:
                return self._with_room(call)
            except TSS2_Exception as error:
                if faults.tpm_code(error) is None:
                    self._disconnect()
                raise

        try:
            return self._thread.run(connected, self._timeout_s)
        except UnavailableError as error:
            raise PlatformTpmError(
                f"the platform TPM {self.tcti!r} cannot {doing}: {error.message}",
                next_step="Check that nothing else holds it, or start it again",
            ) from None
        except TSS2_Exception as error:
            raise faults.failed(self.tcti, doing, error) from error

    # What follows runs in the thread, inside `run`.

    def reconnect(self) -> None:
        """Connect anew to a TPM that went away.

        Raises:
            PlatformTpmError: it is not back.
        """
        self._disconnect()
        self._connect()

    def refuse_late(self) -> None:
        """Let a call do nothing more that lasts once its caller has given up: another connection may have by now.

        Raises:
            PlatformTpmError: its caller has.
        """
        if self._thread.given_up:
            raise PlatformTpmError(f"the platform TPM {self.tcti!r} answered too late")

    def property(self, name: int) -> int:
        """Return a TPM_PT, 0 when the TPM has none such."""
        _, capability = self.esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, name, 1)
        found = {int(item.property): int(item.value) for item in capability.data.tpmProperties}
        return found.get(int(name), 0)

    @contextmanager
    def storage_primary(self, expected_name: bytes | None = None) -> Iterator[tuple[Any, bytes]]:
        """Make the storage primary key (SRK) and yield it with its Name.

        Args:
            expected_name: what the Name is to be, so that nothing is salted to another TPM's key.
        Raises:
            PlatformTpmError: it is another.
        """
        with self.primary(parent_template(), ESYS_TR.OWNER) as (handle, public):
            name = bytes(public.get_name())
            if expected_name not in (None, name):
                raise PlatformTpmError(
                    f"the platform TPM {self.tcti!r} is not the one that the root key was sealed by, or was cleared",
                    next_step="Connect the TPM that sealed it, or run `vtpm recover` with the recovery key",
                )
            yield handle, name

    def endorsement_name(self) -> bytes:
        """Return the Name of the endorsement key (EK) that TCG's template gives; a TPM keeps it when it is cleared."""
        with self.primary(endorsement_template(), ESYS_TR.ENDORSEMENT) as (_, public):
            return bytes(public.get_name())

    @contextmanager
    def primary(self, template: TPM2B_PUBLIC, hierarchy: int) -> Iterator[tuple[Any, Any]]:
        """Make a primary key of a template, yield it with its public area (TPM2B_PUBLIC), and flush it at the end."""
        handle, public, *_ = self.esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template, hierarchy)
        with self.flushed(handle):
            yield handle, public

    def start_session(self, salt_key: Any, kind: int, attributes: int) -> Any:
        """Start a session salted to a key, with parameter encryption; the caller flushes it."""
        session = self.esapi.start_auth_session(salt_key, ESYS_TR.NONE, kind, "aes128cfb", TPM2_ALG.SHA256)
        self.esapi.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION | attributes)
        return session

    @contextmanager
    def session(self, salt_key: Any, kind: int, attributes: int) -> Iterator[Any]:
        """Start a session salted to a key, with parameter encryption, and flush it at the end."""
        session = self.start_session(salt_key, kind, attributes)
        with self.flushed(session):
            yield session

    @contextmanager
    def flushed(self, handle: Any) -> Iterator[None]:
        """Flush an object or session at the end."""
        try:
            yield
        finally:
            self.flush(handle)

    def flush(self, handle: Any) -> None:
        """Flush an object or session that may be gone."""
        with contextlib.suppress(TSS2_Exception):  # the TPM is gone; a cause that raised already says more
            self.esapi.flush_context(handle)

    def reset_count(self, salt_key: Any) -> int:
        """Return how often the TPM was reset, in an answer that an audit session authenticates.

        Spec: TPM 2.0 Part 2 (revision 1.59), 10.11.1, resetCount.
        """
        with self.session(salt_key, TPM2_SE.HMAC, TPMA_SESSION.AUDIT) as session:
            return int(self.esapi.read_clock(session1=session).clockInfo.resetCount)

    def note_reset(self, salt_key: Any) -> None:
        """Compare the TPM's count of resets with what it was at first; `reset_seen` tells."""
        count = self.reset_count(salt_key)
        if self._reset_count is not None and count != self._reset_count:
            self.reset_seen = True
        self._reset_count = count

    def _with_room(self, call: Callable[[], ResultT]) -> ResultT:
        try:
            return call()
        except TSS2_Exception as error:
            if faults.tpm_code(error) not in faults.NO_ROOM:
                raise
        self._flush_leftovers()
        return call()

    def _connect(self) -> None:
        try:
            self.esapi = ESAPI(self.tcti)
        except (TSS2_Exception, ValueError) as error:
            if not isinstance(error, TSS2_Exception):
                raise PlatformTpmError(f"{self.tcti!r} is no TCTI configuration") from None
            raise faults.cannot_connect(self.tcti, error) from error
        try:
            self.property(PT_MANUFACTURER)
        except TSS2_Exception as error:
            if faults.tpm_code(error) != faults.RC_INITIALIZE:
                raise
            self.esapi.startup(TPM2_SU.CLEAR)

    def _disconnect(self) -> None:
        self.generation += 1
        if self.esapi is not None:
            self.esapi.close()
            self.esapi = None

    def _flush_leftovers(self) -> None:
        """Flush what a client that was killed left loaded; a resource manager shows none but our own."""
        self.generation += 1
        for first in (TPM2_HC.TRANSIENT_FIRST, TPM2_HC.HMAC_SESSION_FIRST, TPM2_HC.POLICY_SESSION_FIRST):
            _, capability = self.esapi.get_capability(TPM2_CAP.HANDLES, first, _MAX_HANDLES)
            for handle in capability.data.handles:
                self.esapi.flush_context(self.esapi.tr_from_tpmpublic(handle))
