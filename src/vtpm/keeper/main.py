"""vtpm-keeper: alone talks to the platform TPM; holds the root key; unwraps one vTPM's key at a time.

    vtpm-keeper --run-dir DIR --state-dir DIR --platform-tpm embedded|TCTI [--manager-uid UID] [--pcrs sha256:0,2,4,7]
                [--zero-pcrs refuse|warn] [--fence-pcr N] [--services-pcr N] [--launch-pcr N] [--uid UID --gid GID]

Serves DIR/keeper.sock once it has tried to open the root key, in the foreground, until SIGTERM. It does not mind the
manager's end. A root key that does not open stays locked: it says why, and waits for `vtpm recover`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtpm.confine.service import become, forbid_dumps, lock_memory
from vtpm.confine.title import set_title
from vtpm.errors import UsageError, VtpmError
from vtpm.keeper.custody import Custody
from vtpm.keeper.directories import bind_socket, prepare_directory
from vtpm.keeper.launches import LAUNCH_DIR, Launches, refused_pcr
from vtpm.keeper.platforms import EMBEDDED, EMBEDDED_RUN_DIR, EmbeddedPlatform, HardwarePlatform, Platform
from vtpm.keeper.root_key import NewRoot
from vtpm.keeper.service import KeeperService
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrSelection
from vtpm.platform_tpm.root_policy import ZeroPcrs
from vtpm.wire.daemon import end_when_signalled, ready, set_up_logging
from vtpm.wire.keeper import KEEPER, KEEPER_SOCKET, PlatformKind
from vtpm.wire.packet_socket import AsyncPacketServer, ServiceLock

PROGRAM = "vtpm-keeper"
_BACKLOG = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    run_dir: Path
    state_dir: Path
    platform_tpm: str
    manager_uid: int
    pcrs: PcrSelection
    zero_pcrs: ZeroPcrs
    fence_pcr: int | None
    services_pcr: int | None
    launch_pcr: int | None
    uid: int
    gid: int

    @property
    def drops_privileges(self) -> bool:
        """Whether the keeper is to run as another user than the one that starts it."""
        return self.uid != os.geteuid()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    set_up_logging(PROGRAM)
    try:
        _run(_settings(arguments))
    except VtpmError as error:
        _log.error("%s", error)
        return error.exit_status
    return 0


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(PROGRAM, description="keeps the root key, sealed under the platform TPM")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="takes keeper.sock")
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="the keeper's own")
    parser.add_argument("--platform-tpm", required=True, metavar="embedded|TCTI")
    parser.add_argument("--manager-uid", type=int, metavar="UID", help="who may ask, beside root; default: this user")
    parser.add_argument("--pcrs", default=str(DEFAULT_PCRS), metavar="BANK:PCR,…", help="for a new root key")
    parser.add_argument(
        "--zero-pcrs", choices=("refuse", "warn"), default="refuse", help="when no PCR was measured into"
    )
    parser.add_argument("--fence-pcr", type=int, metavar="N", help="extended after opening: opens once in each boot")
    parser.add_argument("--services-pcr", type=int, metavar="N", help="what the services are measured into")
    parser.add_argument("--launch-pcr", type=int, metavar="N", help="what is launched is measured into")
    parser.add_argument("--uid", type=int, metavar="UID", help="run as this user")
    parser.add_argument("--gid", type=int, metavar="GID", help="and this group; default: as UID")
    options = parser.parse_args(arguments)
    if options.gid is not None and options.uid is None:
        raise UsageError("--gid needs --uid")
    uid = os.geteuid() if options.uid is None else options.uid
    return Settings(
        run_dir=options.run_dir.absolute(),
        state_dir=options.state_dir.absolute(),
        platform_tpm=options.platform_tpm,
        manager_uid=os.geteuid() if options.manager_uid is None else options.manager_uid,
        pcrs=PcrSelection.parse(options.pcrs),
        zero_pcrs=ZeroPcrs.ALLOW if options.zero_pcrs == "warn" else ZeroPcrs.REFUSE,
        fence_pcr=options.fence_pcr,
        services_pcr=options.services_pcr,
        launch_pcr=options.launch_pcr,
        uid=uid,
        gid=options.gid if options.gid is not None else (os.getegid() if options.uid is None else uid),
    )


def _run(settings: Settings) -> None:
    set_title(PROGRAM)
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    forbid_dumps()
    lock_memory()
    # What tpm2-tss would print on stderr is in the errors already.
    os.environ.setdefault("TSS2_LOG", "all+none")

    platform: Platform
    if settings.platform_tpm == EMBEDDED:
        platform = EmbeddedPlatform(settings.run_dir, settings.state_dir, settings.uid, settings.gid)
    else:
        platform = HardwarePlatform(settings.platform_tpm)
    owners = {0, os.geteuid(), settings.manager_uid}
    # Others may pass through a new run directory to the sockets; each socket says who may connect.
    prepare_directory(settings.run_dir, settings.uid, settings.gid, mode=0o711, other_owners=owners)
    prepare_directory(settings.state_dir, settings.uid, settings.gid)
    if platform.kind is PlatformKind.EMBEDDED:
        prepare_directory(settings.run_dir / EMBEDDED_RUN_DIR, settings.uid, settings.gid)
    if settings.launch_pcr is not None:
        prepare_directory(settings.run_dir / LAUNCH_DIR, settings.uid, settings.gid)
    # Kept until the process ends.
    locks = [ServiceLock(settings.run_dir, "keeper"), ServiceLock(settings.state_dir, "keeper")]
    with bind_socket(settings.run_dir / KEEPER_SOCKET, settings.manager_uid) as listener:
        # Now, for as another user this may not read the program's folder (a checkout in root's home, say).
        platform.prepare()
        if settings.drops_privileges:
            become(PROGRAM, settings.uid, settings.gid, _device_groups(platform.tcti))
        asyncio.run(_serve(settings, platform, listener))
    for lock in locks:
        lock.release()


def _device_groups(tcti: str) -> list[int]:
    """The group of a TPM's device file, which must stay within reach."""
    name, _, path = tcti.partition(":")
    return [Path(path).stat().st_gid] if name == "device" and path and Path(path).exists() else []


def _launches(settings: Settings) -> Launches | None:
    index = settings.launch_pcr
    if index is None:
        return None
    if index in (settings.fence_pcr, settings.services_pcr, *settings.pcrs.indexes):
        raise refused_pcr(index, "the root key, its fence or the services have it")
    return Launches(settings.run_dir, PcrSelection(settings.pcrs.bank, (index,)))


async def _serve(settings: Settings, platform: Platform, listener: socket.socket) -> None:
    zero_pcrs = ZeroPcrs.ALLOW if platform.kind is PlatformKind.EMBEDDED else settings.zero_pcrs
    new = NewRoot(settings.pcrs, zero_pcrs, settings.fence_pcr, settings.services_pcr)
    custody = Custody(settings.state_dir, platform, new, _launches(settings))
    custody.open()
    service = KeeperService(platform, custody, str(settings.pcrs))
    allowed = {0, settings.manager_uid}
    server = AsyncPacketServer(KEEPER, service.handle, lambda uid: uid in allowed)
    ending = asyncio.ensure_future(end_when_signalled((signal.SIGTERM, signal.SIGINT), service.ending))
    await asyncio.sleep(0)  # from here on signals are heard
    listener.listen(_BACKLOG)
    server.serve(listener)
    _log.info("serves %s; platform TPM %s", settings.run_dir / KEEPER_SOCKET, platform.tcti)
    ready()
    await ending
    await server.close()
    custody.close()
    if service.ends_platform:
        platform.end()


if __name__ == "__main__":
    sys.exit(main())
