"""vtpm-launcher: entry of the program that starts, confines and stops domains."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vtpm.confine.title import set_title
from vtpm.domains.base import Domain
from vtpm.domains.process import ProcessDomain
from vtpm.domains.qemu import QemuDomain
from vtpm.errors import VtpmError
from vtpm.launcher.descriptors import instances_for, raise_limit
from vtpm.launcher.service import LauncherService
from vtpm.launcher.uid_range import UidRange
from vtpm.tpm.types import Make
from vtpm.wire.daemon import end_when_signalled, ready, set_up_logging
from vtpm.wire.launcher import GUESTS_DIR, LAUNCHER, LAUNCHER_SOCKET, MAX_INSTANCES
from vtpm.wire.packet_socket import AsyncPacketServer, ServiceLock
from vtpm.wire.paths import SYSTEM_STATE_DIR


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher until SIGTERM or SIGINT, which end every instance; return the exit status."""
    parser = argparse.ArgumentParser(prog="vtpm-launcher", description="Starts, confines and stops vTPMs' domains.")
    parser.add_argument("--run-dir", type=Path, required=True, help="directory of the services' sockets")
    parser.add_argument("--state-dir", type=Path, required=True, help="directory that one launcher at a time works for")
    parser.add_argument("--manager-uid", type=int, default=os.geteuid(), help="user id of the manager")
    parser.add_argument("--uid-base", type=int, default=0x76740100, help="first user id for instances")
    parser.add_argument(
        "--vm-images", type=Path, default=SYSTEM_STATE_DIR / "images", help="images for virtual machines"
    )
    parser.add_argument("--vm-accelerator", choices=("auto", "kvm", "tcg"), default="auto", help="of virtual machines")
    parser.add_argument("--vm-memory-mib", type=int, default=96, help="of each virtual machine")
    args = parser.parse_args(argv)
    set_up_logging("vtpm-launcher")
    set_title("vtpm-launcher")
    try:
        domains: Mapping[str, Domain] = {
            "process": ProcessDomain(),
            "qemu": QemuDomain(args.vm_images, args.vm_accelerator, args.vm_memory_mib),
            "qemu-swtpm": QemuDomain(args.vm_images, args.vm_accelerator, args.vm_memory_mib, Make.SWTPM),
        }
        asyncio.run(_serve(args.run_dir, args.state_dir, args.manager_uid, args.uid_base, domains))
    except VtpmError as error:
        logging.getLogger("vtpm.launcher").error("%s", error)
        return error.exit_status
    return 0


async def _serve(
    run_dir: Path, state_dir: Path, manager_uid: int, uid_base: int, domains: Mapping[str, Domain]
) -> None:
    # Until the process ends. Another run directory, or the same one made anew, is no other host: with a second
    # launcher over the same vTPMs, one of them could have two instances.
    ServiceLock(state_dir, "launcher")
    lock = ServiceLock(run_dir, "launcher")
    if os.geteuid() == 0:
        UidRange(uid_base, MAX_INSTANCES)
    guests_dir = run_dir / GUESTS_DIR
    guests_dir.mkdir(exist_ok=True)
    # Whatever the umask: owners of vTPMs must be able to pass.
    guests_dir.chmod(0o755)
    for stale in guests_dir.iterdir():
        # Sockets of instances that died with the launcher before this one.
        stale.unlink()
    ending = asyncio.Event()
    most = instances_for(raise_limit())
    service = LauncherService(guests_dir, domains, uid_base, ending.set, most=most)
    allowed = {0, os.geteuid(), manager_uid}
    server = AsyncPacketServer(LAUNCHER, service.handle, allowed.__contains__)
    service.server = server
    owner_uid = manager_uid if os.geteuid() == 0 else None
    listener = lock.bind_service_socket(run_dir / LAUNCHER_SOCKET, 0o600, owner_uid)
    server.serve(listener)
    ready()
    await end_when_signalled((signal.SIGTERM, signal.SIGINT), ending)
    await service.close()
    await server.close()


if __name__ == "__main__":
    sys.exit(main())
