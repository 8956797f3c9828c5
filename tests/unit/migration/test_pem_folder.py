"""Certificates that are trusted come from all files of a folder, or none is."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.migration.enrolment_examples import authority
from vtpm.errors import UsageError
from vtpm.migration.pem_folder import MAX_FILE_BYTES, read_certificates

ONE, TWO, THREE = (authority(name).certificate for name in ("one", "two", "three"))


def pem(*certificates: object) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)  # type: ignore[attr-defined]


def test_certificates_are_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "b.pem").write_bytes(pem(ONE))
    (tmp_path / "a.crt").write_bytes(pem(TWO, THREE))
    (tmp_path / "README").write_bytes(b"no certificate")
    assert read_certificates(tmp_path, "roots") == [TWO, THREE, ONE]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "has no certificate"), (b"no PEM", "has no certificate"), (bytes(MAX_FILE_BYTES + 1), "more than")],
)
def test_refused_when_one_file_is_no_certificate(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.pem").write_bytes(pem(ONE))
    (tmp_path / "b.pem").write_bytes(content)
    with pytest.raises(UsageError, match=why):
        read_certificates(tmp_path, "roots")


def test_refused_when_there_are_none_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of roots has 0 files"):
        read_certificates(tmp_path, "roots")
    with pytest.raises(UsageError, match="of roots cannot be read: No such file"):
        read_certificates(tmp_path / "none", "roots")
    (tmp_path / "a.pem").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_certificates(tmp_path, "roots")
