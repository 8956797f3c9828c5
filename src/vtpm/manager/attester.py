"""This host's side of attestation: its own evidence, and what it makes of a peer's. The manager's alone; blocking.

The platform policy is one file with two uses: what a peer has to be, and which PCRs are quoted. A peer's policy has to
name the same PCRs, for a quote is over exactly those that its verifier wants. Policy and authorities are read anew at
each use: what an operator changes holds from the next message on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from vtpm.errors import AttestationError, ConflictError
from vtpm.manager.enrolled import ENROLL, Enrolled, kept
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind
from vtpm.migration.evidence_file import EvidenceFile
from vtpm.migration.pem_folder import read_certificates
from vtpm.migration.policy import FOR_PCRS, PlatformPolicy, print_policy, read_policy
from vtpm.migration.verifier import verify_evidence
from vtpm.tpm.attest import read_quote, read_signing_key, verify_signature
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.wire.evidence import Evidence, decode_evidence, encode_evidence
from vtpm.wire.keeper import EXTRA_BYTES, QuotedPcrs
from vtpm.wire.keeper_client import KeeperClient

AUTHORITIES = "enrolment authorities"


class PlatformAttester:
    """See the module, and migration.guards.Attester.

    Args:
        keeper: quotes.
        folder: has this platform's certificate; see `enrolled`.
        services: measurements of this boot's services, in order of extension. Raises VtpmError: they are not known.
        policy: file of the platform policy.
        authorities: folder of certificates, PEM.
    """

    def __init__(
        self,
        keeper: KeeperClient,
        folder: Path,
        services: Callable[[], tuple[bytes, ...]],
        policy: Path,
        authorities: Path,
    ) -> None:
        self._keeper = keeper
        self._folder = folder
        self._services = services
        self._policy = policy
        self._authorities = authorities

    def evidence(self, extra: bytes) -> bytes:
        """Return this platform's evidence over qualifying data, encoded.

        Args:
            extra: EXTRA_BYTES bytes.
        Raises:
            NotFoundError: there is no policy, or this platform is not enrolled.
            UsageError: the policy is not of its form.
            StateError: the certificate that is kept is damaged, or what the services are is not known.
            ConflictError: the platform TPM is another than was enrolled.
            PlatformTpmError, UnavailableError: as KeeperClient.quote.
        """
        policy = read_policy(self._policy)
        enrolled = kept(self._folder)
        services = self._services()
        quoted = self._quote(enrolled, extra, policy.bank, policy.quoted)
        return encode_evidence(
            Evidence(
                attestation_key=enrolled.attestation_key,
                certificate=enrolled.certificate,
                attest=quoted.attest,
                signature=quoted.signature,
                bank=policy.bank,
                pcrs=dict(zip(policy.quoted, quoted.values, strict=True)),
                services=services,
                launch_log=quoted.launch_log,
            )
        )

    def verify(self, evidence: bytes, extra: bytes) -> CertifiedPlatform:
        """Return whose evidence this is, if it is over this qualifying data and policy takes it.

        Raises:
            ProtocolError: it is no evidence.
            AttestationError: a check failed; the message says which.
            NotFoundError, UsageError: policy or authorities cannot be read.
        """
        policy = read_policy(self._policy)
        authorities = read_certificates(self._authorities, AUTHORITIES)
        return verify_evidence(decode_evidence(evidence), extra, policy, authorities, datetime.now(UTC))

    def fresh(self) -> EvidenceFile:
        """Return this platform's evidence over a nonce of its own, for an operator to look at. Raises as `evidence`."""
        nonce = os.urandom(EXTRA_BYTES)
        return EvidenceFile(nonce, self.evidence(nonce))

    def own_policy(self, images: Iterable[tuple[str, str]]) -> str:
        """Return the file of a policy that this platform passes as it is now.

        The PCRs of the boot are those that the root key is sealed under, as the attestation key signs them.

        Args:
            images: kind and measurement of what may run vTPMs besides what was launched in this boot.
        Raises:
            ConflictError: nothing was measured that tells one boot from another, or the services are not measured.
            ConflictError, NotFoundError, StateError, PlatformTpmError, UnavailableError: as `evidence`.
        """
        enrolled = kept(self._folder)
        launches = self._keeper.launches()
        bank_name, _, numbers = self._keeper.policy().selection.partition(":")
        bank, services_pcr = HashAlgorithm(bank_name), self._services_pcr(launches.pcr)
        # What is extended when a host boots, and not afterwards.
        indexes = [int(number) for number in numbers.split(",") if int(number) not in (services_pcr, launches.pcr)]
        boot = self._boot(enrolled, bank, tuple(index for index in indexes if index in FOR_PCRS))
        embedded = enrolled.shown().kind == PlatformKind.EMBEDDED.value
        if not boot and not embedded:
            raise ConflictError(
                f"nothing was measured into PCRs {numbers} of {bank}: no policy tells one boot from another",
                next_step="Enable measured boot in the firmware",
            )
        services = self._services()
        if not services and not embedded:
            raise ConflictError(
                "the services of this host are not measured: no policy takes such a platform",
                next_step="Leave services_pcr at 13, run `vtpm shutdown`, and start vtpm-managerd again",
            )
        kinds: dict[str, set[str]] = {}
        for kind, measurement in [*images, *((one.kind, one.measurement) for one in launches.entries if one.kind)]:
            kinds.setdefault(kind, set()).add(measurement)
        policy = PlatformPolicy(
            bank=bank,
            embedded=embedded,
            pcrs=boot,
            services_pcr=services_pcr,
            services=frozenset(services),
            images_pcr=launches.pcr,
            images={kind: frozenset(found) for kind, found in kinds.items()},
        )
        return print_policy(policy)

    def _boot(self, enrolled: Enrolled, bank: HashAlgorithm, indexes: tuple[int, ...]) -> dict[int, frozenset[bytes]]:
        if not indexes:
            return {}
        quoted = self._quote(enrolled, os.urandom(EXTRA_BYTES), bank, indexes)
        values = zip(indexes, quoted.values, strict=True)
        return {index: frozenset({value}) for index, value in values if _told(value)}

    def _services_pcr(self, launch_pcr: int) -> int:
        try:
            return self._keeper.services_pcr().pcr
        except ConflictError:  # they are not measured
            return next(index for index in (13, 14) if index != launch_pcr)

    def _quote(self, enrolled: Enrolled, extra: bytes, bank: HashAlgorithm, indexes: tuple[int, ...]) -> QuotedPcrs:
        quoted = self._keeper.quote(extra, bank.value, indexes)
        try:
            verify_signature(read_signing_key(enrolled.attestation_key), quoted.attest, quoted.signature)
        except AttestationError:
            raise ConflictError(
                "the platform TPM has another attestation key than was enrolled: it is another TPM, or was made anew",
                next_step=ENROLL,
            ) from None
        quote = read_quote(quoted.attest)
        quote.require_values(bank, dict(zip(indexes, quoted.values, strict=True)))
        if quote.extra != extra:
            raise AttestationError("the platform TPM has quoted something else than was asked for")
        return quoted


def _told(value: bytes) -> bool:
    """Whether something was measured into a PCR."""
    return set(value) not in ({0x00}, {0xFF})
