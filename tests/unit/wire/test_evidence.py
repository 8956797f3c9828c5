"""The codec of evidence takes exactly its own form."""

from __future__ import annotations

import dataclasses

import pytest

from vtpm.errors import ProtocolError
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.wire import evidence as ev
from vtpm.wire.evidence import Evidence, decode_evidence, encode_evidence

EXAMPLE = Evidence(
    attestation_key=b"key",
    certificate=b"certificate",
    attest=b"attest",
    signature=b"signature",
    bank=HashAlgorithm.SHA256,
    pcrs={0: b"\xaa" * 32, 23: b"\xbb" * 48},
    services=(b"\x11" * 32, b"\x22" * 32),
    launch_log=b"log",
)


def test_bytes_are_as_documented_when_encoded() -> None:
    body = (
        b"\x01\0\0\0\x03key\0\0\0\x0bcertificate\0\0\0\x06attest\0\0\0\x09signature\0\x0b"
        + (b"\x02\0\0\x20" + b"\xaa" * 32 + b"\x17\0\x30" + b"\xbb" * 48)
        + (b"\x02" + b"\x11" * 32 + b"\x22" * 32)
        + b"log"
    )
    assert encode_evidence(EXAMPLE) == body
    assert decode_evidence(body) == EXAMPLE


def test_nothing_but_the_end_may_be_missing_when_cut() -> None:
    body = encode_evidence(EXAMPLE)
    for length in range(len(body) - len(b"log")):
        with pytest.raises(ProtocolError):
            decode_evidence(body[:length])
    empty = dataclasses.replace(EXAMPLE, pcrs={}, services=(), launch_log=b"")
    assert decode_evidence(encode_evidence(empty)) == empty


@pytest.mark.parametrize(
    "change",
    [
        {"attestation_key": b""},
        {"attestation_key": bytes(ev.MAX_PUBLIC_BYTES + 1)},
        {"certificate": bytes(ev.MAX_CERTIFICATE_BYTES + 1)},
        {"bank": HashAlgorithm.SHA1},
        {"pcrs": {24: bytes(32)}},
        {"pcrs": {-1: bytes(32)}},
        {"pcrs": {0: b""}},
        {"pcrs": {0: bytes(65)}},
        {"services": (bytes(31),)},
        {"services": (bytes(32),) * (ev.MAX_SERVICES + 1)},
        {"launch_log": bytes(ev.MAX_LAUNCH_LOG_BYTES + 1)},
    ],
)
def test_not_sent_when_a_field_is_out_of_bounds(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        encode_evidence(dataclasses.replace(EXAMPLE, **change))  # type: ignore[arg-type]


def test_refused_when_version_size_or_an_order_is_another() -> None:
    body = encode_evidence(EXAMPLE)
    with pytest.raises(ProtocolError, match="another version"):
        decode_evidence(b"\x02" + body[1:])
    with pytest.raises(ProtocolError, match="at most"):
        decode_evidence(bytes(ev.MAX_BODY_BYTES + 1))
    twice = body.replace(b"\x17\0\x30" + b"\xbb" * 48, b"\0\0\x30" + b"\xbb" * 48)
    far = body.replace(b"\x17\0\x30", b"\x18\0\x30")
    many = body.replace(b"\x02" + b"\x11" * 32, b"\x65" + b"\x11" * 32)
    for bad in (twice, far, many):
        assert bad != body
        with pytest.raises(ProtocolError):
            decode_evidence(bad)
