"""What the manager may ask of the keeper, as data, and a typed client. For keeper, manager and tests."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from vtpm.errors import ProtocolError
from vtpm.tpm.types import VtpmId
from vtpm.wire.packet_socket import PacketClient
from vtpm.wire.service import Interface, MaxLength, Operation

KEEPER_SOCKET = "keeper.sock"
"""Name of the keeper's socket in the run directory."""

VTPM_KEY_BYTES = 32
MAX_WRAPPED_BYTES = 512


class PlatformKind(enum.StrEnum):
    """What stands for the host's TPM."""

    EMBEDDED = "embedded"
    HARDWARE = "hardware"


class Protection(enum.StrEnum):
    """What keeps the root key from somebody who holds the disk."""

    UNPROTECTED = "unprotected"
    """The embedded TPM keeps its own state beside the root file: whoever reads both has the key."""
    SEALED = "sealed"


@dataclass(frozen=True)
class NoArgs:
    """An operation without arguments."""


@dataclass(frozen=True)
class KeeperStatus:
    """What `vtpm status` says of the platform TPM.

    Args:
        tcti: configuration string of the tpm2-tss transmission interface.
        manufacturer: as the TPM names it, with its firmware's version.
        pcr_selection: PCRs that the root key is sealed under, such as "sha256:0,2,4,7".
        reachable: whether the TPM answers now; keys are unwrapped without it.
    """

    kind: PlatformKind
    tcti: str
    manufacturer: str
    pcr_selection: str
    protection: Protection
    reachable: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class NewKeyArgs:
    """Whose key to make."""

    vtpm_id: VtpmId


@dataclass(frozen=True)
class NewKey:
    """A vTPM's new key, and the form in which alone it may be stored."""

    wrapped: Annotated[bytes, MaxLength(MAX_WRAPPED_BYTES)]
    key: Annotated[bytes, MaxLength(VTPM_KEY_BYTES)] = field(repr=False)

    def __post_init__(self) -> None:
        _check_key(self.key)


@dataclass(frozen=True)
class UnwrapKeyArgs:
    """Whose key to unwrap, and what new_key gave to store."""

    vtpm_id: VtpmId
    wrapped: Annotated[bytes, MaxLength(MAX_WRAPPED_BYTES)]


@dataclass(frozen=True)
class Key:
    """A vTPM's key."""

    key: Annotated[bytes, MaxLength(VTPM_KEY_BYTES)] = field(repr=False)

    def __post_init__(self) -> None:
        _check_key(self.key)


def _check_key(key: bytes) -> None:
    if len(key) != VTPM_KEY_BYTES:
        raise ProtocolError(f"a vTPM's key has {VTPM_KEY_BYTES} bytes, this one has {len(key)}")


OPERATIONS: Mapping[str, Operation] = {
    "status": Operation(args=NoArgs, result=KeeperStatus),
    "new_key": Operation(args=NewKeyArgs, result=NewKey),
    "unwrap_key": Operation(args=UnwrapKeyArgs, result=Key),
    "end": Operation(args=NoArgs, result=NoArgs),
}
EVENTS: Mapping[str, type] = {}
KEEPER = Interface("vtpm-keeper", OPERATIONS, EVENTS)


class KeeperClient:
    """Asks the keeper; connects when first asked, and again after a break.

    Args:
        run_dir: the services' run directory.
        timeout_s: limit of one call.
    """

    def __init__(self, run_dir: Path, timeout_s: float = 10.0) -> None:
        self._client = PacketClient(KEEPER, run_dir / KEEPER_SOCKET)
        self._timeout_s = timeout_s

    def status(self) -> KeeperStatus:
        """Return what protects the root key.

        Raises:
            UnavailableError: the keeper does not answer.
        """
        status: KeeperStatus = self._call("status", NoArgs())
        return status

    def new_key(self, vtpm_id: VtpmId) -> NewKey:
        """Make a key for a vTPM; the keeper stores nothing.

        Raises:
            UnavailableError: the keeper does not answer.
        """
        made: NewKey = self._call("new_key", NewKeyArgs(vtpm_id))
        return made

    def unwrap_key(self, vtpm_id: VtpmId, wrapped: bytes) -> Key:
        """Return the key that new_key made for this vTPM.

        Raises:
            StateError: wrapped for another vTPM, by another root key, or damaged.
            UnavailableError: the keeper does not answer.
        """
        key: Key = self._call("unwrap_key", UnwrapKeyArgs(vtpm_id, wrapped))
        return key

    def end(self) -> None:
        """Have the keeper end, and its embedded TPM if it has one.

        Raises:
            UnavailableError: the keeper does not answer.
        """
        self._call("end", NoArgs())

    def close(self) -> None:
        """Close the connection; the next call makes another."""
        self._client.close()

    def _call(self, op: str, args: object) -> Any:
        result, _ = self._client.call(op, args, timeout_s=self._timeout_s)
        return result
