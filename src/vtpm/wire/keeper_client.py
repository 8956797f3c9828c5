"""Asks the keeper, with a type for each call. For manager, starter and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtpm.tpm.types import VtpmId
from vtpm.wire.keeper import (
    KEEPER,
    KEEPER_SOCKET,
    ActivatedSecret,
    AnchorState,
    Credential,
    KeeperStatus,
    Key,
    LaunchArgs,
    LaunchState,
    NewKey,
    NewKeyArgs,
    NoArgs,
    PcrDigest,
    PcrState,
    PlatformIdentity,
    PolicyLabel,
    PolicySet,
    PolicyState,
    QuoteArgs,
    QuotedPcrs,
    Recovered,
    RecoveryText,
    UnwrapKeyArgs,
)
from vtpm.wire.packet_socket import PacketClient


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

    def anchor_key(self) -> bytes:
        """Return the key that root records of the vault are authenticated with, VTPM_KEY_BYTES bytes.

        Raises:
            PlatformTpmError: the root key is not open.
            UnavailableError: the keeper does not answer.
        """
        key: Key = self._call("anchor_key", NoArgs())
        return key.key

    def channel_key(self) -> bytes:
        """Return the key for the private key of this host's channel to its peers, VTPM_KEY_BYTES bytes.

        Raises:
            PlatformTpmError: the root key is not open.
            UnavailableError: the keeper does not answer.
        """
        key: Key = self._call("channel_key", NoArgs())
        return key.key

    def read_anchor(self) -> AnchorState:
        """Return the anchor in the platform TPM.

        Raises:
            PlatformTpmError: the TPM does not answer, or its index is not the one that was made.
            UnavailableError: the keeper does not answer.
        """
        state: AnchorState = self._call("read_anchor", NoArgs())
        return state

    def write_anchor(self, state: AnchorState) -> None:
        """Move the anchor; when this returns, it is in the platform TPM.

        Raises:
            ConflictError: the anchor there has this version already, or a later one.
            PlatformTpmError, UnavailableError: as read_anchor.
        """
        self._call("write_anchor", state)

    def policy(self) -> PolicyState:
        """Return the PCR values under which the root key opens, and those of now."""
        state: PolicyState = self._call("policy", NoArgs())
        return state

    def policy_allow(self, label: str, values: tuple[str, ...]) -> PolicyState:
        """Have the root key open under these PCR values too.

        Raises:
            UsageError: values that are not of the selection's form.
            ConflictError: the label is taken, or there are MAX_POLICY_SETS.
        """
        state: PolicyState = self._call("policy_allow", PolicySet(label, values))
        return state

    def policy_drop(self, label: str) -> PolicyState:
        """Have the root key open under these PCR values no more.

        Raises:
            NotFoundError: there is no such set.
            ConflictError: it is the last one.
        """
        state: PolicyState = self._call("policy_drop", PolicyLabel(label))
        return state

    def services_pcr(self) -> PcrState:
        """Return the PCR that the services are measured into, as it is now.

        Raises:
            ConflictError: this keeper was started with no such PCR.
            PlatformTpmError: the platform TPM does not answer.
            UnavailableError: the keeper does not answer.
        """
        state: PcrState = self._call("services_pcr", NoArgs())
        return state

    def measure_services(self, digest: bytes) -> PcrState:
        """Extend the PCR that the services are measured into; for root and the keeper's own user.

        Raises:
            AccessDeniedError: another user asks, the manager's too.
            UsageError: the digest is not of the bank's size.
            ConflictError, PlatformTpmError, UnavailableError: as services_pcr.
        """
        state: PcrState = self._call("measure_services", PcrDigest(digest))
        return state

    def measure_launch(self, kind: str, measurement: str) -> None:
        """Have what is about to be launched in the PCR for launches; it is extended once in a boot.

        Raises:
            ConflictError: this keeper was started with no such PCR, or it must not be extended.
            PlatformTpmError: the platform TPM does not answer.
            StoreError: the log cannot be written.
            UnavailableError: the keeper does not answer.
        """
        self._call("measure_launch", LaunchArgs(kind, measurement))

    def launches(self) -> LaunchState:
        """Return the log of launches of this boot, held against its PCR. Raises as measure_launch."""
        state: LaunchState = self._call("launches", NoArgs())
        return state

    def identity(self) -> PlatformIdentity:
        """Return the keys that the platform is known by.

        Raises:
            PlatformTpmError: the platform TPM does not answer, or the root key is not open.
            UnavailableError: the keeper does not answer.
        """
        known: PlatformIdentity = self._call("identity", NoArgs())
        return known

    def quote(self, extra: bytes, bank: str, pcrs: tuple[int, ...]) -> QuotedPcrs:
        """Return a quote by the attestation key, and what it is over.

        Args:
            extra: qualifying data, EXTRA_BYTES bytes.
            pcrs: indexes, ascending.
        Raises:
            UsageError: no such bank, or no PCRs that can be selected.
            ConflictError: launches are not measured.
            PlatformTpmError, UnavailableError: as identity.
        """
        quoted: QuotedPcrs = self._call("quote", QuoteArgs(extra, bank, pcrs))
        return quoted

    def activate(self, credential: bytes, encrypted_secret: bytes) -> bytes:
        """Return the secret of a credential that was made for this platform's two keys together.

        Raises:
            AttestationError: it was made for another platform or another key, or is malformed.
            PlatformTpmError, UnavailableError: as identity.
        """
        activated: ActivatedSecret = self._call("activate", Credential(credential, encrypted_secret))
        return activated.secret

    def new_recovery_key(self) -> str:
        """Make a recovery key, escrow the root key to it, and return its text. One made before opens it too, until this
        one is confirmed.
        """
        made: RecoveryText = self._call("new_recovery_key", NoArgs())
        return made.text

    def confirm_recovery_key(self, public_key: str) -> None:
        """Say that somebody has the recovery key that was made last, so that one made before counts no more.

        Args:
            public_key: text of its public half.
        Raises:
            NotFoundError: it is not the one that was made last.
        """
        self._call("confirm_recovery_key", RecoveryText(public_key))

    def recovery_public_key(self) -> str:
        """Return the text of the recovery key's public half; empty when none was made, or none is kept.

        Raises:
            StateError: what is kept was not written by this keeper.
        """
        kept: RecoveryText = self._call("recovery_public_key", NoArgs())
        return kept.text

    def recovery_noted(self) -> None:
        """Say that the audit log has the recovery that status() tells of. Raises StoreError: it may tell again."""
        self._call("recovery_noted", NoArgs())

    def recover(self, recovery_key: str) -> bool:
        """Open the root key by the recovery key, and seal it to the platform TPM as it is now; again is harmless.

        Returns:
            Whether the anchor is still the one that was.
        Raises:
            StateError: there is no escrow, or it is another key's.
            PlatformTpmError: the TPM refuses to seal.
        """
        recovered: Recovered = self._call("recover", RecoveryText(recovery_key))
        return recovered.anchor_kept

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
