"""The host's peers as operators name them and migrations find them, and the port that they use. The manager's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from vtpm.errors import VtpmError
from vtpm.manager.access import Caller
from vtpm.manager.conversations import Party
from vtpm.manager.migrations import MigrationService
from vtpm.manager.noted import Note, noted
from vtpm.migration.mover import Channel
from vtpm.peers.book import Book, Peer, new_peer
from vtpm.peers.client import PeerClient
from vtpm.peers.identity import HostIdentity, open_identity
from vtpm.peers.server import PeerServer
from vtpm.secret import Secret
from vtpm.tpm.types import VtpmId
from vtpm.wire.api_peers import AddPeer, HostCertificate, PeerInfo
from vtpm.wire.keeper_client import KeeperClient

RETRY_S = 5.0
"""How long a port stays closed whose key does not open: the keeper may have no root key yet."""
_log = logging.getLogger("vtpm.manager")


class Peering:
    """See the module.

    Args:
        folder: of peers and of this host's key.
        keeper: has the key that this host's is encrypted with; asked in one of the loop's threads.
        note: appends to the audit log.
    """

    def __init__(self, folder: Path, keeper: KeeperClient, note: Note) -> None:
        self._folder = folder
        self._keeper = keeper
        self._note = note
        self._book = Book(folder)
        self._opening = asyncio.Lock()
        self._identity: HostIdentity | None = None

    # -- what operators ask ------------------------------------------------------------------------------------------
    async def certificate(self, caller: Caller) -> HostCertificate:
        """Return this host's own certificate, which its peers need."""
        caller.require_admin("see this host's certificate")
        return HostCertificate((await self._opened()).certificate)

    async def list(self, caller: Caller) -> Sequence[PeerInfo]:
        """Return the peers, by name."""
        caller.require_admin("see this host's peers")
        return [_info(peer) for peer in await asyncio.to_thread(self._book.list)]

    async def add(self, wanted: AddPeer, caller: Caller) -> PeerInfo:
        """Name a peer, or change where it is or what it shows."""
        caller.require_admin("name peers")
        peer = new_peer(wanted.name, wanted.url, wanted.certificate)
        async with noted(self._note, caller, "peer_add", "peer_added", name=peer.name, url=peer.url):
            await asyncio.to_thread(self._book.add, peer)
        return _info(peer)

    async def remove(self, name: str, caller: Caller) -> None:
        """Name a peer no more: it is not talked to, and not let in."""
        caller.require_admin("remove peers")
        async with noted(self._note, caller, "peer_remove", "peer_removed", name=name[:80]):
            await asyncio.to_thread(self._book.remove, name)

    # -- what migrations ask -----------------------------------------------------------------------------------------
    async def find(self, name: str) -> Party:
        """See migrations.Parties. Raises NotFoundError, StateError, UnavailableError, PlatformTpmError."""
        peer = await asyncio.to_thread(self._book.find, name)
        identity = await self._opened()
        client = PeerClient(identity)

        async def exchange(vtpm_id: VtpmId, message: bytes) -> Sequence[bytes]:
            return await client.exchange(peer, vtpm_id, message)

        return Party(peer.name, Channel(identity.public_key, peer.public_key), exchange)

    async def serve(self, listener: socket.socket, migrations: MigrationService) -> None:
        """Let peers in, once this host's key opens, until cancelled."""
        with contextlib.closing(listener):
            await self._serve(listener, migrations)

    async def _serve(self, listener: socket.socket, migrations: MigrationService) -> None:
        identity = await self._until_opened()

        async def handle(peer: Peer, vtpm_id: UUID, message: bytes) -> Sequence[bytes]:
            channel = Channel(identity.public_key, peer.public_key)
            return await migrations.receive(peer.name, VtpmId(vtpm_id), message, channel)

        _log.info("peers are let in at %s:%d", *listener.getsockname()[:2])
        await PeerServer(listener, identity, self._book, handle).serve()

    async def _until_opened(self) -> HostIdentity:
        said = ""
        while True:
            try:
                return await self._opened()
            except VtpmError as error:
                if error.message != said:
                    _log.warning("peers are not let in yet: %s", error)
                said = error.message
                await asyncio.sleep(RETRY_S)

    async def _opened(self) -> HostIdentity:
        async with self._opening:
            if self._identity is None:
                self._identity = await asyncio.to_thread(self._open)
            return self._identity

    def _open(self) -> HostIdentity:
        return open_identity(self._folder, socket.gethostname() or "vtpm", Secret(self._keeper.channel_key()))


def _info(peer: Peer) -> PeerInfo:
    return PeerInfo(peer.name, peer.url, peer.fingerprint)
