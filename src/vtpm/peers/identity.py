"""This host on the channel to its peers: a TLS key and a certificate by itself, which operators carry to the peers.

The key is made once and kept encrypted; nobody has to trust its certificate for more than being this very one. What the
host *is*, its platform TPM proves over this channel, with both ends' keys in what it signs.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from vtpm.durable_file import read_file, replace_file
from vtpm.errors import StateError, UsageError
from vtpm.secret import Secret

KEY_FILE = "channel.key"
CERTIFICATE_FILE = "channel.pem"
MAX_CERTIFICATE_BYTES = 16 * 1024
_MAX_KEY_BYTES = 16 * 1024
_LIFE = timedelta(days=3650)
_SKEW = timedelta(days=1)
_ALPN = ["http/1.1"]
_ANEW = "Move both files away to have new ones made, and add this host's new certificate at its peers"


def public_key_of(certificate_pem: str) -> bytes:
    """Return the SubjectPublicKeyInfo, DER, of a certificate. Raises UsageError: it is none."""
    return _read(certificate_pem).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def der_of(certificate_pem: str) -> bytes:
    """Return a certificate as it comes over TLS. Raises UsageError: it is none."""
    return _read(certificate_pem).public_bytes(Encoding.DER)


def plain_pem(certificate_pem: str) -> str:
    """Return a certificate without what else a PEM file may have. Raises UsageError: it is none."""
    return _read(certificate_pem).public_bytes(Encoding.PEM).decode()


def _read(certificate_pem: str) -> x509.Certificate:
    try:
        (certificate,) = x509.load_pem_x509_certificates(certificate_pem.encode())
        # Reads what it says of its key, which loading alone does not.
        certificate.public_key()
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise UsageError(
            "this is not exactly one certificate in PEM", next_step="Take what `vtpm peer certificate` prints there"
        ) from error
    return certificate


@dataclass(frozen=True)
class HostIdentity:
    """See the module.

    Args:
        certificate: PEM.
        public_key: SubjectPublicKeyInfo, DER.
        folder: has both files.
        secret: that the key is encrypted with.
    """

    certificate: str
    public_key: bytes
    folder: Path
    secret: Secret = field(repr=False)

    def server_context(self) -> ssl.SSLContext:
        """Return a context for those who connect here; it trusts nobody yet (see `trust`). Raises StateError."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        # No session is resumed: each connection shows its certificate.
        context.num_tickets = 0
        return context

    def client_context(self, certificate: str) -> ssl.SSLContext:
        """Return a context for connecting to the one host that has this certificate, PEM. Raises StateError."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        # It is this very certificate, or none: names say nothing.
        context.check_hostname = False
        trust(context, certificate)
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        # It is looked up as it is. Else its issuer is looked for by name, and of two hosts of one name one fails.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.set_alpn_protocols(_ALPN)
        key_path = self.folder / KEY_FILE
        try:
            context.load_cert_chain(
                os.fspath(self.folder / CERTIFICATE_FILE), os.fspath(key_path), password=_password(self.secret).decode()
            )
        except OSError as error:
            raise StateError(
                f"{key_path} and its certificate do not open any more: {error}", next_step=_ANEW
            ) from error
        return context


def trust(context: ssl.SSLContext, certificate: str) -> None:
    """Let a context take one more certificate, PEM, for good."""
    # DER: what else a PEM file has is read by other rules there than here.
    context.load_verify_locations(cadata=der_of(certificate))


def open_identity(folder: Path, name: str, secret: Secret) -> HostIdentity:
    """Return this host's identity; make it if it was never made. Blocks.

    Args:
        folder: exists, and is this user's alone.
        name: for people who look at the certificate.
        secret: that the key is, or will be, encrypted with.
    Raises:
        StateError: the key does not open, or certificate and key do not fit; nothing was changed.
        StoreError: they cannot be made durable.
    """
    key_path, certificate_path = folder / KEY_FILE, folder / CERTIFICATE_FILE
    sealed = read_file(key_path, "key of the channel", _MAX_KEY_BYTES)
    written = read_file(certificate_path, "certificate of the channel", MAX_CERTIFICATE_BYTES)
    if sealed is None and written is not None:
        raise StateError(f"{key_path} is missing, and its certificate is there", next_step=_ANEW)
    if sealed is None:
        key = ec.generate_private_key(ec.SECP256R1())
        encryption = BestAvailableEncryption(_password(secret))
        replace_file(key_path, "key of the channel", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    else:
        key = _opened(key_path, sealed, secret)
    public_key = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if written is None:
        written = _certificate(name, key).public_bytes(Encoding.PEM)
        replace_file(certificate_path, "certificate of the channel", written)
    try:
        certificate = written.decode()
        fits = public_key_of(certificate) == public_key
    except (UsageError, UnicodeDecodeError):
        fits = False
    if not fits:
        raise StateError(f"{certificate_path} is not the certificate of {key_path}", next_step=_ANEW)
    return HostIdentity(certificate, public_key, folder, secret)


def _opened(path: Path, sealed: bytes, secret: Secret) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(sealed, _password(secret))
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"{path} does not open: it is damaged, or of another root key", next_step=_ANEW)
    return key


def _password(secret: Secret) -> bytes:
    return secret.reveal().hex().encode()


def _certificate(name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
        # It vouches for nobody else.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
