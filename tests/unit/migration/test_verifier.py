"""Another platform's evidence is taken when all of it holds, and refused when any one thing does not."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.migration.evidence_examples import (
    AUTHORITY,
    IMAGE,
    LAUNCHES,
    NOW,
    PCRS,
    POLICY,
    SERVICES,
    SHA256,
    certificate,
    evidence,
)
from tests.unit.tpm.attest_examples import ATTRIBUTES, NONCE, attest, public_area, quote_body, selections, sign, sized
from vtpm.errors import AttestationError
from vtpm.measurement.record import predict
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind, new_authority
from vtpm.migration.policy import PlatformPolicy
from vtpm.migration.verifier import verify_evidence
from vtpm.tpm.attest import read_signing_key
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Gap, Launch, LaunchLog, encode
from vtpm.wire.evidence import Evidence

STRANGER = ec.derive_private_key(0xBAD, ec.SECP256R1())


def verify(shown: Evidence, policy: PlatformPolicy = POLICY) -> CertifiedPlatform:
    return verify_evidence(shown, NONCE, policy, [AUTHORITY], NOW)


def with_launches(log: LaunchLog) -> Evidence:
    return evidence(PCRS | {12: log.value}, launch_log=encode(log))


def test_platform_is_known_when_all_holds() -> None:
    platform = verify(evidence())
    assert (platform.name, platform.kind) == ("host-b", PlatformKind.HARDWARE)


def test_refused_when_no_trusted_authority_has_enrolled_it() -> None:
    with pytest.raises(AttestationError, match="no enrolment authority"):
        verify_evidence(evidence(), NONCE, POLICY, [], NOW)
    false = new_authority("enrolment of example.org", STRANGER, NOW)
    with pytest.raises(AttestationError, match="no enrolment authority"):
        verify(evidence(certificate=certificate(authority=false, authority_key=STRANGER)))


@pytest.mark.parametrize("days", [-1, 731, 4000])
def test_refused_when_a_certificate_is_not_valid_now(days: int) -> None:
    with pytest.raises(AttestationError, match="certificate is valid from"):
        verify_evidence(evidence(), NONCE, POLICY, [AUTHORITY], NOW + timedelta(days=days))


def test_refused_when_the_key_is_of_another_tpm() -> None:
    other = public_area(STRANGER)
    quote = attest(quote_body(PCRS))
    with pytest.raises(AttestationError, match="of another key"):
        verify(evidence(public=other, attest=quote, signature=sign(quote, STRANGER)))


def test_refused_when_the_key_signs_anything_or_was_made_outside() -> None:
    for bit in (1, 5, 16):
        public = public_area(attributes=ATTRIBUTES & ~(1 << bit))
        with pytest.raises(AttestationError, match="other attributes"):
            verify(evidence(public=public))
        # An authority that did not look at what it certified.
        key = dataclasses.replace(read_signing_key(public), attributes=ATTRIBUTES)
        with pytest.raises(AttestationError, match="no attestation key"):
            verify(evidence(public=public, certificate=certificate(attestation_key=key)))


def test_refused_when_the_signature_is_anothers() -> None:
    with pytest.raises(AttestationError, match="not signed by this key"):
        verify(evidence(signature=sign(attest(quote_body(PCRS)), STRANGER)))


def test_refused_when_the_quote_is_replayed_or_made_for_something_else() -> None:
    for extra in (bytes(32), NONCE[:-1], b"", NONCE + b"\0"):
        with pytest.raises(AttestationError, match="a replay, or relayed"):
            verify(evidence(extra=extra))


def test_refused_when_bank_or_pcrs_are_not_those_of_the_policy() -> None:
    with pytest.raises(AttestationError, match="over bank sha384"):
        verify(evidence(bank=HashAlgorithm.SHA384))
    for pcrs in ({}, {0: PCRS[0]}, PCRS | {16: bytes(32)}, {index: PCRS[index] for index in (0, 12, 13)}):
        with pytest.raises(AttestationError, match="wanted are"):
            verify(evidence(pcrs))


def test_refused_when_the_quote_is_over_another_bank_or_nothing() -> None:
    for body in (quote_body(PCRS, 0x0004), selections() + sized(bytes(32)), quote_body({0: PCRS[0]})):
        quote = attest(body)
        with pytest.raises(AttestationError, match="the quote is over"):
            verify(evidence(attest=quote, signature=sign(quote)))


def test_refused_when_values_are_doctored() -> None:
    quote = attest(quote_body(PCRS | {0: b"x" * 32}))
    with pytest.raises(AttestationError, match="not those that were quoted"):
        verify(evidence(attest=quote, signature=sign(quote)))


def test_refused_when_it_has_no_hardware_unless_policy_takes_that() -> None:
    shown = evidence(certificate=certificate(PlatformKind.EMBEDDED))
    with pytest.raises(AttestationError, match="no hardware TPM"):
        verify(shown)
    assert verify(shown, dataclasses.replace(POLICY, embedded=True)).kind is PlatformKind.EMBEDDED


@pytest.mark.parametrize("index", [0, 7])
def test_refused_when_something_else_has_booted(index: int) -> None:
    with pytest.raises(AttestationError, match=f"PCR {index} of sha256"):
        verify(evidence(PCRS | {index: b"x" * 32}))


def test_services_are_shown_by_all_but_an_embedded_platform() -> None:
    pcrs, taken = PCRS | {13: bytes(32)}, dataclasses.replace(POLICY, embedded=True)
    with pytest.raises(AttestationError, match="does not lead to PCR 13"):
        verify(evidence(pcrs, services=()), taken)
    embedded = evidence(pcrs, services=(), certificate=certificate(PlatformKind.EMBEDDED))
    assert verify(embedded, taken).kind is PlatformKind.EMBEDDED
    # What it says all the same has to be so.
    with pytest.raises(AttestationError, match="does not lead to PCR 13"):
        verify(dataclasses.replace(embedded, services=SERVICES), taken)


def test_refused_when_the_services_do_not_lead_to_their_pcr() -> None:
    for services in ((), SERVICES[:1], SERVICES[::-1], (*SERVICES, SERVICES[0])):
        with pytest.raises(AttestationError, match="does not lead to PCR 13"):
            verify(evidence(services=services))
    with pytest.raises(AttestationError, match="does not lead to PCR 13"):
        verify(evidence(PCRS | {13: bytes(32)}, services=()))


def test_refused_when_any_service_of_this_boot_is_not_allowed() -> None:
    for services in ((b"\x99" * 32, *SERVICES), (*SERVICES, b"\x99" * 32)):
        pcr = predict("sha256", bytes(32), tuple(value.hex() for value in services))
        with pytest.raises(AttestationError, match="services in this boot that policy does not allow: 9999"):
            verify(evidence(PCRS | {13: pcr}, services=services))


def test_refused_when_the_launch_log_is_doctored_or_of_another_boot() -> None:
    with pytest.raises(AttestationError, match="does not lead to PCR 12"):
        verify(evidence(launch_log=encode(dataclasses.replace(LAUNCHES, entries=LAUNCHES.entries[:1]))))
    with pytest.raises(AttestationError, match="of another boot"):
        verify(evidence(launch_log=encode(dataclasses.replace(LAUNCHES, reset_count=2))))
    with pytest.raises(AttestationError, match="cannot be read"):
        verify(evidence(launch_log=encode(LAUNCHES)[:-1]))
    with pytest.raises(AttestationError, match="cannot be read"):
        verify(evidence(launch_log=encode(dataclasses.replace(LAUNCHES, pcr=11))))


def test_refused_when_something_else_has_extended_the_launch_pcr() -> None:
    for log in (
        LaunchLog(SHA256, 12, 3, b"x" * 32, LAUNCHES.entries),
        LaunchLog(SHA256, 12, 3, bytes(32), (Gap(b"x" * 32), *LAUNCHES.entries)),
    ):
        with pytest.raises(AttestationError, match="something else than vtpm"):
            verify(with_launches(log))


def test_refused_when_something_was_launched_that_policy_does_not_allow() -> None:
    for launch in (Launch("qemu", "44" * 32), Launch("xen", IMAGE)):
        with pytest.raises(AttestationError, match=f"{launch.measurement} as {launch.kind}"):
            verify(with_launches(dataclasses.replace(LAUNCHES, entries=(*LAUNCHES.entries, launch))))
    nothing = dataclasses.replace(LAUNCHES, entries=())
    assert verify(with_launches(nothing)).name == "host-b"
