"""vtpm-embedded-tpm: started by the keeper, outlives it, ends at SIGTERM.

    python -m vtpm.embedded_tpm --socket PATH --state-dir DIR [--ready-fd FD] [--uid UID --gid GID]

Serves TPM commands at PATH and the control channel at PATH.ctrl; keeps its state in DIR/embedded-tpm. To FD it writes
"ready", or why it does not start, and closes it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from vtpm.confine.service import become, forbid_dumps
from vtpm.confine.title import set_title
from vtpm.embedded_tpm.server import EmbeddedServer
from vtpm.embedded_tpm.store import EmbeddedStore
from vtpm.engine import library
from vtpm.engine.engine import Engine, Origin
from vtpm.errors import StateError, StoreError, VtpmError
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.wire.daemon import end_when_signalled, set_up_logging
from vtpm.wire.service_lock import ServiceLock
from vtpm.wire.unix_socket import bind_unix_socket

PROGRAM = "vtpm-embedded-tpm"
STORE_NAME = "embedded-tpm"

_STARTUP_CLEAR = bytes.fromhex("8001 0000000c 00000144 0000")
_SHUTDOWN_CLEAR = bytes.fromhex("8001 0000000c 00000145 0000")
_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(PROGRAM, description="software stand-in for a platform TPM")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ready-fd", type=int, metavar="FD")
    parser.add_argument("--uid", type=int, default=os.geteuid(), metavar="UID", help="run as this user")
    parser.add_argument("--gid", type=int, default=os.getegid(), metavar="GID", help="and this group")
    options = parser.parse_args(arguments)
    set_up_logging(PROGRAM)
    try:
        set_title(PROGRAM)
        # While this is still a user who may read the program's folder.
        library.load()
        become(PROGRAM, options.uid, options.gid)
        forbid_dumps()
        asyncio.run(_run(options.socket, options.state_dir, options.ready_fd))
    except VtpmError as error:
        _log.error("%s", error)
        _tell(options.ready_fd, str(error))
        return error.exit_status
    return 0


async def _run(socket_path: Path, state_dir: Path, ready_fd: int | None) -> None:
    store = EmbeddedStore(state_dir / STORE_NAME)
    # Two locks, kept until the process ends: one TPM for this state, one for this socket.
    store_lock = ServiceLock(state_dir / STORE_NAME, "embedded-tpm")
    socket_lock = ServiceLock(socket_path.parent, socket_path.stem)
    with Engine(TpmVersion.V2_0, store.save) as engine:
        _power_on(engine, store)
        server = EmbeddedServer(engine)
        # The control socket first: who finds the data socket finds both.
        control, data = (
            bind_unix_socket(Path(f"{socket_path}{suffix}"), socket.SOCK_STREAM, mode=0o600) for suffix in (".ctrl", "")
        )
        await server.serve(data, control)
        signalled = asyncio.ensure_future(end_when_signalled((signal.SIGTERM, signal.SIGINT)))
        await asyncio.sleep(0)  # from here on signals are heard
        _log.info("serves at %s", socket_path)
        _tell(ready_fd, "ready")
        await asyncio.wait((signalled, server.failed), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        await server.close()
        if server.failed.done():
            server.failed.result()
        engine.process(_SHUTDOWN_CLEAR)
        if engine.store_error is not None:
            raise StoreError(f"the embedded TPM's state is not durable: {engine.store_error}")
    socket_lock.release()
    store_lock.release()


def _power_on(engine: Engine, store: EmbeddedStore) -> None:
    state = store.load()
    if state is None:
        _log.warning("manufactures the embedded TPM; it protects nothing from whoever reads its files")
        engine.power_on({}, origin=Origin.MANUFACTURE)
    else:
        engine.power_on({StateKind.PERMANENT: state}, origin=Origin.SAVED)
    if not store.is_initialised:
        store.mark_initialised()
    response = engine.process(_STARTUP_CLEAR)
    if engine.store_error is not None:
        raise StoreError(f"the embedded TPM's state is not durable: {engine.store_error}")
    if response[6:10] != bytes(4):
        raise StateError(f"the embedded TPM does not start: TPM2_Startup answers 0x{response[6:10].hex()}")


def _tell(ready_fd: int | None, message: str) -> None:
    if ready_fd is not None:
        with contextlib.suppress(OSError):  # who waited is gone; the TPM is there all the same
            os.write(ready_fd, message.encode())
            os.close(ready_fd)
