"""A platform's evidence as two managers exchange it: a quote, what to hold it against, who vouches for its key. Pure.

A body is u8 version, fields in order, big-endian; docs/migration.md has the table. Nothing in it is believed before
`migration.verifier` has held it against the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vtpm.errors import ProtocolError
from vtpm.tpm.attest import MAX_ATTEST_BYTES
from vtpm.tpm.event_log import PCR_COUNT
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.wire.fields import Field, choice, read_fields, rest, sized, write_fields

EVIDENCE_VERSION = 1
MAX_PUBLIC_BYTES = 512
MAX_CERTIFICATE_BYTES = 8 * 1024
MAX_SERVICES = 100
MAX_LAUNCH_LOG_BYTES = 256 * 1024
MAX_BODY_BYTES = 512 * 1024
_MEASUREMENT_BYTES = 32
# No SHA-1: a collision in it forges a boot.
_BANKS = {bank: bank.identifier for bank in (HashAlgorithm.SHA256, HashAlgorithm.SHA384)}


@dataclass(frozen=True)
class Evidence:
    """What a platform shows.

    Args:
        attestation_key: its public area, a TPMT_PUBLIC.
        certificate: of that key, by an enrolment authority; X.509, DER.
        attest, signature: a TPMS_ATTEST and a TPMT_SIGNATURE: the quote.
        bank: of the PCRs.
        pcrs: values of those that were quoted, by index.
        services: measurements of manager, keeper and launcher of this boot, SHA-256 each, in order of extension.
        launch_log: what was launched for vTPMs in this boot, as `tpm.launch_log` encodes it.
    """

    attestation_key: bytes
    certificate: bytes
    attest: bytes
    signature: bytes
    bank: HashAlgorithm
    pcrs: Mapping[int, bytes]
    services: tuple[bytes, ...]
    launch_log: bytes


def _pcrs() -> Field:
    """u8 count, then each u8 index, u16 length, value; ascending."""

    def write(values: Mapping[int, bytes]) -> bytes:
        if not all(0 <= index < PCR_COUNT and 0 < len(value) <= 64 for index, value in values.items()):
            raise ProtocolError("a PCR is out of its bounds")
        items = (bytes([index]) + len(values[index]).to_bytes(2, "big") + values[index] for index in sorted(values))
        return bytes([len(values)]) + b"".join(items)

    def read(data: bytes) -> tuple[dict[int, bytes], int]:
        values: dict[int, bytes] = {}
        count, at = data[0] if data else 0, 1
        for _ in range(count):
            index, length = int.from_bytes(data[at : at + 1], "big"), int.from_bytes(data[at + 1 : at + 3], "big")
            value = data[at + 3 : at + 3 + length]
            if not 0 < length <= 64 or len(value) != length or index >= PCR_COUNT or index <= max(values, default=-1):
                raise ProtocolError("PCRs are cut off, out of order or out of bounds")
            values[index] = value
            at += 3 + length
        if not data:
            raise ProtocolError("PCRs are cut off")
        return values, at

    return Field(write, read)


def _measurements() -> Field:
    """u8 count, then 32 bytes each."""

    def write(values: tuple[bytes, ...]) -> bytes:
        if len(values) > MAX_SERVICES or any(len(value) != _MEASUREMENT_BYTES for value in values):
            raise ProtocolError("measurements are too many or of another size")
        return bytes([len(values)]) + b"".join(values)

    def read(data: bytes) -> tuple[tuple[bytes, ...], int]:
        count = data[0] if data else MAX_SERVICES + 1
        size = 1 + count * _MEASUREMENT_BYTES
        if count > MAX_SERVICES or len(data) < size:
            raise ProtocolError("measurements are too many or cut off")
        starts = range(1, size, _MEASUREMENT_BYTES)
        return tuple(data[start : start + _MEASUREMENT_BYTES] for start in starts), size

    return Field(write, read)


_FIELDS: Mapping[str, Field] = {
    "attestation_key": sized(MAX_PUBLIC_BYTES, 1),
    "certificate": sized(MAX_CERTIFICATE_BYTES, 1),
    "attest": sized(MAX_ATTEST_BYTES, 1),
    "signature": sized(MAX_PUBLIC_BYTES, 1),
    "bank": choice("H", _BANKS),
    "pcrs": _pcrs(),
    "services": _measurements(),
    "launch_log": rest(MAX_LAUNCH_LOG_BYTES),
}


def encode_evidence(evidence: Evidence) -> bytes:
    """Return the body. Raises ProtocolError: a field is out of its bounds."""
    return bytes([EVIDENCE_VERSION]) + write_fields(evidence, _FIELDS)


def decode_evidence(body: bytes) -> Evidence:
    """Read a body. Raises ProtocolError: it is not exactly one, of this version."""
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"a platform's evidence has {len(body)} bytes, at most {MAX_BODY_BYTES} go")
    if body[:1] != bytes([EVIDENCE_VERSION]):
        raise ProtocolError(f"a platform's evidence is of another version than {EVIDENCE_VERSION}")
    return Evidence(**read_fields("platform's evidence", _FIELDS, body[1:]))
