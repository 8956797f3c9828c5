"""PlatformTpm: the host's TPM as the keeper uses it. For the keeper alone.

The root key is sealed once, under a policy that an NV index approves (root_policy.py); the anchor stands in a second
one (anchor.py). What is sealed opens under the PCR sets that are allowed now; changing them seals nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tpm2_pytss import TPM2_CAP, TPM2_SE, TPMA_SESSION

from vtpm.errors import PlatformTpmError, UsageError
from vtpm.platform_tpm import attestation, fence, pcr_access, sealing
from vtpm.platform_tpm.anchor import Anchor, AnchorIndex, anchor_index
from vtpm.platform_tpm.attestation import Identity, SignedAttest
from vtpm.platform_tpm.connection import PT_MANUFACTURER, Connection
from vtpm.platform_tpm.pcrs import PCR_COUNT, PcrBank, PcrSelection
from vtpm.platform_tpm.root_policy import PcrSet, PcrSets, ZeroPcrs, checked, refuse_zeros, with_set, without_set
from vtpm.platform_tpm.sealed_blob import NO_INDEXES, Indexes, SealedBlob
from vtpm.platform_tpm.sealing import OpenedRoot
from vtpm.platform_tpm.write_authority import WriteAuthority
from vtpm.secret import Secret
from vtpm.tpm.attest import MAX_EXTRA_BYTES

DEFAULT_TIMEOUT_S = 20.0
"""For one exchange. Hardware makes an ECC primary key in well under a second; a TPM's longest command is RSA's."""
MAX_RANDOM_BYTES = 1024

# TPM_PT. Spec: TPM 2.0 Part 2 (revision 1.59), 6.13.
_PT_VENDOR_STRINGS = (0x106, 0x107, 0x108, 0x109)
_PT_FIRMWARE_VERSIONS = (0x10B, 0x10C)

Save = Callable[[SealedBlob], None]
"""Makes a blob durable in the place of the one before; called in the caller's thread, and free to raise."""


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

    Every exchange ends within the time limit. After one that did not, the connection is of no more use. A TPM that went
    away and is back is connected to anew at the next call. All methods that talk to it raise PlatformTpmError when it
    fails, goes away or does not answer.

    Args:
        tcti: any tpm2-tss TCTI configuration, such as "device:/dev/tpmrm0" or "swtpm:path=SOCKET".
        timeout_s: limit of connecting, and of each exchange.
    Raises:
        PlatformTpmError: it is absent, not a TPM, in failure mode, or does not answer.
    """

    def __init__(self, tcti: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.tcti = tcti
        self._connection = Connection(tcti, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; close an open anchor first."""
        self._connection.close()

    def info(self) -> TpmInfo:
        """Return what the TPM says of itself."""
        return self._connection.run("say what it is", self._info)

    def reset_count(self) -> int:
        """Return how often the TPM was reset in its life; one more than before means that its PCRs began anew."""

        def ask() -> int:
            with self._connection.storage_primary() as (srk, _):
                return self._connection.reset_count(srk)

        return self._connection.run("say how often it was reset", ask)

    def random(self, size_bytes: int) -> bytes:
        """Return random bytes of the TPM's, encrypted on the way.

        Args:
            size_bytes: 1 to MAX_RANDOM_BYTES.
        """
        if not 1 <= size_bytes <= MAX_RANDOM_BYTES:
            raise PlatformTpmError(f"{size_bytes} random bytes cannot be had at once; 1 to {MAX_RANDOM_BYTES} can")
        return self._connection.run("give random bytes", lambda: self._random(size_bytes))

    # PCRs.

    def pcr_values(self, selection: PcrSelection, blob: SealedBlob | None = None) -> dict[int, bytes]:
        """Return the present value of each PCR of a selection.

        Args:
            blob: sealed by the TPM that it is to be; with it nobody else can have made the answer, which is not
                authenticated otherwise.
        Raises:
            PlatformTpmError: the TPM lacks the bank or a PCR.
        """
        if blob is None:
            return self._connection.run("read PCRs", lambda: pcr_access.read_pcrs(self._connection, selection))
        return self._connection.run("read PCRs", lambda: self._audited_pcrs(selection, blob.srk_name))

    def pcr_state(self, selection: PcrSelection) -> tuple[dict[int, bytes], int]:
        """Return the present value of each PCR, and how often the TPM was reset in its life.

        Neither is authenticated: it is quick, and nothing secret may rest on it.

        Raises:
            PlatformTpmError: the TPM lacks the bank or a PCR.
        """
        connection = self._connection
        return connection.run(
            "read PCRs",
            lambda: (
                pcr_access.read_pcrs(connection, selection),
                int(connection.esapi.read_clock().clockInfo.resetCount),
            ),
        )

    def pcr_set(self, label: str, selection: PcrSelection) -> PcrSet:
        """Return the present values as a set that can be allowed.

        Raises:
            UsageError: the label is not of its form.
            PlatformTpmError: the TPM lacks the bank or a PCR.
        """
        return PcrSet.of(label, selection, self.pcr_values(selection))

    def extend(self, index: int, bank: PcrBank, digest: bytes) -> None:
        """Extend a PCR, in one bank; `pcrs.predict_pcr` says what it then holds.

        Args:
            index: 0 to 23.
            digest: of the bank's size.
        Raises:
            UsageError: another PCR or size.
        """
        if not 0 <= index < PCR_COUNT or len(digest) != bank.digest_bytes:
            raise UsageError(f"PCR {index} of bank {bank} cannot be extended with {len(digest)} bytes")
        self._connection.run(
            f"extend PCR {index}", lambda: pcr_access.extend_pcr(self._connection, index, bank, digest)
        )

    # The platform's identity.

    def identity(self) -> Identity:
        """Return the public areas of endorsement key and attestation key."""
        return self._connection.run("say who it is", lambda: attestation.identity(self._connection))

    def endorsement_certificate(self) -> bytes:
        """Return the manufacturer's certificate of the endorsement key, X.509 in DER; empty when the TPM has none.

        Nothing vouches for it but itself. What lies there and is larger than a certificate is taken for none.
        """
        return self._connection.run(
            "give its certificate", lambda: attestation.endorsement_certificate(self._connection)
        )

    def quote(self, selection: PcrSelection, extra: bytes) -> SignedAttest:
        """Return a quote over PCRs, signed by the attestation key.

        Args:
            extra: qualifying data, at most MAX_EXTRA_BYTES: a digest over all that must not be substituted.
        Raises:
            UsageError: too much of it.
            PlatformTpmError: the TPM lacks the bank or a PCR.
        """
        if len(extra) > MAX_EXTRA_BYTES:
            raise UsageError(f"{len(extra)} bytes of qualifying data do not go, at most {MAX_EXTRA_BYTES} do")
        return self._connection.run("quote PCRs", lambda: attestation.quote(self._connection, selection, extra))

    def activate(self, credential: bytes, encrypted_secret: bytes) -> Secret:
        """Return the secret of a credential that was made for this platform's two keys together.

        Args:
            credential, encrypted_secret: contents of TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET; untrusted.
        Raises:
            AttestationError: it was made for another platform or another key, or is malformed.
        """
        return self._connection.run(
            "activate a credential", lambda: attestation.activate(self._connection, credential, encrypted_secret)
        )

    # The root key.

    def find_indexes(self, root: Secret) -> Indexes:
        """Return the indexes of a root key that this TPM has, whatever their handles are.

        Raises:
            PlatformTpmError: it cannot be said, which is no sign that there are none.
        """
        return self._connection.run("look for NV indexes", lambda: sealing.find_indexes(self._connection, root))

    def seal_root(
        self,
        root: Secret,
        first: PcrSet,
        save: Save,
        *,
        kept: Indexes = NO_INDEXES,
        zero_pcrs: ZeroPcrs = ZeroPcrs.REFUSE,
        fence_pcr: int | None = None,
        services_pcr: int | None = None,
    ) -> SealedBlob:
        """Seal a root key, and make the policy index and the anchor index in the TPM.

        `save` is called before an index is made, so that a blob that was saved and never finished names what may be
        left in the TPM: `discard` removes it, where no index was kept. The blob opens when this returns.

        Args:
            root: the key.
            kept: indexes of this root key in the TPM, from `find_indexes`, to go on with: the anchor stays as it is,
                and what opened under the policy before opens no more.
            first: the only set of PCRs that is allowed at first, such as `pcr_set` returns.
            save: keeps the blob, not yet as the one that counts.
            zero_pcrs: whether PCRs that are all zero will do.
            fence_pcr: the PCR that `extend_fence` will extend, if so: exempt from the rule of zeros.
            services_pcr: the PCR that the services are measured into, if so: exempt too.
        Raises:
            PlatformTpmError: the set is all zero, there is no room in NV memory, the hierarchies have passwords.
            UsageError: the fence PCR is not in the set, or can be reset.
        """
        self._check_set(first, zero_pcrs, fence_pcr, services_pcr)
        connection = self._connection
        blob = connection.run("seal a key", lambda: sealing.seal(connection, root, first, kept))
        save(blob)
        connection.run("make NV indexes", lambda: sealing.make_indexes(connection, blob, root, kept))
        return blob

    def discard(self, blob: SealedBlob) -> None:
        """Undefine the indexes of a blob that is not in use; whatever else has their handles is left alone.

        The blob never opens again.
        """
        connection = self._connection
        connection.run("undefine NV indexes", lambda: sealing.undefine_indexes(connection, blob))

    def unseal_root(self, blob: SealedBlob) -> OpenedRoot:
        """Return the root key, and what it opened by.

        Args:
            blob: untrusted.
        Raises:
            PlatformTpmError: PCRs differ from every allowed set (the message names those that differ from the nearest
                one), the fence is closed, the TPM was cleared or is another one, the policy index is missing or was
                redefined. Each has words of its own.
            StateError: the blob is damaged, or older than the policy in the TPM.
        """
        return self._connection.run("open a sealed key", lambda: sealing.unseal(self._connection, blob))

    # The policy of the root key. It is changed with the root key at hand, whatever the PCRs are now.

    def allowed(self, blob: SealedBlob, root: Secret) -> PcrSets:
        """Return the sets of PCRs that may open the root key now, by what the TPM holds.

        Raises:
            PlatformTpmError: the policy index is missing or was redefined.
            StateError: the blob is older than the policy in the TPM, is damaged, or is not of this root key.
        """
        blob.verify(root)
        return self._connection.run("read the policy", lambda: sealing.current_list(self._connection, blob))

    def allow(
        self,
        blob: SealedBlob,
        root: Secret,
        more: PcrSet,
        save: Save,
        *,
        zero_pcrs: ZeroPcrs = ZeroPcrs.REFUSE,
        fence_pcr: int | None = None,
        services_pcr: int | None = None,
    ) -> SealedBlob:
        """Let one more set of PCRs open the root key.

        Args:
            blob: the one in use.
            root: the root key of it.
            more: the set; see `seal_root` for zero_pcrs, fence_pcr and services_pcr.
            save: makes a blob durable in the place of `blob`. Called twice: before the TPM is written with a blob that
                opens under the old policy and the new, and after it with the one returned.
        Returns:
            the blob in use from now on.
        Raises:
            ConflictError: label or values are allowed already, or there are root_policy.MAX_SETS.
            PlatformTpmError: the set is all zero, or as `allowed`.
            StateError: as `allowed`.
        """
        self._check_set(more, zero_pcrs, fence_pcr, services_pcr)
        return self._change(blob, root, lambda sets: with_set(sets, more), save)

    def drop(self, blob: SealedBlob, root: Secret, label: str, save: Save) -> SealedBlob:
        """Let a set of PCRs open the root key no more; see `allow`.

        Raises:
            NotFoundError: there is none of this label.
            ConflictError: it is the last.
        """
        return self._change(blob, root, lambda sets: without_set(sets, label), save)

    def replace(
        self,
        blob: SealedBlob,
        root: Secret,
        sets: PcrSets,
        save: Save,
        *,
        zero_pcrs: ZeroPcrs = ZeroPcrs.REFUSE,
        fence_pcr: int | None = None,
        services_pcr: int | None = None,
    ) -> SealedBlob:
        """Let these sets of PCRs open the root key and no others; see `allow`."""
        for one in sets:
            self._check_set(one, zero_pcrs, fence_pcr, services_pcr)
        return self._change(blob, root, lambda _: checked(sets), save)

    def extend_fence(self, blob: SealedBlob, root: Secret, index: int) -> None:
        """Extend the fence, so that the root key opens no more until the TPM is reset.

        Args:
            index: a PCR from 0 to 15 that each allowed set has.
        Raises:
            UsageError: it can be reset while the platform runs, or an allowed set lacks it.
            PlatformTpmError: as `allowed`.
        """
        fence.check_fence_pcr(index)
        sets = self.allowed(blob, root)
        fence.check_fence_covers(index, sets)
        for bank in sorted({one.selection.bank for one in sets}):
            self._connection.run(
                "extend the fence",
                lambda bank=bank: self._extend_fence(blob, index, bank),  # type: ignore[misc]
            )

    # The anchor.

    def open_anchor(
        self, blob: SealedBlob, root: Secret, known: tuple[Anchor, ...] = (), *, shared: bool = True
    ) -> AnchorIndex:
        """Open the anchor index, for as long as this connection; one at a time.

        Args:
            known: what it can hold by what an earlier connection saw; see AnchorIndex.
            shared: whether others of this platform reach the TPM; see AnchorIndex.
        Raises:
            PlatformTpmError: it is missing, was redefined, went back or was moved by others, or the TPM is another.
            StateError: the blob is damaged, or is not of this root key.
        """
        blob.verify(root)
        authority = WriteAuthority(root)
        index = anchor_index(blob.anchor_index.handle, authority)
        return AnchorIndex(self._connection, index, authority, blob.srk_name, known, shared=shared)

    def _check_set(self, one: PcrSet, zero_pcrs: ZeroPcrs, fence_pcr: int | None, services_pcr: int | None) -> None:
        refuse_zeros(one, zero_pcrs, fence_pcr, services_pcr)
        if fence_pcr is not None:
            fence.check_fence_covers(fence.check_fence_pcr(fence_pcr), (one,))

    def _change(self, blob: SealedBlob, root: Secret, change: Callable[[PcrSets], PcrSets], save: Save) -> SealedBlob:
        connection = self._connection
        before = self.allowed(blob, root)
        after = change(before)
        if after != before:
            save(blob.with_lists(root, before, after))
            connection.run("write the policy", lambda: sealing.write_list(connection, blob, root, after))
        settled = blob.with_lists(root, after)
        save(settled)
        return settled

    # What follows runs in the connection's thread.

    def _extend_fence(self, blob: SealedBlob, index: int, bank: PcrBank) -> None:
        pcr_access.extend_pcr(self._connection, index, bank, fence.fence_digest(bank), blob.srk_name)

    def _audited_pcrs(self, selection: PcrSelection, srk_name: bytes) -> dict[int, bytes]:
        with (
            self._connection.storage_primary(srk_name) as (srk, _),
            self._connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION.AUDIT) as session,
        ):
            return pcr_access.read_pcrs(self._connection, selection, session)

    def _random(self, size_bytes: int) -> bytes:
        found = b""
        with (
            self._connection.storage_primary() as (srk, _),
            self._connection.session(srk, TPM2_SE.HMAC, TPMA_SESSION.ENCRYPT) as session,
        ):
            while len(found) < size_bytes:
                found += bytes(self._connection.esapi.get_random(size_bytes - len(found), session1=session))
        return found

    def _info(self) -> TpmInfo:
        read = self._connection.property
        versions = [read(name) for name in _PT_FIRMWARE_VERSIONS]
        _, capability = self._connection.esapi.get_capability(TPM2_CAP.PCRS, 0, 1)
        return TpmInfo(
            manufacturer=_text(read(PT_MANUFACTURER)),
            vendor="".join(_text(read(name)) for name in _PT_VENDOR_STRINGS).strip(),
            firmware=".".join(str(half) for version in versions for half in (version >> 16, version & 0xFFFF)),
            banks=tuple(_bank_name(pcrs) for pcrs in capability.data.assignedPCR if any(bytes(pcrs.pcrSelect))),
        )


def _text(value: int) -> str:
    """Return four characters that a TPM packs into a property; anything unprintable is left out."""
    return "".join(chr(byte) for byte in value.to_bytes(4, "big") if 0x20 <= byte < 0x7F).strip()


def _bank_name(pcrs: Any) -> str:
    known = {bank.algorithm_id: bank.value for bank in PcrBank} | {0x0004: "sha1", 0x000D: "sha512", 0x0012: "sm3"}
    return known.get(int(pcrs.hash), f"0x{int(pcrs.hash):04x}")
