"""The key and certificate of a host: made once, kept encrypted, refused when anything about them is not as it was."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tests.unit.peers.hosts import SECRET, made
from vtpm.errors import StateError, StoreError, UsageError
from vtpm.peers.identity import (
    CERTIFICATE_FILE,
    KEY_FILE,
    HostIdentity,
    der_of,
    open_identity,
    plain_pem,
    public_key_of,
    trust,
)
from vtpm.secret import Secret

PASSWORD = SECRET.reveal().hex().encode()


@pytest.fixture
def identity(tmp_path: Path) -> HostIdentity:
    return open_identity(tmp_path, "a", SECRET)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_identity_is_the_same_when_it_is_opened_again(tmp_path: Path, identity: HostIdentity) -> None:
    before = contents(tmp_path)
    assert before.keys() == {KEY_FILE, CERTIFICATE_FILE}
    assert open_identity(tmp_path, "another name", SECRET) == identity
    assert contents(tmp_path) == before
    assert public_key_of(identity.certificate) == identity.public_key


def test_files_are_their_users_alone_and_have_no_plain_key_when_made(tmp_path: Path, identity: HostIdentity) -> None:
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    sealed = (tmp_path / KEY_FILE).read_bytes()
    assert sealed.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    key = load_pem_private_key(sealed, PASSWORD)
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    everything = b"".join(contents(tmp_path).values())
    assert private not in everything
    assert PASSWORD not in everything
    for plain in (SECRET.reveal().hex(), repr(SECRET.reveal())):
        assert plain not in repr(identity)


def test_certificate_vouches_for_nobody_else_when_made(identity: HostIdentity) -> None:
    certificate = x509.load_pem_x509_certificate(identity.certificate.encode())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.issuer == certificate.subject


def test_certificate_is_made_anew_for_the_key_when_a_crash_left_the_key_alone(
    tmp_path: Path, identity: HostIdentity
) -> None:
    (tmp_path / CERTIFICATE_FILE).unlink()
    again = open_identity(tmp_path, "a", SECRET)
    assert again.public_key == identity.public_key
    assert again.certificate != identity.certificate


def test_identity_is_refused_and_left_when_the_key_is_missing(tmp_path: Path, identity: HostIdentity) -> None:
    (tmp_path / KEY_FILE).unlink()
    before = contents(tmp_path)
    with pytest.raises(StateError, match=r"channel\.key is missing") as refused:
        open_identity(tmp_path, "a", SECRET)
    assert "Move both files away" in refused.value.next_step
    assert contents(tmp_path) == before


def plain_key(sealed: bytes) -> bytes:
    return load_pem_private_key(sealed, PASSWORD).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def other_kind_of_key(_: bytes) -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD))


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"not a key",
        lambda sealed: sealed[: len(sealed) // 2],
        lambda sealed: sealed.replace(b"\nM", b"\nN", 1),
        plain_key,
        other_kind_of_key,
    ],
    ids=["empty", "noise", "cut", "changed", "not encrypted", "of another kind"],
)
def test_identity_is_refused_and_left_when_the_key_is_damaged(
    tmp_path: Path, identity: HostIdentity, damage: type[bytes]
) -> None:
    path = tmp_path / KEY_FILE
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(StateError, match=r"channel\.key does not open"):
        open_identity(tmp_path, "a", SECRET)
    assert contents(tmp_path) == before


def test_identity_is_refused_when_the_secret_is_another(tmp_path: Path, identity: HostIdentity) -> None:
    with pytest.raises(StateError, match="of another root key"):
        open_identity(tmp_path, "a", Secret(b"l" * 32))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", made("a").pem.encode()], ids=["empty", "noise", "of another key"]
)
def test_identity_is_refused_when_the_certificate_is_not_of_its_key(
    tmp_path: Path, identity: HostIdentity, content: bytes
) -> None:
    (tmp_path / CERTIFICATE_FILE).write_bytes(content)
    with pytest.raises(StateError, match=r"channel\.pem is not the certificate of"):
        open_identity(tmp_path, "a", SECRET)


def test_identity_is_refused_when_a_link_is_in_the_place_of_the_key(tmp_path: Path, identity: HostIdentity) -> None:
    key = tmp_path / KEY_FILE
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="cannot be read"):
        open_identity(tmp_path, "a", SECRET)


def test_no_identity_is_given_out_when_it_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="key of the channel"):
        open_identity(tmp_path / "none", "a", SECRET)


PEM = made("a").pem


@pytest.mark.parametrize(
    "text",
    ["", "noise", PEM + PEM, PEM[:-40], PEM.replace("M", "N", 1), "\ud800" + PEM],
    ids=["nothing", "noise", "two", "cut", "changed", "not text"],
)
def test_certificate_is_refused_when_it_is_not_exactly_one(text: str) -> None:
    for read in (der_of, public_key_of, plain_pem):
        with pytest.raises(UsageError, match="not exactly one certificate"):
            read(text)


def test_certificate_is_refused_when_its_key_is_of_no_known_kind() -> None:
    """One of the curve secp256k1's arcs that nobody has given out."""
    der = der_of(PEM)
    curve = bytes.fromhex("06082a8648ce3d030107")
    assert der.count(curve) == 1
    odd = ssl.DER_cert_to_PEM_cert(der.replace(curve, curve[:-1] + b"\x7f"))
    kind = bytes.fromhex("06072a8648ce3d0201")
    unknown = ssl.DER_cert_to_PEM_cert(der.replace(kind, kind[:-1] + b"\x7f"))
    for text in (odd, unknown):
        with pytest.raises(UsageError, match="not exactly one certificate"):
            public_key_of(text)


def test_nobody_else_is_trusted_when_the_file_has_more_than_a_certificate() -> None:
    """OpenSSL reads blocks that others pass over."""
    other = made("b", ca=True).pem.replace("CERTIFICATE", "TRUSTED CERTIFICATE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, "# für a\n" + PEM + other)
    assert context.get_ca_certs(binary_form=True) == []
    assert context.cert_store_stats()["x509"] == 1
    assert plain_pem("# für a\n" + PEM + other) == PEM


def test_contexts_take_nothing_but_tls_1_3_with_certificates(identity: HostIdentity) -> None:
    server, client = identity.server_context(), identity.client_context(PEM)
    for context in (server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
    assert server.cert_store_stats()["x509"] == 0
    assert server.num_tickets == 0
    assert client.cert_store_stats()["x509"] == 1
