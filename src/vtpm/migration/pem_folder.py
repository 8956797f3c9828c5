"""Certificates that an operator trusts: a folder of files in PEM, read anew at each use. Pure but for reading."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from vtpm.errors import UsageError

MAX_FILES = 256
MAX_FILE_BYTES = 64 * 1024
SUFFIXES = (".pem", ".crt")


def read_certificates(folder: Path, what: str) -> list[x509.Certificate]:
    """Return the certificates in a folder's files of these suffixes, in the order of their names.

    Args:
        what: they are, for errors, such as "enrolment authorities".
    Raises:
        UsageError: the folder or a file cannot be read, is no PEM or is too large, or there are none.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError as error:
        raise UsageError(
            f"the folder {folder} of {what} cannot be read: {error.strerror}",
            next_step="Make it, with their certificates in PEM",
        ) from error
    if not paths or len(paths) > MAX_FILES:
        raise UsageError(
            f"the folder {folder} of {what} has {len(paths)} files *.pem and *.crt, not 1 to {MAX_FILES}",
            next_step="Put their certificates there, in PEM",
        )
    return [certificate for path in paths for certificate in _read(path)]


def _read(path: Path) -> list[x509.Certificate]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the certificate {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"the certificate {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        return x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise UsageError(f"{path} has no certificate in PEM, or a damaged one: {error}") from error
