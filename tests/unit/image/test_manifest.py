"""The manifest beside an image: what it says comes back, anything else is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from tests.unit.image.examples import EXAMPLE
from vtpm.errors import ImageError
from vtpm.image.manifest import MAX_MANIFEST_BYTES, Manifest, decode, encode, make_of, measure
from vtpm.tpm.types import Make


def _changed(**fields: Any) -> bytes:
    document = json.loads(encode(EXAMPLE))
    document.update(fields)
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


def test_manifest_comes_back_when_decoded() -> None:
    assert decode(encode(EXAMPLE)) == EXAMPLE


def test_measurement_is_over_digests_and_command_line_when_computed_by_hand() -> None:
    kernel, initramfs = b"\x01" * 32, b"\x02" * 32
    whole = b"vtpm image 1" + b"\0\0\0\x20" + kernel + b"\0\0\0\x20" + initramfs + b"\0\0\0\x03a=b"
    assert measure(kernel.hex(), initramfs.hex(), "a=b") == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("part", ["kernel", "initramfs"])
def test_measurement_differs_when_a_part_does(part: str) -> None:
    other = dataclasses.replace(getattr(EXAMPLE, part), sha256="0" * 64)
    assert dataclasses.replace(EXAMPLE, **{part: other}).measurement != EXAMPLE.measurement


def test_measurement_is_the_same_when_only_the_list_of_files_differs() -> None:
    assert dataclasses.replace(EXAMPLE, files=()).measurement == EXAMPLE.measurement


def test_manifest_is_refused_when_its_command_line_was_changed() -> None:
    with pytest.raises(ImageError, match="has been changed"):
        decode(_changed(command_line="quiet panic=-1 init=/bin/sh"))


PART = {"sha256": "0" * 64, "size": 1, "origin": "x"}


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"format": ...},
        {"measurement": "0" * 64},
        {"measurement": 5},
        {"name": "../x"},
        {"name": ...},
        {"kernel": {**PART, "sha256": "0" * 63}},
        {"kernel": {**PART, "size": -1}},
        {"kernel": {**PART, "size": True}},
        {"kernel": {**PART, "size": 1 << 40}},
        {"kernel": {**PART, "path": "/etc/shadow"}},
        {"initramfs": {"sha256": "0" * 64}},
        {"initramfs": []},
        {"command_line": "a\nb"},
        {"command_line": "a" * 2048},
        {"command_line": "\u00e9" * 2000},
        {"command_line": None},
        {"engine_version": 1 << 24},
        {"engine_version": "0.9"},
        {"unpacked_bytes": 1.5},
        {"built_with": "gcc"},
        {"files": [5]},
        {"files": [{"path": "/x"}] * 5000},
        {"more": 1},
    ],
    ids=str,
)
def test_manifest_is_refused_when_a_field_is_not_as_it_must_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        decode(_changed(**fields))


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1)])
def test_manifest_is_refused_when_it_is_no_object(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_manifest_is_refused_or_says_the_same_when_any_byte_is_changed() -> None:
    data = encode(EXAMPLE)
    for place in range(len(data)):
        other = bytearray(data)
        other[place] ^= 0x01
        try:
            found: Manifest = decode(bytes(other))
        except ImageError:
            continue
        # Whatever is believed has the measurement that was there.
        assert found.measurement == EXAMPLE.measurement


def test_make_is_what_the_measured_command_line_says() -> None:
    assert EXAMPLE.make is Make.LIBTPMS
    foreign = dataclasses.replace(EXAMPLE, command_line="quiet vtpm.make=swtpm panic=-1")
    assert decode(encode(foreign)).make is Make.SWTPM
    assert foreign.measurement != EXAMPLE.measurement
    assert make_of("vtpm.make=libtpms vtpm.make=libtpms") is Make.LIBTPMS


@pytest.mark.parametrize("words", ["vtpm.make=", "vtpm.make=other", "vtpm.make=swtpm vtpm.make=libtpms"])
def test_manifest_is_refused_when_it_names_no_make_that_is_known(words: str) -> None:
    with pytest.raises(ImageError, match="is malformed"):
        decode(encode(dataclasses.replace(EXAMPLE, command_line=words)))
