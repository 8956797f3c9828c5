"""The PCR that the services are measured into, through whoever has the platform TPM. For the starter alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

from vtpm.config import Config
from vtpm.errors import ConflictError, UnavailableError
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection
from vtpm.wire.keeper import PcrState, check_platform
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.service_lock import ServiceLock

_POLL_S = 0.05


class ServicesPcr(Protocol):
    """One PCR of the platform TPM."""

    def read(self) -> PcrState:
        """Return it as it is. Raises PlatformTpmError, UnavailableError: whoever has it does not answer."""
        ...

    def extend(self, digest: bytes) -> PcrState:
        """Extend it, and return it. Raises as `read`; then it may have been extended or not."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class KeeperPcr:
    """Through the keeper that runs: a TPM may take one client at a time.

    Args:
        config: what the keeper must agree with.
        timeout_s: how long the keeper may take to answer, also if it has only just been started.
    """

    def __init__(self, config: Config, timeout_s: float) -> None:
        self._config = config
        self._timeout_s = timeout_s
        self._client = KeeperClient(config.run_dir, timeout_s=timeout_s)

    def read(self) -> PcrState:
        """See ServicesPcr. Raises ConflictError: it uses another TPM or PCR than this start is told to."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                state = self._client.services_pcr()
                break
            except ConflictError:
                # It has no PCR for them, as with another TPM: then it is that which is to be put right.
                check_platform(self._config.platform_tpm, self._client.status())
                raise
            except UnavailableError:
                if time.monotonic() >= deadline:
                    raise
                # It holds the lock and does not listen yet; its socket appears without an event.
                time.sleep(_POLL_S)
        if (state.bank, state.pcr) != (self._config.bank, self._config.services_pcr):
            raise ConflictError(
                f"the keeper that runs has the services in PCR {state.pcr} of {state.bank}, and this start is to use "
                f"PCR {self._config.services_pcr} of {self._config.bank}",
                next_step="Run `vtpm shutdown` first, or leave services_pcr and pcrs as they were",
            )
        return state

    def extend(self, digest: bytes) -> PcrState:
        """See ServicesPcr."""
        return self._client.measure_services(digest)

    def close(self) -> None:
        """See ServicesPcr."""
        self._client.close()


class DirectPcr:
    """Directly, while the caller holds the keeper's lock, so that no keeper starts meanwhile.

    Args:
        config: which TPM and PCR.
    Raises:
        PlatformTpmError: the TPM does not answer.
    """

    def __init__(self, config: Config) -> None:
        # What tpm2-tss would print on stderr is in the errors already.
        os.environ.setdefault("TSS2_LOG", "all+none")
        from vtpm.platform_tpm.platform_tpm import PlatformTpm

        self._selection = PcrSelection(PcrBank(config.bank), (config.services_pcr,))
        self._tpm = PlatformTpm(config.platform_tpm)

    def read(self) -> PcrState:
        """See ServicesPcr."""
        (index,) = self._selection.indexes
        values, reset_count = self._tpm.pcr_state(self._selection)
        return PcrState(str(self._selection.bank), index, values[index], reset_count)

    def extend(self, digest: bytes) -> PcrState:
        """See ServicesPcr."""
        self._tpm.extend(self._selection.indexes[0], self._selection.bank, digest)
        return self.read()

    def close(self) -> None:
        """See ServicesPcr."""
        self._tpm.close()


def keeper_lock(run_dir: Path) -> ServiceLock | None:
    """Return the lock of a keeper that does not run; None when one does."""
    try:
        return ServiceLock(run_dir, "keeper")
    except ConflictError:
        return None
