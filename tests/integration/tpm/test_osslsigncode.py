"""Debian's osslsigncode computes the same Authenticode digests, of files that machines boot."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support.guest import build_image
from tests.support.guest.unified_kernel import EFI_STUB, write_boot_folder
from vtpm.tpm.authenticode import authenticode_digest
from vtpm.tpm.hash_algorithms import HashAlgorithm

SYSTEMD_BOOT = EFI_STUB.with_name("systemd-bootx64.efi")
_CALCULATED = re.compile(r"^Calculated message digest : ([0-9A-F]+) *$", re.MULTILINE)
_LIMIT_S = 60


def calculated_digest(signed: Path) -> str:
    """What osslsigncode computes anew of a signed image, in the hash of its signature."""
    # Its status says whether the signer is trusted, which nobody asks here.
    arguments = ["osslsigncode", "verify", "-in", str(signed)]
    report = subprocess.run(arguments, capture_output=True, text=True, timeout=_LIMIT_S, check=False).stdout
    matches = _CALCULATED.findall(report)
    assert len(matches) == 1, report
    return str(matches[0]).lower()


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of nobody."""
    folder = tmp_path_factory.mktemp("signer")
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate_file, key_file


def sign(image: Path, signed: Path, algorithm: HashAlgorithm, signer: tuple[Path, Path]) -> None:
    certificate, key = signer
    arguments = [
        *("osslsigncode", "sign", "-h", algorithm, "-certs", str(certificate), "-key", str(key)),
        *("-in", str(image), "-out", str(signed)),
    ]
    subprocess.run(arguments, capture_output=True, timeout=_LIMIT_S, check=True)


def test_digest_is_that_of_osslsigncode_when_debian_signed_the_kernel() -> None:
    kernel = build_image().kernel
    assert authenticode_digest(kernel.read_bytes(), HashAlgorithm.SHA256).hex() == calculated_digest(kernel)


@pytest.mark.parametrize("algorithm", [HashAlgorithm.SHA256, HashAlgorithm.SHA384])
@pytest.mark.parametrize("image", [EFI_STUB, SYSTEMD_BOOT], ids=["stub", "boot"])
def test_digest_is_that_of_osslsigncode_when_it_signed_the_image(
    image: Path, algorithm: HashAlgorithm, signer: tuple[Path, Path], tmp_path: Path
) -> None:
    signed = tmp_path / "signed.efi"
    sign(image, signed, algorithm, signer)
    expected = calculated_digest(signed)
    assert authenticode_digest(signed.read_bytes(), algorithm).hex() == expected
    # Before it was signed, the image was the same, but for the padding that signing adds.
    content = image.read_bytes()
    assert authenticode_digest(content + bytes(-len(content) % 8), algorithm).hex() == expected


def test_digest_is_that_of_osslsigncode_when_image_is_a_unified_kernel(
    signer: tuple[Path, Path], tmp_path: Path
) -> None:
    unified = write_boot_folder(tmp_path / "disk", build_image())
    signed = tmp_path / "signed.efi"
    sign(unified, signed, HashAlgorithm.SHA384, signer)
    assert authenticode_digest(signed.read_bytes(), HashAlgorithm.SHA384).hex() == calculated_digest(signed)
