"""Commands of an enrolment authority: authority new, certify. They need no manager, and belong on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtpm.cli.files import NewFile, read_bytes, read_text
from vtpm.cli.output import Output, print_fields, print_json, print_message
from vtpm.cli.session import Session, json_option, pass_session
from vtpm.errors import StateError, UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    from vtpm.migration.certificates import PlatformKind
    from vtpm.migration.enrolment import EnrolmentRequest

KEY_FILE = "authority.key"
CERTIFICATE_FILE = "authority.pem"
MIN_PASSPHRASE_CHARS = 12
_MAX_PEM_BYTES = 64 * 1024
_PATH = click.Path(path_type=Path)
_passphrase_option = click.option(
    "--passphrase-file", type=_PATH, metavar="FILE", help="Holds the passphrase that the authority's key is under."
)


@click.group()
def authority() -> None:
    """Enrol platforms: certify what a host's platform TPM is.

    Whoever trusts an authority's certificate believes it which platforms are whose, and which are hardware.
    """


@authority.command()
@click.argument("folder", type=_PATH, metavar="DIR")
@click.option("--name", required=True, help="Its name in the certificates.")
@_passphrase_option
@json_option
@pass_session
def new(session: Session, folder: Path, name: str, passphrase_file: Path | None) -> None:
    """Make an authority in the folder DIR: its key, and the certificate for whoever is to trust it."""
    _hold_a_key()
    from datetime import UTC, datetime

    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    from vtpm.migration.certificates import new_authority

    passphrase = _passphrase(passphrase_file)
    if passphrase is not None and len(passphrase.decode()) < MIN_PASSPHRASE_CHARS:
        raise UsageError(f"a passphrase has {MIN_PASSPHRASE_CHARS} characters at least", next_step="Use several words")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = new_authority(name, key, datetime.now(UTC))
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}") from error
    # The key last: an authority whose certificate was lost could not be told from one that was never made.
    with NewFile(folder / KEY_FILE) as key_file, NewFile(folder / CERTIFICATE_FILE) as certificate_file:
        certificate_file.fill(certificate.public_bytes(Encoding.PEM))
        key_file.fill(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    if session.output is Output.JSON:
        print_json({"name": name, "certificate": str(folder / CERTIFICATE_FILE), "encrypted": passphrase is not None})
        return
    print_fields([("name", name), ("key", str(folder / KEY_FILE)), ("certificate", str(folder / CERTIFICATE_FILE))])
    if passphrase is None:
        print_message("the key is not encrypted: keep the folder off every host that it enrols")


@authority.command()
@click.argument("folder", type=_PATH, metavar="DIR")
@click.argument("request", type=_PATH)
@click.option("--out", type=_PATH, required=True, metavar="FILE", help="A new file for the sealed certificate.")
@click.option("--name", required=True, help="The platform's name: what you know that host by, not what it says.")
@click.option("--ek-roots", type=_PATH, metavar="DIR", help="Folder of TPM manufacturers' certificates, in PEM.")
@click.option("--ek", metavar="SHA256", help="The endorsement key, as `vtpm platform enroll` printed it on that host.")
@click.option("--embedded", is_flag=True, help="Certify it as a platform without a hardware TPM.")
@_passphrase_option
@json_option
@pass_session
def certify(
    session: Session,
    folder: Path,
    request: Path,
    out: Path,
    name: str,
    ek_roots: Path | None,
    ek: str | None,
    embedded: bool,
    passphrase_file: Path | None,
) -> None:
    """Certify the platform that made the file REQUEST, by the authority in the folder DIR.

    What is written opens in that platform's TPM alone. It is certified as hardware by its manufacturer's word
    (--ek-roots: it is some TPM of theirs) or by yours (--ek: it is the one that you saw on that host); else as
    --embedded, which peers refuse unless their policy says otherwise.
    """
    _hold_a_key()
    from datetime import UTC, datetime

    from vtpm.migration.enrolment import (
        MAX_FILE_BYTES,
        certify_request,
        decode_request,
        encode_file,
        endorsement_fingerprint,
    )

    if [ek_roots is not None, ek is not None, embedded].count(True) != 1:
        raise UsageError(
            "what is the platform? give one of --ek-roots, --ek and --embedded",
            next_step="See vtpm authority certify --help",
        )
    asked = decode_request(read_bytes("request", request, MAX_FILE_BYTES))
    if asked.name != name:
        raise UsageError(
            f"{request} asks for the name {asked.name!r}, not for {name!r}: nothing was certified",
            next_step="Peers believe that a platform is the host of its name: certify only what that host has made",
        )
    now = datetime.now(UTC)
    kind = _kind(asked, ek_roots, ek, now)
    certificate, key = _open(folder, _passphrase(passphrase_file))
    with NewFile(out) as file:
        file.fill(encode_file(certify_request(certificate, key, asked, kind, now)))
    shown = {"name": asked.name, "kind": kind.value, "ek": endorsement_fingerprint(asked), "file": str(out)}
    if session.output is Output.JSON:
        print_json(shown)
        return
    print_fields(list(shown.items()))
    print_message(f"on that host: vtpm platform enroll --certificate {out.name}")


def _kind(asked: EnrolmentRequest, ek_roots: Path | None, ek: str | None, now: object) -> PlatformKind:
    from datetime import datetime

    from vtpm.migration.certificates import PlatformKind
    from vtpm.migration.enrolment import kind_by_fingerprint, kind_by_manufacturer
    from vtpm.migration.pem_folder import read_certificates

    assert isinstance(now, datetime)
    if ek is not None:
        return kind_by_fingerprint(asked, ek)
    if ek_roots is not None:
        return kind_by_manufacturer(asked, read_certificates(ek_roots, "TPM manufacturers"), now)
    return PlatformKind.EMBEDDED


def _open(folder: Path, passphrase: bytes | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_bytes("authority's key", folder / KEY_FILE, _MAX_PEM_BYTES), passphrase)
    except (ValueError, TypeError):
        # Its own message says more of the key than is anybody's business.
        raise StateError(
            f"the authority's key {folder / KEY_FILE} does not open",
            next_step="Give its passphrase with --passphrase-file, and none if it has none",
        ) from None
    data = read_bytes("authority's certificate", folder / CERTIFICATE_FILE, _MAX_PEM_BYTES)
    try:
        (certificate,) = x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError) as error:
        raise StateError(f"{folder / CERTIFICATE_FILE} is not exactly one certificate: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise StateError(f"the authority's key and its certificate in {folder} do not belong together")
    return certificate, key


def _passphrase(path: Path | None) -> bytes | None:
    return None if path is None else read_text("passphrase", path).encode()


def _hold_a_key() -> None:
    """No core dump of this process, and no debugger, from here on."""
    from vtpm.confine.service import forbid_core_dumps

    forbid_core_dumps()
