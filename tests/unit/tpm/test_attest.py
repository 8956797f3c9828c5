"""Attestations are read whole or not at all, and taken for nothing but what they are."""

from __future__ import annotations

import hashlib
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.tpm.attest_examples import (
    ATTRIBUTES,
    KEY,
    NONCE,
    PCRS,
    attest,
    public_area,
    quote_body,
    selections,
    sign,
    sized,
)
from vtpm.errors import AttestationError
from vtpm.tpm.attest import MAX_ATTEST_BYTES, read_certification, read_quote, read_signing_key, verify_signature
from vtpm.tpm.hash_algorithms import HashAlgorithm

NAME = b"\x00\x0b" + bytes(range(32))
CERTIFICATION = attest(sized(NAME) + sized(NAME), kind=0x8017)
OTHER_KEY = ec.derive_private_key(0xBAD, ec.SECP256R1())
WELL_FORMED = {
    "public": (read_signing_key, public_area()),
    "quote": (read_quote, attest(quote_body())),
    "certification": (read_certification, CERTIFICATION),
}


def test_fields_are_as_signed_when_a_quote_is_read() -> None:
    quote = read_quote(attest(quote_body(), safe=1, resets=9))
    assert (quote.extra, quote.reset_count, quote.restart_count, quote.safe) == (NONCE, 9, 1, True)
    assert quote.firmware_version == 0x2019 and quote.selection == ((HashAlgorithm.SHA256, (0, 7)),)
    assert not read_quote(attest(quote_body(), safe=0)).safe
    assert not read_quote(attest(quote_body(), safe=2)).safe


def test_name_is_that_of_the_object_when_a_certification_is_read() -> None:
    assert read_certification(CERTIFICATION).name == NAME


@pytest.mark.parametrize(("read", "data"), WELL_FORMED.values(), ids=WELL_FORMED)
def test_refused_when_cut_anywhere_or_longer(read: object, data: bytes) -> None:
    assert callable(read)
    for bad in (*(data[:length] for length in range(len(data))), data + b"\0", bytes(MAX_ATTEST_BYTES + 1)):
        with pytest.raises(AttestationError):
            read(bad)


def test_refused_when_it_was_made_by_no_tpm_or_is_something_else() -> None:
    with pytest.raises(AttestationError, match="the magic 0xff544348"):
        read_quote(attest(quote_body(), magic=0xFF544348))
    with pytest.raises(AttestationError, match="the type 0x8017"):
        read_quote(CERTIFICATION)
    with pytest.raises(AttestationError, match="the type 0x8018"):
        read_certification(attest(quote_body()))


@pytest.mark.parametrize(
    "body",
    [
        struct.pack(">I", 5) + bytes(100),
        struct.pack(">I", 2**32 - 1),
        struct.pack(">IHB", 1, 0x0012, 3) + bytes(3) + sized(bytes(32)),
        struct.pack(">IHB", 1, 0x000B, 4) + bytes(4) + sized(bytes(32)),
        selections((0x000B, (0,))) + sized(bytes(65)),
    ],
    ids=["banks", "many-banks", "unknown-bank", "wide", "digest"],
)
def test_quote_is_refused_when_a_field_is_out_of_bounds(body: bytes) -> None:
    with pytest.raises(AttestationError):
        read_quote(attest(body))
    with pytest.raises(AttestationError, match="65 bytes"):
        read_quote(attest(quote_body(), extra=bytes(65)))


def test_values_are_taken_when_they_are_what_was_quoted() -> None:
    read_quote(attest(quote_body())).require_values(HashAlgorithm.SHA256, PCRS)


def test_values_are_refused_when_bank_or_pcrs_are_others() -> None:
    digest = sized(hashlib.sha256(PCRS[0] + PCRS[7]).digest())
    sha256, sha1 = 0x000B, 0x0004
    for selection, words in (
        (selections(), "over nothing"),
        (selections((sha256, ())), "over sha256:,"),
        (selections((sha1, (0, 7))), "over sha1:0,7"),
        (selections((sha256, (0,))), "over sha256:0,"),
        (selections((sha256, (0, 7, 8))), "over sha256:0,7,8"),
        (selections((sha256, (0, 7)), (sha1, (0, 7))), "over sha256:0,7; sha1:0,7"),
        (selections((sha256, (0,)), (sha256, (7,))), "over sha256:0; sha256:7"),
    ):
        with pytest.raises(AttestationError, match=words):
            read_quote(attest(selection + digest)).require_values(HashAlgorithm.SHA256, PCRS)
    empty = read_quote(attest(selections((sha256, ())) + sized(hashlib.sha256(b"").digest())))
    with pytest.raises(AttestationError, match="wanted is"):
        empty.require_values(HashAlgorithm.SHA256, {})


def test_values_are_refused_when_they_are_others_or_shifted() -> None:
    quote = read_quote(attest(quote_body()))
    with pytest.raises(AttestationError, match="not those that were quoted"):
        quote.require_values(HashAlgorithm.SHA256, PCRS | {7: bytes(32)})
    shifted = {0: PCRS[0] + PCRS[7][:1], 7: PCRS[7][1:]}
    with pytest.raises(AttestationError, match="another size"):
        quote.require_values(HashAlgorithm.SHA256, shifted)


def test_signature_is_taken_when_it_is_the_keys() -> None:
    key, data = read_signing_key(public_area()), attest(quote_body())
    verify_signature(key, data, sign(data))


def test_signature_is_refused_when_data_key_or_signature_is_another() -> None:
    key, data = read_signing_key(public_area()), attest(quote_body())
    good = sign(data)
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad_data, bad in ((data + b"\0", good), (data, sign(data, OTHER_KEY)), (data, flipped)):
        with pytest.raises(AttestationError):
            verify_signature(key, bad_data, bad)
    for head in (struct.pack(">HH", 0x0014, 0x000B), struct.pack(">HH", 0x0018, 0x0004)):
        with pytest.raises(AttestationError, match="the signature has"):
            verify_signature(key, data, head + good[4:])
    for length in range(len(good)):
        with pytest.raises(AttestationError):
            verify_signature(key, data, good[:length])
    zero = good[:4] + sized(bytes(32)) + sized(bytes(32))
    with pytest.raises(AttestationError, match="not signed by this key"):
        verify_signature(key, data, zero)


def test_name_and_attributes_are_those_of_the_area_when_a_key_is_read() -> None:
    area = public_area(policy=bytes(32))
    key = read_signing_key(area)
    assert key.name == b"\x00\x0b" + hashlib.sha256(area).digest() and key.attributes == ATTRIBUTES
    assert key.key.public_numbers() == KEY.public_key().public_numbers()
    key.require_attestation_key()


@pytest.mark.parametrize("at", range(7))
def test_key_is_refused_when_an_algorithm_is_another(at: int) -> None:
    algorithms = [0x0023, 0x000B, 0x0010, 0x0018, 0x000B, 0x0003, 0x0010]
    algorithms[at] = 0x0006
    with pytest.raises(AttestationError, match="0x6, wanted is"):
        read_signing_key(public_area(algorithms=algorithms))


def test_key_is_refused_when_it_is_no_point_of_the_curve() -> None:
    area = public_area()
    with pytest.raises(AttestationError, match="no point"):
        read_signing_key(area[:-1] + bytes([area[-1] ^ 1]))


@pytest.mark.parametrize("bit", [1, 4, 5, 16, 18], ids=["fixedTPM", "fixedParent", "origin", "restricted", "sign"])
def test_key_is_no_attestation_key_when_an_attribute_is_missing(bit: int) -> None:
    with pytest.raises(AttestationError, match="no attestation key"):
        read_signing_key(public_area(attributes=ATTRIBUTES & ~(1 << bit))).require_attestation_key()


def test_key_is_no_attestation_key_when_it_decrypts() -> None:
    with pytest.raises(AttestationError, match="no attestation key"):
        read_signing_key(public_area(attributes=ATTRIBUTES | 1 << 17)).require_attestation_key()
