"""Starts the services that are not there and gives each its directories. The manager's alone.

Under systemd keeper and launcher are units of their own, and nothing is started here.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vtpm.config import (
    INSTANCE_UID_OFFSET,
    KEEPER_UID_OFFSET,
    MANAGER_UID_OFFSET,
    Config,
    default_uid_base,
    is_default_uid_base,
)
from vtpm.confine.interpreter import ENVIRONMENT, cache_options
from vtpm.errors import UnavailableError, UsageError
from vtpm.wire.daemon import make_directory
from vtpm.wire.keeper import check_platform
from vtpm.wire.keeper_client import KeeperClient
from vtpm.wire.launcher import LAUNCHER, LAUNCHER_SOCKET, NoArgs
from vtpm.wire.packet_socket import PacketClient

START_TIMEOUT_S = 30.0
_POLL_S = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Directories and user ids of the services on this host."""

    vault_dir: Path
    peers_dir: Path
    platform_dir: Path
    keeper_dir: Path
    launcher_dir: Path
    log_dir: Path
    manager_uid: int
    manager_gid: int
    keeper_uid: int
    instances_uid: int


def make_run_dir(config: Config) -> None:
    """Make the run directory, where the manager's lock is. Raises UnavailableError: it cannot be made."""
    _make_directory(config.run_dir, 0o755, None)


def lay_out(config: Config) -> Layout:
    """Make the directories and settle the user ids; the caller has the manager's lock.

    Raises:
        UnavailableError: a directory cannot be made.
        UsageError: the state belongs to other user ids than the configuration names.
    """
    root = os.geteuid() == 0
    base = _uid_base(config) if root else 0
    manager_uid = base + MANAGER_UID_OFFSET if root else os.geteuid()
    layout = Layout(
        vault_dir=config.state_dir / "vault",
        peers_dir=config.state_dir / "peers",
        platform_dir=config.state_dir / "platform",
        keeper_dir=config.state_dir / "keeper",
        launcher_dir=config.state_dir / "launcher",
        log_dir=config.state_dir / "log",
        manager_uid=manager_uid,
        manager_gid=manager_uid if root else os.getegid(),
        keeper_uid=base + KEEPER_UID_OFFSET if root else os.geteuid(),
        instances_uid=base + INSTANCE_UID_OFFSET if root else os.geteuid(),
    )
    _make_directory(config.state_dir, 0o755, None)
    _make_directory(layout.log_dir, 0o700, None)
    _make_directory(layout.launcher_dir, 0o700, None)
    _make_directory(layout.vault_dir, 0o700, layout.manager_uid)
    _make_directory(layout.peers_dir, 0o700, layout.manager_uid)
    _make_directory(layout.platform_dir, 0o700, layout.manager_uid)
    _make_directory(layout.keeper_dir, 0o700, layout.keeper_uid)
    return layout


def _uid_base(config: Config) -> int:
    """Return the first user id: what is configured, else what the state has, else one by the state's place."""
    vault_dir = config.state_dir / "vault"
    if not vault_dir.exists():
        return config.uid_base or default_uid_base(config.state_dir)
    found = vault_dir.stat().st_uid - MANAGER_UID_OFFSET
    if found == config.uid_base or (not config.uid_base and is_default_uid_base(found)):
        return found
    wanted = config.uid_base or default_uid_base(config.state_dir)
    raise UsageError(
        f"{vault_dir} belongs to user id {found + MANAGER_UID_OFFSET}, and the manager is to run as"
        f" {wanted + MANAGER_UID_OFFSET}",
        next_step=(f"Set uid_base to {found}, or give" if found > 0 else "Give") + " the files to the new user ids:"
        f" chown -R {wanted + MANAGER_UID_OFFSET} {vault_dir}, chown -R {wanted + KEEPER_UID_OFFSET}"
        f" {config.state_dir / 'keeper'}",
    )


def _make_directory(path: Path, mode: int, owner: int | None) -> None:
    try:
        new = make_directory(path, mode)
        if path.stat().st_uid == os.geteuid():
            path.chmod(mode)
        if new and owner is not None and os.geteuid() == 0:
            os.chown(path, owner, owner)
    except OSError as error:
        raise UnavailableError(f"the directory {path} cannot be made or changed: {error.strerror}") from error


def start_services(config: Config, layout: Layout) -> bool:
    """Start launcher and keeper where they do not answer. They outlive this process.

    Returns:
        whether the launcher was started: then no instance runs, and nobody waits for this manager. One behind a port
        was not.

    Raises:
        VtpmError: one did not come up; the message has the last line of its log.
    """
    launcher = PacketClient(LAUNCHER, config.run_dir / LAUNCHER_SOCKET)
    keeper = KeeperClient(config.run_dir, timeout_s=START_TIMEOUT_S)
    run_dir = str(config.run_dir)
    try:
        _, launcher_started = _ensure(
            "vtpm-bridge" if config.launcher_port else "vtpm-launcher",
            lambda: launcher.call("status", NoArgs(), timeout_s=START_TIMEOUT_S),
            _bridge(config, layout) if config.launcher_port else _launcher(config, layout),
            layout.log_dir,
        )
        status, _ = _ensure(
            "vtpm-keeper",
            keeper.status,
            [
                "vtpm.keeper.main",
                *("--run-dir", run_dir),
                *("--state-dir", str(layout.keeper_dir)),
                *("--platform-tpm", config.platform_tpm),
                *("--pcrs", config.root_pcrs),
                *("--zero-pcrs", config.zero_pcrs),
                *(("--fence-pcr", str(config.fence_pcr)) if config.fence_pcr else ()),
                *(("--services-pcr", str(config.services_pcr)) if config.measures else ()),
                *("--launch-pcr", str(config.launch_pcr)),
                *("--manager-uid", str(layout.manager_uid)),
                *("--uid", str(layout.keeper_uid)),
                *("--gid", str(layout.keeper_uid)),
            ],
            layout.log_dir,
        )
        check_platform(config.platform_tpm, status)
        return launcher_started and not config.launcher_port
    finally:
        launcher.close()
        keeper.close()


def _launcher(config: Config, layout: Layout) -> list[str]:
    return [
        "vtpm.launcher.main",
        *("--run-dir", str(config.run_dir)),
        *("--state-dir", str(layout.launcher_dir)),
        *("--manager-uid", str(layout.manager_uid)),
        *("--uid-base", str(layout.instances_uid)),
        *("--vm-images", str(config.vm_images)),
        *("--vm-accelerator", config.vm_accelerator),
        *("--vm-memory-mib", str(config.vm_memory_mib)),
    ]


def _bridge(config: Config, layout: Layout) -> list[str]:
    """The launcher is on the host: what is started here speaks for it, for as long as this machine runs."""
    return [
        "vtpm.bridge.main",
        *("--run-dir", str(config.run_dir)),
        *("--port", config.launcher_port),
        *("--manager-uid", str(layout.manager_uid)),
    ]


def _ensure(name: str, ask: Callable[[], T], command: Sequence[str], log_dir: Path) -> tuple[T, bool]:
    """Return what a service answers, and whether it was started because it did not."""
    with contextlib.suppress(UnavailableError):
        return ask(), False
    log = log_dir / f"{name}.log"
    with log.open("ab") as log_file:
        begin = log_file.tell()
        # The child gets its whole command line here; nothing of it is secret.
        child = subprocess.Popen(
            [sys.executable, "-I", *cache_options(), "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
            close_fds=True,
            env={"PATH": os.defpath, **ENVIRONMENT},
            cwd="/",
        )
    pidfd = os.pidfd_open(child.pid)
    try:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                answer = ask()
            except UnavailableError:
                # Its socket appears without an event that a process of another user could wait for.
                if ended.poll(_POLL_S * 1000):
                    break
            else:
                # It is not waited for: it outlives this process, and init takes it over.
                child.returncode = 0
                return answer, True
    finally:
        os.close(pidfd)
    child.kill()
    child.wait()
    raise UnavailableError(f"{name} did not start: {_last_line(log, begin)}", next_step=f"See {log}")


def _last_line(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read(65536).decode(errors="replace").splitlines()
    return lines[-1][:500] if lines else "it said nothing"
