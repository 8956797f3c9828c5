"""Heads of TPM commands and responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm.errors import ProtocolError
from vtpm.tpm.headers import (
    COMMAND_TAGS,
    HEADER_BYTES,
    MAX_COMMAND_BYTES,
    RESPONSE_TAGS,
    CommandHeader,
    ResponseHeader,
    failure_response,
)
from vtpm.tpm.return_codes import Rc12, Rc20, describe_12, describe_20, is_auth_fail_20
from vtpm.tpm.types import TpmVersion

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
SIZES = st.integers(HEADER_BYTES, MAX_COMMAND_BYTES)
HEADERS = [CommandHeader, ResponseHeader]


def test_fields_are_read_when_command_is_get_random() -> None:
    data = bytes.fromhex("80010000000c0000017b0010")
    assert CommandHeader.parse(data) == CommandHeader(0x8001, 12, 0x17B)
    assert CommandHeader.parse(memoryview(data)) == CommandHeader.parse(bytearray(data))


@given(U16, SIZES, U32, st.binary(max_size=20))
@pytest.mark.parametrize("header", HEADERS)
def test_header_is_the_same_when_built_and_parsed(header, tag: int, size: int, code: int, rest: bytes) -> None:
    built = header(tag, size, code).build()
    assert len(built) == HEADER_BYTES
    assert header.parse(built + rest) == header(tag, size, code)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("length", range(HEADER_BYTES))
def test_header_is_refused_when_cut_at_any_byte(header, length: int) -> None:
    whole = header(0x8001, HEADER_BYTES, 0).build()
    with pytest.raises(ProtocolError, match="cut off"):
        header.parse(whole[:length])


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("size", [0, 9, MAX_COMMAND_BYTES + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_header_is_refused_when_size_is_out_of_bounds(header, size: int) -> None:
    with pytest.raises(ProtocolError, match=f"claims {size} bytes"):
        header.parse(header(0x8001, size, 0).build())


@given(st.binary(max_size=32))
@pytest.mark.parametrize("header", HEADERS)
def test_parser_gives_a_bounded_header_or_refuses_when_bytes_are_any(header, data: bytes) -> None:
    try:
        parsed = header.parse(data)
    except ProtocolError:
        return
    assert HEADER_BYTES <= parsed.size_bytes <= MAX_COMMAND_BYTES
    assert parsed.build() == data[:HEADER_BYTES]


@pytest.mark.parametrize(
    ("version", "expected"),
    [(TpmVersion.V1_2, "00c40000000a00000009"), (TpmVersion.V2_0, "80010000000a00000101")],
)
def test_failure_response_tells_the_version_when_built(version: TpmVersion, expected: str) -> None:
    code = Rc12.TPM_FAIL if version is TpmVersion.V1_2 else Rc20.TPM_RC_FAILURE
    response = failure_response(version, code)
    assert response.hex() == expected
    assert ResponseHeader.parse(response).tag in RESPONSE_TAGS[version]


def test_command_tags_of_the_versions_are_apart() -> None:
    assert not COMMAND_TAGS[TpmVersion.V1_2] & COMMAND_TAGS[TpmVersion.V2_0]


def test_description_has_name_and_number_when_code_is_known() -> None:
    assert describe_12(Rc12.TPM_RETRY) == "0x800 (TPM_RETRY)"
    assert describe_20(Rc20.TPM_RC_CANCELED) == "0x909 (TPM_RC_CANCELED)"
    assert describe_20(0x777) == describe_12(0x777) == "0x777"


@pytest.mark.parametrize("code", [0x98E, 0xA8E, 0xF8E, 0x08E, 0x1CE])
def test_authorisation_failure_is_told_when_it_is_about_any_session(code: int) -> None:
    assert is_auth_fail_20(code)


@pytest.mark.parametrize("code", [0, 0x9A2, 0x921, 0x922, 0x00E, 0x90E, 0x98F, 0x1098E, 0x8000098E])
def test_other_codes_are_no_authorisation_failure_when_they_are_alike(code: int) -> None:
    assert not is_auth_fail_20(code)
