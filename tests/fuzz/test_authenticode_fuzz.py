"""Whatever an image is, its digest is that of what was put in, or there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.tpm.pe_examples import Pe, images
from vtpm.errors import UsageError
from vtpm.tpm.authenticode import authenticode_digest
from vtpm.tpm.hash_algorithms import HashAlgorithm

ALGORITHMS = st.sampled_from([HashAlgorithm.SHA256, HashAlgorithm.SHA384])


@effort.codec
@given(images(), ALGORITHMS)
def test_digest_is_that_of_the_pieces(pe: Pe, algorithm: HashAlgorithm) -> None:
    assert authenticode_digest(pe.image(), algorithm) == pe.digest(algorithm)


@effort.codec
@given(spoiled(images().map(Pe.image)))
def test_spoiled_image_is_refused_or_has_a_digest(image: bytes) -> None:
    try:
        digest = authenticode_digest(image, HashAlgorithm.SHA256)
    except UsageError:
        return
    assert len(digest) == 32


@effort.codec
@given(st.binary(max_size=200), st.integers(0, 300))
def test_noise_is_refused(noise: bytes, pe_header: int) -> None:
    image = b"MZ" + bytes(58) + pe_header.to_bytes(4, "little") + noise.replace(b"P", b"")
    with pytest.raises(UsageError, match="leads to no PE header"):
        authenticode_digest(image, HashAlgorithm.SHA256)
