"""Two platforms with a TPM each, by the machines, guards and verifier that ship: what passes, and what never leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.swtpm import booted_platform
from tests.unit.wire.migration_examples import MIGRATION_ID, NONCE, VM_ID, VTPM_ID
from vtpm.errors import AttestationError
from vtpm.measurement.record import event_digest
from vtpm.migration.certificates import CertifiedPlatform, PlatformKind, certify, new_authority
from vtpm.migration.destination import Destination, Incoming
from vtpm.migration.guards import Guard, channel_digest
from vtpm.migration.policy import PlatformPolicy
from vtpm.migration.source import Outgoing, Source
from vtpm.migration.steps import Step
from vtpm.migration.verifier import verify_evidence
from vtpm.platform_tpm.pcrs import PcrBank, PcrSelection
from vtpm.platform_tpm.platform_tpm import PlatformTpm
from vtpm.tpm.attest import read_signing_key
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Launch, LaunchLog, encode
from vtpm.vault.holding import NOWHERE, Holding, Right
from vtpm.wire import migration as mg
from vtpm.wire.evidence import Evidence, decode_evidence, encode_evidence

pytestmark = pytest.mark.timeout(60)
HELD = Holding(Right.HELD, 7)
SERVICES, IMAGE = "11" * 32, "33" * 32
SELECTION = PcrSelection.parse("sha256:0,12,13")
NOW = datetime.now(UTC)
AUTHORITY_KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = new_authority("enrolment", AUTHORITY_KEY, NOW)


@dataclass
class Attester:
    """One platform: its TPM, its certificate, and what it asks of others."""

    tpm: PlatformTpm
    certificate: x509.Certificate
    policy: PlatformPolicy

    def evidence(self, extra: bytes) -> bytes:
        signed = self.tpm.quote(SELECTION, extra)
        log = LaunchLog(HashAlgorithm.SHA256, 12, self.tpm.reset_count(), bytes(32), (Launch("qemu", IMAGE),))
        return encode_evidence(
            Evidence(
                attestation_key=self.tpm.identity().attestation,
                certificate=self.certificate.public_bytes(Encoding.DER),
                attest=signed.attest,
                signature=signed.signature,
                bank=HashAlgorithm.SHA256,
                pcrs=self.tpm.pcr_values(SELECTION),
                services=(bytes.fromhex(SERVICES),),
                launch_log=encode(log),
            )
        )

    def verify(self, evidence: bytes, extra: bytes) -> CertifiedPlatform:
        return verify_evidence(decode_evidence(evidence), extra, self.policy, [AUTHORITY], NOW)


def enrolled(name: str, tpm: PlatformTpm) -> Attester:
    tpm.extend(13, PcrBank.SHA256, event_digest("sha256", SERVICES))
    tpm.extend(12, PcrBank.SHA256, Launch("qemu", IMAGE).digest(HashAlgorithm.SHA256))
    key = read_signing_key(tpm.identity().attestation)
    policy = PlatformPolicy(
        bank=HashAlgorithm.SHA256,
        embedded=False,
        pcrs={0: frozenset({tpm.pcr_values(SELECTION)[0]})},
        services_pcr=13,
        services=frozenset({bytes.fromhex(SERVICES)}),
        images_pcr=12,
        images={"qemu": frozenset({IMAGE})},
    )
    return Attester(tpm, certify(AUTHORITY, AUTHORITY_KEY, name, PlatformKind.HARDWARE, key, NOW), policy)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Attester, Attester]]:
    monkeypatch.setenv("TSS2_LOG", "all+none")
    with (
        booted_platform() as a,
        booted_platform() as b,
        PlatformTpm(a.tcti) as tpm_a,
        PlatformTpm(b.tcti) as tpm_b,
    ):
        yield enrolled("a", tpm_a), enrolled("b", tpm_b)


class Attempt:
    """One attempt from a to b, up to the point where the source believes the destination."""

    def __init__(self, a: Attester, b: Attester) -> None:
        channel = channel_digest(b"TLS key of a", b"TLS key of b")
        self.source, self.destination = Source(Guard(a, channel)), Destination(Guard(b, channel))
        self.asked = self.source.propose(HELD, "b", VTPM_ID, VM_ID, mg.Mode.STOPPED, NONCE)
        self.offered = self.to_destination(NOWHERE, None, self.asked, MIGRATION_ID + NONCE)

    def to_destination(
        self, holding: Holding, session: Incoming | None, step: Step[Outgoing], fresh: bytes = b""
    ) -> Step[Incoming]:
        (send,) = step.sends
        assert isinstance(send.message, mg.FromSource)
        return self.destination.receive(holding, session, "a", send.message, fresh)

    def to_source(self, holding: Holding, session: Outgoing | None, step: Step[Incoming]) -> Step[Outgoing]:
        (send,) = step.sends
        assert isinstance(send.message, mg.FromDestination)
        return self.source.receive(holding, session, "b", send.message)


def test_vtpm_moves_when_both_platforms_are_what_policy_asks_for(pair: tuple[Attester, Attester]) -> None:
    attempt = Attempt(*pair)
    believed = attempt.to_source(HELD, attempt.asked.session, attempt.offered)
    proven = attempt.to_destination(NOWHERE, attempt.offered.session, believed)
    frozen = attempt.source.freeze(HELD, believed.session, b"a whole TPM")
    stored = attempt.to_destination(NOWHERE, proven.session, frozen)
    assert (stored.holding.right, stored.state) == (Right.INERT, b"a whole TPM")
    moved = attempt.to_source(frozen.holding, frozen.session, stored)
    active = attempt.to_destination(stored.holding, stored.session, moved)
    assert (moved.holding.right, active.holding.right, active.holding.epoch) == (Right.MOVED, Right.HELD, 8)


@pytest.mark.parametrize(("pcr", "why"), [(0, "booted something"), (12, "launch log"), (13, "does not lead to PCR 13")])
def test_nothing_leaves_and_the_vtpm_stays_when_the_destination_is_something_else(
    pair: tuple[Attester, Attester], pcr: int, why: str
) -> None:
    a, b = pair
    b.tpm.extend(pcr, PcrBank.SHA256, b"x" * 32)
    attempt = Attempt(a, b)
    with pytest.raises(AttestationError, match=why):
        attempt.to_source(HELD, attempt.asked.session, attempt.offered)
    assert attempt.source.abort(HELD).holding == HELD


def test_nothing_is_taken_in_when_the_source_is_something_else(pair: tuple[Attester, Attester]) -> None:
    a, b = pair
    a.tpm.extend(0, PcrBank.SHA256, b"x" * 32)
    attempt = Attempt(a, b)
    believed = attempt.to_source(HELD, attempt.asked.session, attempt.offered)
    with pytest.raises(AttestationError, match="booted something"):
        attempt.to_destination(NOWHERE, attempt.offered.session, believed)


def test_nothing_leaves_when_the_quote_is_relayed_from_a_good_platform(pair: tuple[Attester, Attester]) -> None:
    """A third host has the certificate of a good one and passes its own key on: the good one never quoted that."""
    a, b = pair
    attempt = Attempt(a, b)
    third = Guard(b, channel_digest(b"TLS key of m", b"TLS key of b"))
    proposal = attempt.asked.sends[0].message
    assert isinstance(proposal, mg.Propose)
    relayed = third.offer("m", proposal, MIGRATION_ID, NONCE)
    with pytest.raises(AttestationError, match="a replay, or relayed"):
        attempt.source.receive(HELD, attempt.asked.session, "b", relayed)


def test_nothing_leaves_when_the_key_is_of_another_tpm(pair: tuple[Attester, Attester]) -> None:
    a, b = pair
    b.certificate = a.certificate
    attempt = Attempt(a, b)
    with pytest.raises(AttestationError, match="of another key"):
        attempt.to_source(HELD, attempt.asked.session, attempt.offered)
