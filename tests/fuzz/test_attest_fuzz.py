"""Attestations and keys of strangers: what is spoiled is refused by its own error, or is another one of its form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.tpm.attest_examples import attest, public_area, quote_body, sign, sized
from tests.unit.tpm.ek_examples import endorsement_area
from vtpm.errors import AttestationError
from vtpm.tpm.attest import read_certification, read_quote, read_signing_key, verify_signature
from vtpm.tpm.credential import read_endorsement_key

NAME = sized(b"\x00\x0b" + bytes(32))
QUOTE = attest(quote_body())
KEY = read_signing_key(public_area())
READERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (read_signing_key, public_area()),
    (read_endorsement_key, endorsement_area()),
    (read_quote, QUOTE),
    (read_certification, attest(NAME + NAME, kind=0x8017)),
]


@pytest.mark.parametrize(("read", "whole"), READERS, ids=lambda one: getattr(one, "__name__", ""))
@effort.codec
@given(data=st.data())
def test_spoiled_structure_is_refused_or_read(
    read: Callable[[bytes], object], whole: bytes, data: st.DataObject
) -> None:
    structure = data.draw(spoiled(st.just(whole)))
    try:
        read(structure)
    except AttestationError:
        return


@effort.codec
@given(spoiled(st.just(sign(QUOTE))))
def test_spoiled_signature_is_refused(signature: bytes) -> None:
    try:
        verify_signature(KEY, QUOTE, signature)
    except AttestationError:
        return
    # A number may be written with more zeros before it; nothing else is another signature.
    assert signature[:4] == b"\x00\x18\x00\x0b"


@effort.codec
@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    for read in (read_signing_key, read_quote, read_certification):
        with pytest.raises(AttestationError):
            read(noise)
