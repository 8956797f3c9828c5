"""The manager's virtual machine: Debian's kernel, Python, vtpm with what its services import, and a disk for the state.

A guest like any other with the agent in it, so that a test runs `vtpm` inside. Its TPM is the platform TPM, as far as
keeper and manager can tell, and its one way out is the port to the launcher.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from tests.support.guest import Guest, GuestConfig, GuestError, ImageSpec, TpmModel, build_image
from tests.support.in_guest import TSS_GROUP, with_vtpm
from tests.support.uids import own_uid_base
from vtpm.config import INSTANCE_UID_OFFSET, MANAGER_UID_OFFSET
from vtpm.wire.launcher_port import LAUNCHER_PORT

START_TIMEOUT_S = 120.0
CLI_TIMEOUT_S = 90.0
MEMORY_MIB = 512
_LOG = "/run/managerd.log"
_DISK_BYTES = 64 * 1024 * 1024
_SETTINGS = f"""\
platform_tpm = "device:/dev/tpmrm0"
launcher_port = "/dev/virtio-ports/{LAUNCHER_PORT}"
"""
_SETUP = f"""
mkdir -p /var/lib/vtpm /run/vtpm /dev/virtio-ports
mount -t ext4 /dev/vda /var/lib/vtpm
for port in /sys/class/virtio-ports/*; do
    ln -s ../${{port##*/}} /dev/virtio-ports/$(cat $port/name)
done
test -e /dev/virtio-ports/{LAUNCHER_PORT}
chgrp {TSS_GROUP} /dev/tpmrm0
chmod 660 /dev/tpmrm0
setsid vtpm-managerd --config /etc/vtpm.toml > {_LOG} 2>&1 &
"""


def image_spec() -> ImageSpec:
    """Return what the machine holds: of this checkout and its virtual environment."""
    spec = ImageSpec(
        name="manager",
        modules=("virtio_pci", "virtio_blk", "virtio_console", "ext4"),
        programs={"tpm2": "tpm2-tools", "tpm2_pcrread": "tpm2-tools"},
        files={"/etc/vtpm.toml": _SETTINGS.encode()},
        setup=_SETUP,
    )
    return with_vtpm(spec, {"vtpm": "vtpm.cli.main", "vtpm-managerd": "vtpm.starter.main"})


def make_disk(path: Path) -> None:
    """Make the disk for the manager's state."""
    with path.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True, timeout=30, capture_output=True)


class LauncherAlone:
    """A launcher and the bridge beside it, as on a host whose manager is elsewhere. A context manager that ends both.

    Args:
        folder: a short path that other users may pass through.
        images: folder of images for vTPMs' machines.
    """

    def __init__(self, folder: Path, images: Path) -> None:
        self._folder = folder
        self.run_dir = folder / "run"
        self.port_socket = folder / "port.sock"
        self.log = folder / "log"
        self._images = images
        self._base = own_uid_base()
        # The bridge has a user of its own where it can, whom the launcher takes for the manager.
        self._manager = ("--manager-uid", self._base + MANAGER_UID_OFFSET) if os.geteuid() == 0 else ()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for folder in (self.run_dir, self._folder / "state"):
            folder.mkdir()
        try:
            self._start(
                *("launcher", "--state-dir", self._folder / "state", "--uid-base", self._base + INSTANCE_UID_OFFSET),
                *("--vm-images", self._images, "--vm-accelerator", "tcg", *self._manager),
            )
            self.start_bridge()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_bridge(self) -> None:
        """Start the bridge; return when it serves."""
        self._start("bridge", "--machine", self.port_socket, *self._manager)

    def _start(self, service: str, *arguments: object) -> None:
        # Told by systemd's protocol when it serves.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            place = self._folder / "notify"
            place.unlink(missing_ok=True)
            notify.bind(str(place))
            # As systemd's: a service tells after it has become another user.
            place.chmod(0o777)
            notify.settimeout(30)
            self._processes[service] = subprocess.Popen(
                [sys.executable, "-I", "-m", f"vtpm.{service}.main", "--run-dir", self.run_dir, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(place)},
            )
            assert notify.recv(64) == b"READY=1"

    def stop(self, service: str) -> None:
        """End a service in order."""
        process = self._processes.pop(service)
        process.terminate()
        process.wait(30)

    def close(self) -> None:
        """End what runs; the launcher's instances end with it."""
        for service in tuple(self._processes):
            self.stop(service)


class ManagerMachine(Guest):
    """The machine; entering it waits until the manager serves.

    Args:
        tpm_control_socket: of the platform TPM's emulator.
        port_socket: where the bridge listens.
        disk: made by `make_disk`.
        work_folder: logs.
    """

    def __init__(self, tpm_control_socket: Path, port_socket: Path, disk: Path, work_folder: Path) -> None:
        ports = (
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=launcher,path={port_socket},reconnect=1"),
            *("-device", f"virtserialport,chardev=launcher,name={LAUNCHER_PORT}"),
        )
        config = GuestConfig(
            build_image(image_spec()),
            tpm_control_socket,
            TpmModel.TIS,
            memory_mib=MEMORY_MIB,
            drives=(disk,),
            extra_arguments=ports,
        )
        super().__init__(config, work_folder)

    def __enter__(self) -> Self:
        super().__enter__()
        self.wait_served()
        return self

    def wait_served(self) -> None:
        """Wait until the manager that the boot started serves."""
        script = f"for i in $(seq {START_TIMEOUT_S:.0f}); do grep -q 'ready: ' {_LOG} && exit; sleep 1; done; exit 1"
        if self.run(script, START_TIMEOUT_S + 10).status != 0:
            raise GuestError(f"the manager does not serve:\n{self.logs()}")

    def logs(self) -> str:
        """What the services in it logged."""
        return self.run(f"tail -n 50 {_LOG} /var/lib/vtpm/log/*").stdout

    def cli(self, *arguments: str) -> Any:
        """Run `vtpm` in it, and return what it prints with --json."""
        done = self.run(shlex.join(["vtpm", *arguments, "--json"]), CLI_TIMEOUT_S)
        if done.status != 0:
            raise GuestError(f"vtpm {arguments} ended with {done.status}: {done.stderr}\n{self.logs()}")
        return json.loads(done.stdout)
