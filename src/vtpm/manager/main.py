"""The manager: starts what is missing, drops privileges, takes up what runs, serves the API.

`vtpm-managerd` is the starter, which measures the services where there is a TPM to measure into, and becomes this.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import ModuleType

from vtpm.config import Config, read_arguments
from vtpm.confine.service import become, forbid_dumps, lock_memory
from vtpm.confine.title import set_title
from vtpm.errors import VtpmError
from vtpm.manager.access import Caller
from vtpm.manager.backups import BackupService
from vtpm.manager.measured import measured_services
from vtpm.manager.platform import PlatformService
from vtpm.manager.service import ManagerService
from vtpm.manager.services import Layout, lay_out, make_run_dir, start_services
from vtpm.manager.storage import Storage, anchor_policy, open_storage
from vtpm.peers.port import listen
from vtpm.vault.launch_policy import NewImages
from vtpm.vault.records import Event
from vtpm.wire.api import MANAGER_SOCKET
from vtpm.wire.call_threads import CallThreads
from vtpm.wire.daemon import end_when_signalled, ready, set_up_logging
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.packet_socket import ServiceLock
from vtpm.wire.unix_socket import bind_unix_socket

PLATFORM_TIMEOUT_S = 60.0
"""Of what an administrator asks of the keeper: sealing anew takes a hardware TPM many commands."""
_log = logging.getLogger("vtpm.manager")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the manager until SIGTERM or SIGINT, which end the manager alone; return the exit status."""
    set_up_logging("vtpm-managerd")
    try:
        # At once: what the starter becomes has the interpreter's name.
        set_title("vtpm-managerd")
        config = read_arguments(sys.argv[1:] if argv is None else argv)
        make_run_dir(config)
        lock = ServiceLock(config.run_dir, "manager")
        layout = lay_out(config)
        # Whoever connects is known by SO_PEERCRED, and what they may do follows from that.
        listener = bind_unix_socket(config.run_dir / MANAGER_SOCKET, socket.SOCK_STREAM, mode=0o666)
        peers_listener = listen(config.migration_address) if config.migration_address else None
        if start_services(config, layout) and sys.pycache_prefix:
            # While its compiled form can still be kept: that takes root, and nobody waits for this manager yet.
            _load_api()
        lock_memory()
        become("vtpm-managerd", layout.manager_uid, layout.manager_gid)
        forbid_dumps()
        asyncio.run(_serve(config, layout, listener, peers_listener))
        del lock
    except VtpmError as error:
        _log.error("%s", error)
        return error.exit_status
    return 0


async def _serve(config: Config, layout: Layout, listener: socket.socket, peers_listener: socket.socket | None) -> None:
    def open_vault(accepting: Event | None) -> Storage:
        return open_storage(layout.vault_dir, config.run_dir, anchor_policy(config), accepting)

    new_images = NewImages.ALLOW if config.allows_new_images else NewImages.REFUSE
    service = ManagerService(config.run_dir, config.state_dir, open_vault, measured_services(config), new_images)
    moving = None
    try:
        await service.begin()
        # Slow to load, so that what runs has been taken up by now, and its saves are answered meanwhile.
        api, http_server, moves = await asyncio.to_thread(_load_api)
        ending, shut_down = asyncio.Event(), asyncio.Event()
        admins = {0, os.geteuid(), *config.admin_uids}

        def caller_of(uid: int, gid: int) -> Caller:
            return Caller(uid, gid, uid in admins, gid in config.create_gids, config.max_vtpms_per_user)

        def end_all() -> None:
            shut_down.set()
            ending.set()

        keeper, threads = KeeperClient(config.run_dir), CallThreads("keeper-admin", 1)
        platform = PlatformService(keeper, threads, service.audit.append, service.door.open)
        backups = BackupService(keeper, threads, service)
        moving = moves.Moving(config, layout, service, peers_listener)
        app = api.make_app(
            service, platform, backups, moving.migrations, moving.peering, moving.enrolment, caller_of, end_all
        )
        server = http_server.ApiServer(app)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        serving.add_done_callback(lambda _: ending.set())
        moving.begin()
        ready()
        _log.info("ready: %s", config.run_dir / MANAGER_SOCKET)
        await end_when_signalled((signal.SIGTERM, signal.SIGINT), ending)
        server.should_exit = True
        await serving
        if shut_down.is_set():
            await service.end_services()
    finally:
        if moving is not None:
            await moving.end()
        await service.end()


def _load_api() -> tuple[ModuleType, ModuleType, ModuleType]:
    from vtpm.manager import api, http_server, moving

    return api, http_server, moving


if __name__ == "__main__":
    sys.exit(main())
