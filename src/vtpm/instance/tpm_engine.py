"""What the TPM thread needs of whatever carries its TPM out: libtpms in this process, or a program beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from vtpm.engine.engine import BufferSize, Origin, Served, Store
from vtpm.tpm.types import Locality, StateKind, TpmVersion


class TpmEngine(Protocol):
    """See Engine, whose methods say what each of these does and raises."""

    library_version: tuple[int, int, int]
    """Of the libtpms that reads and writes the state."""
    stays: str
    """Why this TPM cannot go to another host while it runs; empty: it can."""

    @property
    def powered(self) -> bool:
        """Whether a TPM runs."""
        ...

    @property
    def store_error(self) -> BaseException | None:
        """What the store raised since the last `power_on`; if not None, the TPM has failed."""
        ...

    def power_on(self, state: Mapping[StateKind, bytes], *, origin: Origin) -> None:
        """See Engine."""
        ...

    def power_off(self) -> None:
        """See Engine."""
        ...

    def process(self, command: bytes | memoryview, locality: Locality = ...) -> bytes:
        """See Engine."""
        ...

    @property
    def serve(self) -> Callable[[int, int], Served] | None:
        """See Engine; None where it cannot, and each command is to be taken from the link and given to `process`."""
        ...

    def set_default_locality(self, locality: Locality) -> None:
        """See Engine."""
        ...

    def cancel(self) -> None:
        """See Engine."""
        ...

    def set_buffer_size(self, wanted: int) -> BufferSize:
        """See Engine."""
        ...

    def get_state(self, kind: StateKind) -> bytes:
        """See Engine."""
        ...

    def established(self) -> bool:
        """See Engine."""
        ...

    def reset_established(self, locality: Locality) -> int:
        """See Engine."""
        ...

    def hash_start(self) -> int:
        """See Engine."""
        ...

    def hash_data(self, data: bytes | memoryview) -> int:
        """See Engine."""
        ...

    def hash_end(self) -> int:
        """See Engine."""
        ...

    def info(self) -> str:
        """See Engine."""
        ...


MakeEngine = Callable[[TpmVersion, Store], TpmEngine]
"""Makes the engine of one instance; raises VtpmError if it cannot."""
