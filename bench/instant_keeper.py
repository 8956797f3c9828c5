"""A keeper whose platform TPM takes no time, for measuring what a save costs beside it. It protects nothing.

`python -m bench.instant_keeper RUN_DIR` says "ready" on stdout when it serves, and ends when a client asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtpm.wire.keeper import (
    DIGEST_BYTES,
    KEEPER,
    KEEPER_SOCKET,
    VTPM_KEY_BYTES,
    AnchorState,
    KeeperStatus,
    Key,
    NewKey,
    NoArgs,
    PlatformKind,
    Protection,
)
from vtpm.wire.packet_socket import AsyncPacketServer, Peer
from vtpm.wire.unix_socket import bind_unix_socket

_STATUS = KeeperStatus(
    kind=PlatformKind.EMBEDDED,
    tcti="none",
    manufacturer="none",
    pcr_selection="none",
    protection=Protection.UNPROTECTED,
    reachable=True,
    locked="",
    locked_next_step="",
    recovery="",
    recovery_unnoted="",
    anchor_writes=0,
    resets=0,
    warnings=(),
)


@contextlib.contextmanager
def instant_keeper(run_dir: Path) -> Iterator[None]:
    """Have one serve in a run directory, before a manager starts its own."""
    process = subprocess.Popen([sys.executable, "-m", "bench.instant_keeper", run_dir], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the instant keeper did not start")
        yield
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


async def _serve(run_dir: Path) -> None:
    anchor = AnchorState(0, bytes(DIGEST_BYTES))
    ended = asyncio.Event()

    async def handle(op: str, args: Any, _fds: tuple[int, ...], _peer: Peer) -> tuple[Any, tuple[int, ...]]:
        nonlocal anchor
        match op:
            case "status":
                return _STATUS, ()
            case "new_key":
                key = os.urandom(VTPM_KEY_BYTES)
                return NewKey(wrapped=key, key=key), ()
            case "unwrap_key":
                return Key(args.wrapped), ()
            case "anchor_key":
                return Key(bytes(VTPM_KEY_BYTES)), ()
            case "read_anchor":
                return anchor, ()
            case "write_anchor":
                anchor = args
            case "end":
                asyncio.get_running_loop().call_later(0.05, ended.set)
        return NoArgs(), ()

    server = AsyncPacketServer(KEEPER, handle, lambda _uid: True)
    server.serve(bind_unix_socket(run_dir / KEEPER_SOCKET, socket.SOCK_SEQPACKET, mode=0o666))
    print("ready", flush=True)
    await ended.wait()
    await server.close()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
