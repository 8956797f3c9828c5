"""The certificate of this host's platform, as the manager keeps it beside the vault. The manager's alone.

It is no secret, and whoever verifies it trusts its authority; so it is kept as it is. Blocking.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.x509.oid import NameOID

from vtpm.durable_file import read_file, replace_file
from vtpm.errors import AttestationError, NotFoundError, ProtocolError, StateError
from vtpm.migration.certificates import read_certified
from vtpm.tpm.attest import read_signing_key
from vtpm.wire.api_platform import EnrolledPlatform
from vtpm.wire.evidence import MAX_CERTIFICATE_BYTES, MAX_PUBLIC_BYTES
from vtpm.wire.service import MaxLength
from vtpm.wire.service_codec import codec_of

FILE = "enrolled.json"
MAX_FILE_BYTES = 16 * 1024
ENROLL = "Enrol it: vtpm platform enroll --name NAME"
_WHAT = "platform's certificate"
_VERSION = 1


@dataclass(frozen=True)
class Enrolled:
    """What is kept.

    Args:
        certificate: DER.
        attestation_key: that it is of, TPMT_PUBLIC.
        version: of the file.
    """

    certificate: Annotated[bytes, MaxLength(MAX_CERTIFICATE_BYTES)]
    attestation_key: Annotated[bytes, MaxLength(MAX_PUBLIC_BYTES)]
    version: int = _VERSION

    def shown(self) -> EnrolledPlatform:
        """Return what the certificate says. Raises AttestationError: it is not of the key, or malformed."""
        key = read_signing_key(self.attestation_key)
        said = read_certified(self.certificate, key)
        read = x509.load_der_x509_certificate(self.certificate)
        issuers = read.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        return EnrolledPlatform(
            said.name,
            said.kind.value,
            key.name.hex(),
            read.not_valid_after_utc.isoformat(),
            str(issuers[0].value) if issuers else "",
        )


def keep(folder: Path, enrolled: Enrolled) -> None:
    """Keep it in the place of an earlier one. Raises StoreError: it is not durable."""
    replace_file(folder / FILE, _WHAT, json.dumps(codec_of(Enrolled).encode(enrolled)).encode("ascii"))


def kept(folder: Path) -> Enrolled:
    """Return what is kept.

    Raises:
        NotFoundError: this platform is not enrolled.
        StateError: the file is damaged, of another version, or cannot be read.
    """
    data = read_file(folder / FILE, _WHAT, MAX_FILE_BYTES)
    if data is None:
        raise NotFoundError("this host's platform is not enrolled", next_step=ENROLL)
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ProtocolError("it is too large")
        enrolled: Enrolled = codec_of(Enrolled).decode(json.loads(data))
        if enrolled.version != _VERSION:
            raise ProtocolError(f"it is of version {enrolled.version}")
        enrolled.shown()
    except (ValueError, RecursionError, ProtocolError, AttestationError) as error:
        raise StateError(f"the {_WHAT} {folder / FILE} is damaged: {error}", next_step=ENROLL) from error
    return enrolled
