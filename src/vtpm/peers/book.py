"""The hosts that an operator has named as peers, one file each: name, place, and the certificate that it shows."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from vtpm.durable_file import read_file, replace_file, sync_directory
from vtpm.errors import ConflictError, NotFoundError, StateError, StoreError, UsageError
from vtpm.peers.identity import MAX_CERTIFICATE_BYTES, der_of, plain_pem, public_key_of
from vtpm.wire.names import is_name

MAX_PEERS = 100
MAX_URL_CHARS = 300
_VERSION = 1
_SUFFIX = ".json"
_MAX_FILE_BYTES = 4 * MAX_CERTIFICATE_BYTES
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True)
class Peer:
    """One of them.

    Args:
        name: of its platform, as the enrolment authority's certificate has it.
        url: https://HOST:PORT.
        certificate: PEM; it is this very one that it shows.
    """

    name: str
    url: str
    certificate: str

    @property
    def public_key(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        return public_key_of(self.certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, DER, in hex."""
        return hashlib.sha256(der_of(self.certificate)).hexdigest()


def new_peer(name: str, url: str, certificate: str) -> Peer:
    """Return a peer of what an operator wrote. Raises UsageError: it is not of the form above."""
    if not is_name(name):
        raise UsageError(
            f"{name[:80]!r} is not a name for a peer",
            next_step="Use 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    try:
        parts = urlsplit(url)
        port = parts.port
        # By the rules of what will connect there too: of numbers, lengths, and names in other letters.
        _ = httpx.URL(url).host
    except (ValueError, httpx.InvalidURL):
        parts, port = urlsplit(""), None
    host = parts.netloc.rpartition(":")[0]
    if url != f"https://{host}:{port}" or not _HOST.fullmatch(host) or not port or len(url) > MAX_URL_CHARS:
        raise UsageError(f"{url[:80]!r} is not https://HOST:PORT", next_step="Give its migration_address in that form")
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise UsageError(f"a certificate has at most {MAX_CERTIFICATE_BYTES} bytes")
    return Peer(name, url, plain_pem(certificate))


class Book:
    """See the module. Blocks; read anew whenever it is asked.

    Args:
        folder: exists, and is this user's alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._adding = threading.Lock()

    def list(self) -> Sequence[Peer]:
        """Return all, by name. Raises StateError: a file is damaged; it is named."""
        try:
            names = sorted(path.stem for path in self._folder.iterdir() if path.suffix == _SUFFIX)
        except OSError as error:
            raise StateError(f"the peers in {self._folder} cannot be read: {error.strerror}") from error
        return [peer for name in names if (peer := self._read(name)) is not None]

    def find(self, name_or_url: str) -> Peer:
        """Return one by its name or URL. Raises NotFoundError: there is none. StateError: a file is damaged."""
        for peer in self.list():
            if name_or_url in (peer.name, peer.url, f"{peer.url}/"):
                return peer
        raise NotFoundError(f"there is no peer {name_or_url[:80]!r}", next_step="Name it with vtpm peer add")

    def of_certificate(self, der: bytes) -> Peer | None:
        """Return the one that shows this certificate, or None. Raises StateError: a file is damaged."""
        return next((peer for peer in self.list() if der_of(peer.certificate) == der), None)

    def add(self, peer: Peer) -> None:
        """Add one, or put it in the place of what is there under its name.

        Raises:
            ConflictError: there are as many as there can be, or another has its URL or certificate.
            StateError: a file is damaged. StoreError: it is not durable.
        """
        with self._adding:
            others = [other for other in self.list() if other.name != peer.name]
            if len(others) >= MAX_PEERS:
                raise ConflictError(f"this host has {len(others)} peers, and can have no more")
            for other in others:
                if peer.url == other.url or der_of(peer.certificate) == der_of(other.certificate):
                    raise ConflictError(f"peer {other.name} has that URL or certificate already")
            content = {"version": _VERSION, "name": peer.name, "url": peer.url, "certificate": peer.certificate}
            replace_file(self._path(peer.name), "peer", json.dumps(content, indent=1).encode())

    def remove(self, name: str) -> None:
        """Forget one. Raises NotFoundError: there is none. StoreError: it may come back after a crash."""
        if not is_name(name):
            raise NotFoundError(f"there is no peer {name[:80]!r}")
        try:
            self._path(name).unlink()
            sync_directory(self._folder)
        except FileNotFoundError:
            raise NotFoundError(f"there is no peer {name}") from None
        except OSError as error:
            raise StoreError(f"peer {name} cannot be removed: {error.strerror}") from error

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"

    def _read(self, name: str) -> Peer | None:
        path = self._path(name)
        data = read_file(path, "peer", _MAX_FILE_BYTES)
        if data is None:
            return None
        try:
            content = json.loads(data) if len(data) <= _MAX_FILE_BYTES else None
            if not isinstance(content, dict) or content.keys() != {"version", "name", "url", "certificate"}:
                raise UsageError("it has not the members of a peer")
            if content["version"] != _VERSION or content["name"] != name:
                raise UsageError(f"it is of version {content['version']!r}, or of another peer")
            texts = [content["name"], content["url"], content["certificate"]]
            if not all(isinstance(text, str) for text in texts):
                raise UsageError("it has not the members of a peer")
            return new_peer(*texts)
        except (ValueError, RecursionError, UsageError) as error:
            raise StateError(
                f"the peer in {path} is damaged: {error}", next_step="Remove the file, and add the peer again"
            ) from error
