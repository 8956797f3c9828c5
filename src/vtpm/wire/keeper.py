"""What the manager may ask of the keeper, as data. For keeper, manager and tests; keeper_client asks it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from vtpm.errors import ConflictError, ProtocolError
from vtpm.tpm.types import VtpmId
from vtpm.wire.service import Interface, MaxLength, Operation

KEEPER_SOCKET = "keeper.sock"
"""Name of the keeper's socket in the run directory."""

VTPM_KEY_BYTES = 32
MAX_WRAPPED_BYTES = 512
DIGEST_BYTES = 32
MAX_POLICY_SETS = 8
MAX_PCRS = 24
MAX_PCR_BYTES = 64
MAX_LABEL_CHARS = 64
MAX_RECOVERY_TEXT_CHARS = 256
MAX_LAUNCHES = 256
"""Of one log; as vtpm.tpm.launch_log.MAX_ENTRIES."""
MAX_KIND_CHARS = 16
MAX_MEASUREMENT_CHARS = 64
EXTRA_BYTES = 32
"""Of a quote's qualifying data: a digest over all that must not be substituted."""
MAX_PUBLIC_BYTES = 512
MAX_ATTEST_BYTES = 2048
MAX_EK_CERTIFICATE_BYTES = 4096
MAX_CREDENTIAL_BYTES = 512
MAX_SECRET_BYTES = 64
MAX_LAUNCH_LOG_BYTES = 44_000
"""MAX_LAUNCHES entries of the longest kind in the larger bank; in base64 a packet holds it beside a quote."""


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
        locked: why the root key is not open, empty when it is; until then only `status` and `recover` work.
        locked_next_step: what to do about it.
        recovery: fingerprint of the recovery key that the root key is escrowed to, empty when there is none.
        recovery_unnoted: fingerprint of a recovery key that was used and is in no audit log yet; empty: there is none.
        anchor_writes: how often this keeper has written the anchor.
        resets: how often the platform TPM lost its sessions under this keeper: it was reset, or started again.
    """

    kind: PlatformKind
    tcti: str
    manufacturer: str
    pcr_selection: str
    protection: Protection
    reachable: bool
    locked: str
    locked_next_step: str
    recovery: str
    recovery_unnoted: str
    anchor_writes: int
    resets: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class AnchorState:
    """The value in the platform TPM that says which content of the vault is current."""

    version: int
    digest: Annotated[bytes, MaxLength(DIGEST_BYTES)]

    def __post_init__(self) -> None:
        if len(self.digest) != DIGEST_BYTES:
            raise ProtocolError(f"an anchor's digest has {DIGEST_BYTES} bytes, this one has {len(self.digest)}")


@dataclass(frozen=True)
class PcrState:
    """The PCR that the services are measured into.

    Args:
        bank, pcr: which it is.
        value: what it holds now.
        reset_count: the TPM's; one more than before means that the PCR began anew.
    """

    bank: Annotated[str, MaxLength(16)]
    pcr: int
    value: Annotated[bytes, MaxLength(MAX_PCR_BYTES)]
    reset_count: int


@dataclass(frozen=True)
class PcrDigest:
    """What a PCR is extended with; of its bank's size."""

    digest: Annotated[bytes, MaxLength(MAX_PCR_BYTES)]


@dataclass(frozen=True)
class LaunchArgs:
    """What is about to be launched: kind of domain, and SHA-256 in hex over all that it runs."""

    kind: Annotated[str, MaxLength(MAX_KIND_CHARS)]
    measurement: Annotated[str, MaxLength(MAX_MEASUREMENT_CHARS)]


@dataclass(frozen=True)
class LaunchEntry:
    """One entry of the log of launches.

    Args:
        kind, measurement: of a launch; empty for a gap.
        held: for a gap, what the PCR was found to hold (hex), because something else had extended it.
    """

    kind: Annotated[str, MaxLength(MAX_KIND_CHARS)]
    measurement: Annotated[str, MaxLength(MAX_MEASUREMENT_CHARS)]
    held: Annotated[str, MaxLength(2 * MAX_PCR_BYTES)]


@dataclass(frozen=True)
class LaunchState:
    """What was launched in this boot, by the log, and what the PCR says of that.

    Args:
        bank, pcr: where launches are measured to.
        value: what the PCR holds, in hex.
        start: what it held before the log began; empty when there is no log.
        replays: whether the log, from `start` on, leads to `value`.
        doubt: in words, what the log does not account for; empty when it accounts for all.
        log: path of the log.
    """

    bank: Annotated[str, MaxLength(16)]
    pcr: int
    value: Annotated[str, MaxLength(2 * MAX_PCR_BYTES)]
    start: Annotated[str, MaxLength(2 * MAX_PCR_BYTES)]
    entries: Annotated[tuple[LaunchEntry, ...], MaxLength(MAX_LAUNCHES)]
    replays: bool
    doubt: Annotated[str, MaxLength(512)]
    log: Annotated[str, MaxLength(4096)]


@dataclass(frozen=True)
class PolicySet:
    """PCR values under which the root key opens.

    Args:
        label: what they stand for, unique.
        values: hex, one for each PCR of the selection, in its order.
        matches: whether these are the values now (not read in a request).
    """

    label: Annotated[str, MaxLength(MAX_LABEL_CHARS)]
    values: Annotated[tuple[str, ...], MaxLength(MAX_PCRS)]
    matches: bool = False


@dataclass(frozen=True)
class PolicyState:
    """What the root key opens under, and what the PCRs hold now (hex, in the selection's order)."""

    selection: str
    sets: Annotated[tuple[PolicySet, ...], MaxLength(MAX_POLICY_SETS)]
    current: Annotated[tuple[str, ...], MaxLength(MAX_PCRS)]


@dataclass(frozen=True)
class PolicyLabel:
    """Which set."""

    label: Annotated[str, MaxLength(MAX_LABEL_CHARS)]


@dataclass(frozen=True)
class RecoveryText:
    """A recovery key as it is written down, or its public half; the former is given out once and kept nowhere."""

    text: Annotated[str, MaxLength(MAX_RECOVERY_TEXT_CHARS)] = field(repr=False)


@dataclass(frozen=True)
class Recovered:
    """Whether the anchor is still the one that was; if not, the store's freshness rests on the operator's word."""

    anchor_kept: bool


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


@dataclass(frozen=True)
class PlatformIdentity:
    """The keys that the platform is known by.

    Args:
        endorsement, attestation: public areas, TPMT_PUBLIC.
        certificate: of the endorsement key, as the manufacturer has put it into NV memory; empty when there is none.
    """

    endorsement: Annotated[bytes, MaxLength(MAX_PUBLIC_BYTES)]
    attestation: Annotated[bytes, MaxLength(MAX_PUBLIC_BYTES)]
    certificate: Annotated[bytes, MaxLength(MAX_EK_CERTIFICATE_BYTES)]


@dataclass(frozen=True)
class QuoteArgs:
    """What to quote.

    Args:
        extra: qualifying data.
        bank: of the PCRs.
        pcrs: indexes, ascending.
    """

    extra: Annotated[bytes, MaxLength(EXTRA_BYTES)]
    bank: Annotated[str, MaxLength(16)]
    pcrs: Annotated[tuple[int, ...], MaxLength(MAX_PCRS)]

    def __post_init__(self) -> None:
        if len(self.extra) != EXTRA_BYTES:
            raise ProtocolError(f"a quote's qualifying data has {EXTRA_BYTES} bytes, this has {len(self.extra)}")


@dataclass(frozen=True)
class QuotedPcrs:
    """A quote, and what it is over.

    Args:
        attest, signature: TPMS_ATTEST and TPMT_SIGNATURE.
        values: of the PCRs, in the order in which they were asked for; the quote's digest is over these.
        launch_log: as `tpm.launch_log` encodes it; it accounts for what the launches' PCR held.
    """

    attest: Annotated[bytes, MaxLength(MAX_ATTEST_BYTES)]
    signature: Annotated[bytes, MaxLength(MAX_PUBLIC_BYTES)]
    values: Annotated[tuple[Annotated[bytes, MaxLength(MAX_PCR_BYTES)], ...], MaxLength(MAX_PCRS)]
    launch_log: Annotated[bytes, MaxLength(MAX_LAUNCH_LOG_BYTES)]


@dataclass(frozen=True)
class Credential:
    """Contents of a TPM2B_ID_OBJECT and a TPM2B_ENCRYPTED_SECRET."""

    credential: Annotated[bytes, MaxLength(MAX_CREDENTIAL_BYTES)]
    encrypted_secret: Annotated[bytes, MaxLength(MAX_CREDENTIAL_BYTES)]


@dataclass(frozen=True)
class ActivatedSecret:
    """What a credential held."""

    secret: Annotated[bytes, MaxLength(MAX_SECRET_BYTES)] = field(repr=False)


def _check_key(key: bytes) -> None:
    if len(key) != VTPM_KEY_BYTES:
        raise ProtocolError(f"a vTPM's key has {VTPM_KEY_BYTES} bytes, this one has {len(key)}")


OPERATIONS: Mapping[str, Operation] = {
    "status": Operation(args=NoArgs, result=KeeperStatus),
    "new_key": Operation(args=NewKeyArgs, result=NewKey),
    "unwrap_key": Operation(args=UnwrapKeyArgs, result=Key),
    "anchor_key": Operation(args=NoArgs, result=Key),
    "channel_key": Operation(args=NoArgs, result=Key),
    "read_anchor": Operation(args=NoArgs, result=AnchorState),
    "write_anchor": Operation(args=AnchorState, result=NoArgs),
    "policy": Operation(args=NoArgs, result=PolicyState),
    "policy_allow": Operation(args=PolicySet, result=PolicyState),
    "policy_drop": Operation(args=PolicyLabel, result=PolicyState),
    "services_pcr": Operation(args=NoArgs, result=PcrState),
    "measure_services": Operation(args=PcrDigest, result=PcrState),
    "measure_launch": Operation(args=LaunchArgs, result=NoArgs),
    "launches": Operation(args=NoArgs, result=LaunchState),
    "identity": Operation(args=NoArgs, result=PlatformIdentity),
    "quote": Operation(args=QuoteArgs, result=QuotedPcrs),
    "activate": Operation(args=Credential, result=ActivatedSecret),
    "new_recovery_key": Operation(args=NoArgs, result=RecoveryText),
    "confirm_recovery_key": Operation(args=RecoveryText, result=NoArgs),
    "recovery_public_key": Operation(args=NoArgs, result=RecoveryText),
    "recover": Operation(args=RecoveryText, result=Recovered),
    "recovery_noted": Operation(args=NoArgs, result=NoArgs),
    "end": Operation(args=NoArgs, result=NoArgs),
}
EVENTS: Mapping[str, type] = {}
KEEPER = Interface("vtpm-keeper", OPERATIONS, EVENTS)


def check_platform(asked: str, keeper: KeeperStatus) -> None:
    """Refuse a keeper that was started with another platform TPM than this host is told to use.

    Args:
        asked: "embedded", or a tpm2-tss TCTI.
    Raises:
        ConflictError: it was.
    """
    used = "embedded" if keeper.kind is PlatformKind.EMBEDDED else keeper.tcti
    if asked != used:
        raise ConflictError(
            f"the keeper runs with the platform TPM {used!r}, and this manager is to use {asked!r}",
            next_step="Run `vtpm shutdown` first, or start the manager with the platform TPM that is in use",
        )
