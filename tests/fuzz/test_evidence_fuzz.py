"""Evidence of a stranger: what is taken has one form, and what is spoiled is refused by an error of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.wire.test_evidence import EXAMPLE
from vtpm.errors import ProtocolError
from vtpm.wire.evidence import decode_evidence, encode_evidence


@effort.codec
@given(spoiled(st.just(encode_evidence(EXAMPLE))))
def test_spoiled_evidence_is_refused_or_is_another_of_its_form(body: bytes) -> None:
    try:
        shown = decode_evidence(body)
    except ProtocolError:
        return
    assert encode_evidence(shown) == body


@effort.codec
@given(st.binary(max_size=300))
def test_noise_is_refused_or_is_evidence(noise: bytes) -> None:
    body = b"\1" + noise
    try:
        shown = decode_evidence(body)
    except ProtocolError:
        return
    assert encode_evidence(shown) == body
