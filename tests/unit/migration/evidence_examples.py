"""A platform with its authority, policy and evidence, all well; what a test spoils, it spoils here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.tpm.attest_examples import NONCE, attest, public_area, quote_body, sign
from vtpm.measurement.record import predict
from vtpm.migration.certificates import PlatformKind, certify, new_authority
from vtpm.migration.policy import PlatformPolicy
from vtpm.tpm.attest import read_signing_key
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Launch, LaunchLog, encode
from vtpm.wire.evidence import Evidence

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
AUTHORITY_KEY = ec.derive_private_key(0xCA, ec.SECP256R1())
AUTHORITY = new_authority("enrolment of example.org", AUTHORITY_KEY, NOW)
SHA256 = HashAlgorithm.SHA256
SERVICES = (b"\x11" * 32, b"\x22" * 32)
IMAGE = "33" * 32
LAUNCHES = LaunchLog(SHA256, 12, 3, bytes(32), (Launch("qemu", IMAGE), Launch("process", IMAGE)))
PCRS = {
    0: b"f" * 32,
    7: b"s" * 32,
    12: LAUNCHES.value,
    13: predict("sha256", bytes(32), tuple(value.hex() for value in SERVICES)),
}
POLICY = PlatformPolicy(
    bank=SHA256,
    embedded=False,
    pcrs={0: frozenset({b"e" * 32, b"f" * 32}), 7: frozenset({b"s" * 32})},
    services_pcr=13,
    services=frozenset(SERVICES),
    images_pcr=12,
    images={"qemu": frozenset({IMAGE}), "process": frozenset({IMAGE})},
)


def certificate(kind: PlatformKind = PlatformKind.HARDWARE, **changes: Any) -> bytes:
    fields = {
        "authority": AUTHORITY,
        "authority_key": AUTHORITY_KEY,
        "name": "host-b",
        "kind": kind,
        "attestation_key": read_signing_key(public_area()),
        "now": NOW,
    }
    return certify(**(fields | changes)).public_bytes(Encoding.DER)


def evidence(
    pcrs: Mapping[int, bytes] = PCRS, *, extra: bytes = NONCE, public: bytes = public_area(), **changes: Any
) -> Evidence:
    """A quote over these PCRs, signed by KEY, and what comes with it."""
    quote = attest(quote_body(pcrs), extra=extra)
    whole = Evidence(public, certificate(), quote, sign(quote), SHA256, dict(pcrs), SERVICES, encode(LAUNCHES))
    return dataclasses.replace(whole, **changes)
