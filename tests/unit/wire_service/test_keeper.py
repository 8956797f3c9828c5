"""The keeper's typed client gives what a service of that interface answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from vtpm.errors import StateError, UnavailableError
from vtpm.tpm.types import VtpmId
from vtpm.wire.keeper import KEEPER, KEEPER_SOCKET, KeeperStatus, Key, NewKey, PlatformKind, Protection
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.packet_socket import AsyncPacketServer, Peer, ServiceLock

pytestmark = pytest.mark.timeout(20)
ID = VtpmId(UUID("6ad77c2a-96b5-4b26-8c8d-2f9ba4e8a4fe"))
OTHER_ID = VtpmId(UUID("00000000-0000-4000-8000-000000000000"))
KEY = bytes(range(32))
STATUS = KeeperStatus(
    kind=PlatformKind.EMBEDDED,
    tcti="swtpm:path=x",
    manufacturer="IBM",
    pcr_selection="sha256:0,2,4,7",
    protection=Protection.UNPROTECTED,
    reachable=True,
    locked="",
    locked_next_step="",
    recovery="",
    recovery_unnoted="",
    anchor_writes=0,
    resets=0,
    warnings=("The embedded TPM protects nothing",),
)


async def handle(op: str, args: Any, fds: tuple[int, ...], peer: Peer) -> tuple[Any, Sequence[int]]:
    if op == "status":
        return STATUS, ()
    if op == "new_key":
        return NewKey(b"wrapped" + args.vtpm_id.bytes, KEY), ()
    if args.wrapped != b"wrapped" + args.vtpm_id.bytes:
        raise StateError(f"the wrapped key is not that of vTPM {args.vtpm_id}")
    return Key(KEY), ()


def test_client_gives_what_the_keeper_answers_when_it_runs(tmp_path: Path) -> None:
    def use() -> None:
        client = KeeperClient(tmp_path, timeout_s=5)
        assert client.status() == STATUS
        made = client.new_key(ID)
        assert made.key == KEY
        assert client.unwrap_key(ID, made.wrapped) == Key(KEY)
        with pytest.raises(StateError, match="is not that of"):
            client.unwrap_key(OTHER_ID, made.wrapped)
        client.close()
        assert client.status() == STATUS
        client.close()

    async def test() -> None:
        lock = ServiceLock(tmp_path, "keeper")
        server = AsyncPacketServer(KEEPER, handle, lambda _uid: True)
        server.serve(lock.bind_service_socket(tmp_path / KEEPER_SOCKET, 0o600))
        await asyncio.to_thread(use)
        await server.close()
        lock.release()

    asyncio.run(test())


def test_client_says_so_when_there_is_no_keeper(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="vtpm-keeper does not answer"):
        KeeperClient(tmp_path).status()
