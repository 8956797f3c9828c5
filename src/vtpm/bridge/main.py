"""vtpm-bridge: entry of the program that joins a launcher on the host to a manager in a virtual machine.

Run twice: beside the launcher with --machine, in the manager's machine with --port. It holds no key, and becomes the
manager's user before it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from vtpm.bridge.launcher_side import LauncherSide
from vtpm.bridge.manager_side import ManagerSide
from vtpm.confine.service import become, forbid_dumps
from vtpm.confine.title import set_title
from vtpm.errors import ConflictError, UnavailableError, VtpmError
from vtpm.wire.daemon import end_when_signalled, make_directory, ready, set_up_logging
from vtpm.wire.launcher import LAUNCHER, LAUNCHER_SOCKET
from vtpm.wire.packet_stream import connect_service, peer_of
from vtpm.wire.service_lock import ServiceLock
from vtpm.wire.unix_socket import bind_unix_socket

PROGRAM = "vtpm-bridge"
BRIDGE_DIR = "bridge"
"""Folder in the manager's run directory, the bridge's own: it makes the launcher's socket there, again and again."""
CONNECT_TIMEOUT_S = 5.0
_NO_ANSWER = "If it does not answer, start vtpm-launcher and vtpm-bridge on the host"
_log = logging.getLogger("vtpm.bridge")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one end of the bridge until SIGTERM or SIGINT; return the exit status."""
    parser = argparse.ArgumentParser(PROGRAM, description="Joins a launcher to a manager in a virtual machine.")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="directory of the services' sockets")
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("--machine", type=Path, metavar="SOCKET", help="beside the launcher: QEMU connects here")
    side.add_argument("--port", type=Path, metavar="DEVICE", help="in the manager's machine: the virtio-serial port")
    parser.add_argument("--machine-uid", type=int, default=os.geteuid(), metavar="UID", help="with --machine: QEMU's")
    parser.add_argument(
        "--manager-uid", type=int, default=os.geteuid(), metavar="UID", help="run as this user; root must name one"
    )
    args = parser.parse_args(argv)
    if args.manager_uid == 0:
        parser.error("--manager-uid must name a user that is not root, the one that the launcher was told")
    set_up_logging(PROGRAM)
    set_title(PROGRAM)
    forbid_dumps()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    try:
        if args.machine is not None:
            _run_beside_launcher(args.run_dir, args.machine, args.machine_uid, args.manager_uid)
        else:
            _run_in_machine(args.run_dir, args.port, args.manager_uid)
    except VtpmError as error:
        _log.error("%s", error)
        return error.exit_status
    return 0


def _become(uid: int) -> None:
    become(PROGRAM, uid, uid if os.geteuid() == 0 else os.getegid())


def _run_beside_launcher(run_dir: Path, path: Path, machine_uid: int, manager_uid: int) -> None:
    lock = ServiceLock(run_dir, "bridge")
    owner_uid = machine_uid if os.geteuid() == 0 else None
    listener = bind_unix_socket(path, socket.SOCK_STREAM, mode=0o600, owner_uid=owner_uid)
    with listener:
        _become(manager_uid)
        allowed = {0, machine_uid}
        asyncio.run(_until_signalled(lambda: _serve_machines(listener, allowed.__contains__, run_dir)))
    lock.release()


async def _serve_machines(listener: socket.socket, allows: Callable[[int], bool], run_dir: Path) -> None:
    loop = asyncio.get_running_loop()
    listener.setblocking(False)

    async def connect() -> socket.socket:
        return await asyncio.to_thread(connect_service, LAUNCHER, run_dir / LAUNCHER_SOCKET, CONNECT_TIMEOUT_S)

    while True:
        machine, _ = await loop.sock_accept(listener)
        peer = peer_of(machine)
        if not allows(peer.uid):
            _log.warning("uid %d may not be the manager's machine", peer.uid)
            machine.close()
            continue
        _log.info("the manager's machine has connected, process %d", peer.pid)
        await LauncherSide(machine, connect).run()
        _log.info("the manager's machine is gone")


def _run_in_machine(run_dir: Path, device: Path, manager_uid: int) -> None:
    try:
        lock = ServiceLock(run_dir, "launcher")
    except ConflictError as error:
        raise ConflictError(error.message, next_step=_NO_ANSWER) from None
    own = run_dir / BRIDGE_DIR
    place = own / LAUNCHER_SOCKET
    try:
        make_directory(own, 0o700)
        if os.geteuid() == 0:
            os.chown(own, manager_uid, manager_uid)
        link = run_dir / LAUNCHER_SOCKET
        link.unlink(missing_ok=True)
        link.symlink_to(place.relative_to(run_dir))
        port_fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise UnavailableError(f"{error.filename or device} cannot be used: {error.strerror}") from error
    with contextlib.closing(os.fdopen(port_fd, "rb+", buffering=0)):
        _become(manager_uid)
        allowed = {0, manager_uid}
        side_of = _listener_at(place)
        asyncio.run(_until_signalled(lambda: ManagerSide(port_fd, side_of, allowed.__contains__).run()))
    lock.release()


def _listener_at(place: Path) -> Callable[[], socket.socket]:
    return lambda: bind_unix_socket(place, socket.SOCK_SEQPACKET, mode=0o600)


async def _until_signalled(serve: Callable[[], Awaitable[None]]) -> None:
    serving = asyncio.ensure_future(serve())
    ending = asyncio.Event()
    serving.add_done_callback(lambda _: ending.set())
    ready()
    await end_when_signalled((signal.SIGTERM, signal.SIGINT), ending)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    sys.exit(main())
