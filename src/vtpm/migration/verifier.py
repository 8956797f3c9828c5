"""Holds a platform's evidence against what was asked, and against policy. Pure; a failed check raises.

The order is from who signs to what is said: certificate, key, signature, freshness, PCRs, logs, policy. Nothing is
looked at before that which vouches for it was verified.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from datetime import datetime

from cryptography import x509

from vtpm.errors import AttestationError, ProtocolError
from vtpm.measurement.record import predict
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind, verify
from vtpm.migration.policy import PlatformPolicy
from vtpm.tpm.attest import read_quote, read_signing_key, verify_signature
from vtpm.tpm.launch_log import decode
from vtpm.wire.evidence import Evidence


def verify_evidence(
    evidence: Evidence,
    extra: bytes,
    policy: PlatformPolicy,
    authorities: Iterable[x509.Certificate],
    now: datetime,
) -> CertifiedPlatform:
    """Return whose evidence it is, when all of it holds.

    Args:
        evidence: untrusted.
        extra: qualifying data that the quote must have: a digest over a nonce of the verifier's and all that must not
            be substituted.
        policy: see PlatformPolicy.
        authorities: that are trusted to enrol platforms.
        now: aware of its time zone.
    Raises:
        AttestationError: a check failed; the message says which.
    """
    key = read_signing_key(evidence.attestation_key)
    platform = verify(evidence.certificate, authorities, key, now)
    check_evidence(evidence, platform, extra, policy)
    return platform


def check_evidence(evidence: Evidence, platform: CertifiedPlatform, extra: bytes, policy: PlatformPolicy) -> None:
    """Hold evidence against what was asked and against policy, once it is settled whose the certificate is.

    Args:
        platform: whom the certificate is of; its key is the evidence's.
        evidence, extra, policy: as verify_evidence.
    Raises:
        AttestationError: a check failed; the message says which.
    """
    key = read_signing_key(evidence.attestation_key)
    key.require_attestation_key()
    verify_signature(key, evidence.attest, evidence.signature)
    quote = read_quote(evidence.attest)
    if not hmac.compare_digest(quote.extra, extra):
        raise AttestationError(f"the quote of {platform.name} was made for something else: it is a replay, or relayed")
    if evidence.bank is not policy.bank:
        raise AttestationError(f"the quote of {platform.name} is over bank {evidence.bank}, wanted is {policy.bank}")
    if tuple(sorted(evidence.pcrs)) != policy.quoted:
        raise AttestationError(f"{platform.name} shows PCRs {sorted(evidence.pcrs)}, wanted are {list(policy.quoted)}")
    quote.require_values(evidence.bank, evidence.pcrs)
    if platform.kind is not PlatformKind.HARDWARE and not policy.embedded:
        raise AttestationError(
            f"{platform.name} has no hardware TPM, and policy takes none without",
            next_step="Set embedded = true in the platform policy if its root is trusted",
        )
    _check_boot(platform.name, evidence, policy)
    _check_services(platform, evidence, policy)
    _check_launches(platform.name, evidence, policy, quote.reset_count)


def _check_boot(name: str, evidence: Evidence, policy: PlatformPolicy) -> None:
    wrong = [index for index, allowed in sorted(policy.pcrs.items()) if evidence.pcrs[index] not in allowed]
    if wrong:
        raise AttestationError(
            f"{name} has booted something that policy does not allow: PCR {', '.join(map(str, wrong))} of {policy.bank}"
        )


def _check_services(platform: CertifiedPlatform, evidence: Evidence, policy: PlatformPolicy) -> None:
    name = platform.name
    measurements = tuple(value.hex() for value in evidence.services)
    start = bytes(policy.bank.digest_bytes)
    # Into the embedded TPM nothing is measured: whoever takes it trusts the host's root already.
    missing = not measurements and platform.kind is PlatformKind.HARDWARE
    if missing or predict(policy.bank, start, measurements) != evidence.pcrs[policy.services_pcr]:
        raise AttestationError(f"what {name} says of its services does not lead to PCR {policy.services_pcr}")
    # Each of this boot: what ran first may have left anything behind for what runs now.
    unknown = [value.hex() for value in evidence.services if value not in policy.services]
    if unknown:
        raise AttestationError(f"{name} has run services in this boot that policy does not allow: {unknown[0]}")


def _check_launches(name: str, evidence: Evidence, policy: PlatformPolicy, reset_count: int) -> None:
    try:
        log = decode(evidence.launch_log, policy.bank, policy.images_pcr)
    except ProtocolError as error:
        raise AttestationError(f"the launch log of {name} cannot be read: {error.message}") from error
    if log.reset_count != reset_count:
        raise AttestationError(f"the launch log of {name} is of another boot")
    if any(log.start) or log.gaps:
        raise AttestationError(f"something else than vtpm has extended PCR {policy.images_pcr} of {name}")
    if log.value != evidence.pcrs[policy.images_pcr]:
        raise AttestationError(f"the launch log of {name} does not lead to PCR {policy.images_pcr}")
    for launch in sorted(log.measured):
        if launch.measurement not in policy.images.get(launch.kind, frozenset()):
            raise AttestationError(
                f"{name} has launched what policy does not allow: {launch.measurement} as {launch.kind}"
            )
