"""The Authenticode digest: what it covers, what it leaves out, which images have none."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.tpm.pe_examples import PE32, PE32_PLUS, Pe
from vtpm.errors import UsageError
from vtpm.tpm import authenticode
from vtpm.tpm.authenticode import MAX_SECTIONS, authenticode_digest
from vtpm.tpm.hash_algorithms import HashAlgorithm

SHA256 = HashAlgorithm.SHA256


@pytest.mark.parametrize("algorithm", [HashAlgorithm.SHA256, HashAlgorithm.SHA384, HashAlgorithm.SHA512])
@pytest.mark.parametrize("magic", [PE32, PE32_PLUS])
@pytest.mark.parametrize("directories", [0, 4, 5, 16])
def test_digest_covers_what_it_must_when_image_is_of_any_form(
    algorithm: HashAlgorithm, magic: int, directories: int
) -> None:
    pe = Pe(magic=magic, directories=directories, trailing=b"symbols")
    assert authenticode_digest(pe.image(), algorithm) == pe.digest(algorithm)


def test_digest_stays_when_the_image_is_signed() -> None:
    pe = Pe(trailing=b"symbols")
    signed = replace(pe, checksum=b"\1\2\3\4", certificates=b"signature" * 8)
    assert authenticode_digest(signed.image(), SHA256) == authenticode_digest(pe.image(), SHA256)


def test_digest_is_another_when_any_other_byte_is() -> None:
    pe = Pe(sections=(b"code",), certificates=b"sig")
    image = pe.image()
    before = authenticode_digest(image, SHA256)
    first, checksum, second, entry, third = (len(piece) for piece in pe.pieces())
    left_out = {*range(first, first + checksum), *range(first + checksum + second, first + checksum + second + entry)}
    measured = set(range(first + checksum + second + entry + third)) - left_out
    same = set()
    for at in range(len(image)):
        changed = bytearray(image)
        changed[at] ^= 0x01
        try:
            after = authenticode_digest(changed, SHA256)
        except UsageError:
            continue
        if after == before:
            same.add(at)
    assert not same & measured
    # The entry leads to the certificate table, so a changed one is refused.
    assert same == set(range(first, first + checksum)) | set(range(len(image) - 3, len(image)))


def test_sections_are_taken_when_the_table_lists_them_in_another_order() -> None:
    pe = Pe(sections=(b"first", b"", b"second", b"third"), table_order=(3, 1, 0, 2))
    assert authenticode_digest(pe.image(), SHA256) == pe.digest("sha256")


def test_image_is_taken_when_it_has_no_sections() -> None:
    pe = Pe(sections=(), trailing=b"all of it")
    assert authenticode_digest(pe.image(), SHA256) == pe.digest("sha256")


def test_file_is_read_in_place_when_it_is_mapped(tmp_path: Path) -> None:
    pe = Pe()
    path = tmp_path / "image.efi"
    path.write_bytes(pe.image())
    # If anything still held the mapping, closing it would raise.
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        assert authenticode_digest(view, SHA256) == pe.digest("sha256")


def test_digest_is_refused_when_it_is_to_be_sha1() -> None:
    with pytest.raises(UsageError, match="sha1 protect nothing"):
        authenticode_digest(Pe().image(), HashAlgorithm.SHA1)


def test_image_is_refused_when_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Pe().image()
    monkeypatch.setattr(authenticode, "MAX_IMAGE_BYTES", len(image) - 1)
    with pytest.raises(UsageError, match=f"has {len(image)} bytes; at most {len(image) - 1} are read"):
        authenticode_digest(image, SHA256)


def test_image_is_refused_when_cut_at_any_byte() -> None:
    pe = Pe(certificates=b"signature" * 3)
    image = pe.image()
    for length in range(len(image)):
        with pytest.raises(UsageError, match="cannot be measured"):
            authenticode_digest(image[:length], SHA256)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "does not begin with a DOS header"),
        (b"\x7fELF" + bytes(100), "does not begin with a DOS header"),
        (b"MZ" + bytes(58) + b"\xff\xff\xff\xff" + bytes(100), "leads to no PE header"),
        (Pe(pe_signature=b"PE\0\1").image(), "leads to no PE header"),
        (Pe(pe_signature=b"VZ\0\0").image(), "leads to no PE header"),
        (Pe().image().replace(b"\x0b\x02", b"\x07\x01", 1), r"neither PE32 nor PE32\+ \(0x107\)"),
        (Pe(claimed_directories=15).image(), "does not hold the 15 data directories"),
        (Pe(claimed_directories=2**32 - 1).image(), "does not hold the 4294967295 data directories"),
        (Pe(directories=17).image(), "does not hold the 17 data directories"),
        (Pe(claimed_sections=0xFFFF).image(), "has 65535 sections; at most 96 are read"),
        (Pe(sections=(b"x",) * (MAX_SECTIONS + 1)).image(), "has 97 sections"),
        (Pe(claimed_sections=3).image(), "headers do not end where they say"),
        (Pe(claimed_headers_end=0).image(), "headers do not end where they say"),
        (Pe(claimed_headers_end=2**32 - 1).image(), "headers do not end where they say"),
        (Pe(section_shift=-1).image(), "does not begin where the part before it ends"),
        (Pe(section_shift=1).image(), "does not begin where the part before it ends"),
        (Pe(claimed_certificates=(400, 4)).image(), "certificate table is not at its end"),
        (Pe(claimed_certificates=(0, 2**32 - 1)).image(), "certificate table is not at its end"),
        (Pe(certificates=b"sig", claimed_certificates=(0, len(Pe().image()) + 3)).image(), "table is not at its end"),
    ],
)
def test_image_is_refused_when_firmware_and_tools_might_not_agree_on_it(image: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        authenticode_digest(image, SHA256)


def test_certificate_entry_is_left_out_when_it_says_that_there_are_none() -> None:
    pe = Pe(claimed_certificates=(0x1234, 0))
    assert authenticode_digest(pe.image(), SHA256) == authenticode_digest(Pe().image(), SHA256)


@pytest.mark.parametrize("optional_bytes", [0, 1, 2, 111])
def test_image_is_refused_when_its_optional_header_is_too_small(optional_bytes: int) -> None:
    image = bytearray(Pe(stub=b"").image())
    image[64 + 20 : 64 + 22] = optional_bytes.to_bytes(2, "little")
    with pytest.raises(UsageError, match="optional header is"):
        authenticode_digest(image, SHA256)
