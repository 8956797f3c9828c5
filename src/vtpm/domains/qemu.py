"""The qemu domain: a vtpmd as the one program of a virtual machine, and its relay on the host. For the launcher.

Relay and virtual machine are one domain: where one ends, the other is ended. The machine starts halted, and runs once
both processes are locked in and QEMU's own filter is seen in force; its monitor is hung up before that, so that a
taken-over QEMU has nobody to talk to.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import Mapping
from pathlib import Path

from vtpm.confine import execute
from vtpm.confine.report import Protection, ProtectionStatus, Report
from vtpm.confine.spawn import spawn
from vtpm.confine.spec import MEBIBYTE, AllowList, ConfinementSpec, Limits, Root
from vtpm.domains import accelerator
from vtpm.domains.base import ORDERLY, DomainPlan, RunningDomain
from vtpm.domains.process import ConfinedProcess, identity
from vtpm.domains.vm_command import QEMU, SANDBOX, VmFd, vm_arguments
from vtpm.errors import ConfinementError, DomainError, ImageError, NotFoundError
from vtpm.image.manifest import IMAGE_NAMES
from vtpm.image.opened import OpenImage, image_folders
from vtpm.tpm.types import Make
from vtpm.wire.instance_spec import InstanceFd, RelayExit, RelayFd
from vtpm.wire.unix_socket import enter_socket_pair

RELAY_TARGET = "vtpm.relay.main:prepare"
MONITOR_TIMEOUT_S = 10.0
_MONITOR_LINE_BYTES = 64 * 1024
_SECCOMP_FILTER = 2
"""Value of Seccomp in /proc/PID/status: SECCOMP_MODE_FILTER."""
_QEMU_OVERHEAD_BYTES = 1536 * MEBIBYTE
"""Address space that QEMU takes beside the guest's memory: libraries, threads' stacks and arenas."""
_LAST_WORDS_S = 2.0
_MAX_LABEL_CHARS = 64
_LOG = "The launcher's log has what it said."
_BUILT_WITH = "Install a QEMU that was built with seccomp."
_RELAY_SAYS = {
    f"exit status {RelayExit.LAUNCHER_GONE:d}": "the launcher has gone",
    f"exit status {RelayExit.VM_GONE:d}": "the virtual machine has gone without a word",
    f"exit status {RelayExit.NOT_READY:d}": "the vtpmd was not ready in time",
    f"exit status {RelayExit.BROKEN:d}": "the virtual machine says what no vtpmd says",
}
_ROOT_PATHS = ("/usr", "/lib", "/lib64", "/dev/null", "/dev/urandom")


class QemuDomain:
    """Starts vtpmds in virtual machines.

    Args:
        images: folder of images.
        wanted_accelerator: kvm, tcg or auto.
        memory_mib: of each machine.
        make: of the vTPMs; only images of that make are started.
    """

    def __init__(self, images: Path, wanted_accelerator: str, memory_mib: int, make: Make = Make.LIBTPMS) -> None:
        self._images = images
        self._make = make
        self._wanted = wanted_accelerator
        self._memory_mib = memory_mib
        self._preparing = asyncio.Lock()
        self._accelerator = ""
        self._image: OpenImage | None = None

    @property
    def measurement(self) -> str:
        """SHA-256, in hex, over kernel, initramfs and command line."""
        return self._prepared().measurement

    @property
    def engine_version(self) -> int:
        """That of the image; see Domain."""
        return self._prepared().manifest.engine_version

    @property
    def label(self) -> str:
        """The image's name, and its kernel; see Domain."""
        manifest = self._prepared().manifest
        return f"{manifest.name}, {manifest.kernel.origin}"[:_MAX_LABEL_CHARS]

    @property
    def ready_within_s(self) -> int:
        """It has to boot first."""
        return 20 if self._accelerator == accelerator.KVM else 60

    async def prepare(self) -> None:
        """Find the accelerator, once, and open the image that is current; see Domain."""
        async with self._preparing:
            if not self._accelerator:
                self._accelerator = await accelerator.choose(self._wanted)
            newest = await asyncio.to_thread(newest_image, self._images, self._make)
            if self._image is not None and newest.name == self._image.measurement:
                return
            opened = await asyncio.to_thread(OpenImage, newest)
            if opened.manifest.make is not self._make:
                opened.close()
                raise _other_make(newest, opened.manifest.make, self._make)
            image, self._image = self._image, opened
            if image is not None:
                # A machine that was started with it has descriptors of its own.
                image.close()

    def _prepared(self) -> OpenImage:
        if self._image is None:
            raise DomainError("no image of a virtual machine has been opened")
        return self._image

    def start(self, plan: DomainPlan) -> RunningDomain:
        """Start relay and virtual machine, the latter halted; see Domain."""
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            monitor, their_monitor = enter_socket_pair(undo, theirs)
            hold, their_hold = enter_socket_pair(undo, theirs)
            relay_port, vm_port = enter_socket_pair(theirs, theirs)
            relay = _start_relay(plan, relay_port.fileno())
            undo.callback(_end, relay)
            fds = {
                VmFd.HOLD: their_hold.fileno(),
                VmFd.GUEST: vm_port.fileno(),
                VmFd.MANAGER: plan.fds[InstanceFd.MANAGER_LINK],
                VmFd.MONITOR: their_monitor.fileno(),
                VmFd.KERNEL: self._prepared().kernel_fd,
                VmFd.INITRAMFS: self._prepared().initramfs_fd,
            }
            machine = self._start_machine(plan, fds)
            undo.pop_all()
        return QemuMachine(plan.name, relay, machine, monitor, hold)

    def _start_machine(self, plan: DomainPlan, fds: Mapping[VmFd, int]) -> ConfinedProcess:
        devices = ("/dev/kvm",) if self._accelerator == accelerator.KVM else ()
        spec = ConfinementSpec(
            program="vtpm-vm",
            target=execute.TARGET,
            keep_fds=tuple(int(fd) for fd in fds),
            hold_fd=int(VmFd.HOLD),
            limits=Limits(memory_bytes=self._memory_mib * MEBIBYTE + _QEMU_OVERHEAD_BYTES, processes=32),
            root=Root((*_ROOT_PATHS, *devices), proc=True),
            allow_list=AllowList.OWN,
            target_args={
                "path": QEMU,
                "arguments": vm_arguments(
                    plan.name, self._accelerator, self._memory_mib, self._prepared().manifest.command_line
                ),
            },
            **identity(plan),
        )
        return ConfinedProcess(spawn(spec, fds={int(fd): own for fd, own in fds.items()}, log_fd=plan.log_fd))


class QemuMachine:
    """One relay with its virtual machine; see RunningDomain.

    Args:
        monitor: QEMU's, not spoken to yet.
        hold: kept open, and closed with the machine.
    """

    def __init__(
        self, name: str, relay: ConfinedProcess, machine: ConfinedProcess, monitor: socket.socket, hold: socket.socket
    ) -> None:
        self._name = name
        self._relay = relay
        self._machine = machine
        self._monitor = monitor
        self._hold = hold

    @property
    def pid(self) -> int:
        """Process id of the virtual machine's QEMU."""
        return self._machine.pid

    async def confined(self) -> Report:
        """Let the machine run once all is locked in; see RunningDomain."""
        relay, machine = await asyncio.gather(self._relay.confined(), self._machine.confined())
        try:
            async with asyncio.timeout(MONITOR_TIMEOUT_S):
                filtered = await self._let_run()
        except TimeoutError:
            raise ConfinementError(f"QEMU did not answer within {MONITOR_TIMEOUT_S:g} s") from None
        shown = [filtered if line.step == filtered.step else line for line in machine]
        return (
            *(dataclasses.replace(line, step=f"vm {line.step}") for line in shown),
            *(dataclasses.replace(line, step=f"relay {line.step}") for line in relay),
        )

    async def _let_run(self) -> Protection:
        # Here, and not at the top: most launchers start processes alone, and need not hold it in memory.
        from qemu.qmp import QMPClient, QMPError

        client = QMPClient(f"vtpm-{self._name}", readbuflen=_MONITOR_LINE_BYTES)
        try:
            await client.connect(self._monitor)
            try:
                status = await client.execute("query-status")
                if not isinstance(status, dict) or status.get("status") != "prelaunch":
                    raise ConfinementError(f"the machine of {self._name} runs before it was told to")
                # QEMU puts its filter on before it makes a machine, and answers after that.
                mode = _status_field(self._machine.pid, "Seccomp")
                if mode != _SECCOMP_FILTER:
                    raise ConfinementError(f"QEMU has no system call filter (mode {mode})", next_step=_BUILT_WITH)
                await client.execute("cont")
            finally:
                await client.disconnect()
        except (QMPError, OSError, EOFError) as error:
            raise ConfinementError(f"QEMU ended before the machine ran: {error}", next_step=_LOG) from error
        return Protection("seccomp", ProtectionStatus.IN_FORCE, f"QEMU's own filter: -sandbox {SANDBOX}")

    def kill(self) -> None:
        """Send SIGKILL to both."""
        self._relay.kill()
        self._machine.kill()

    async def ended(self) -> str:
        """Wait until one ends, end the other, and say how; the relay's word counts, which has the vtpmd's."""
        ends = [asyncio.ensure_future(self._relay.ended()), asyncio.ensure_future(self._machine.ended())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        machine_first = ends[1].done()
        if machine_first:
            # What the vtpmd said last is still on its way through the relay, which ends by itself then.
            await asyncio.wait(ends, timeout=_LAST_WORDS_S)
        self.kill()
        relay, machine = await asyncio.gather(*ends)
        self._hold.close()
        # A client closes its socket when it is disconnected; before that it is ours.
        self._monitor.close()
        if relay == ORDERLY:
            return relay
        return f"its relay: {_RELAY_SAYS.get(relay, relay)}; its virtual machine: {machine}"


def newest_image(images: Path, make: Make = Make.LIBTPMS) -> Path:
    """Return the folder of the image of a make that was built last. Raises NotFoundError: there is none."""
    found = (folder for folder in image_folders(images) if folder.parent.name == IMAGE_NAMES[make])
    built = [(folder.stat().st_mtime_ns, folder) for folder in found]
    if not built:
        raise NotFoundError(
            f"there is no image of a virtual machine for vTPMs of the make {make} in {images}",
            next_step=f"Build one: vtpm image build --make {make}",
        )
    return max(built)[1]


def _other_make(folder: Path, make: Make, wanted: Make) -> ImageError:
    return ImageError(
        f"the image {folder} is of the make {make}; a vTPM of the make {wanted} does not open its state in it",
        next_step=f"Keep it where images of its make are, and build one: vtpm image build --make {wanted}",
    )


def _start_relay(plan: DomainPlan, port_fd: int) -> ConfinedProcess:
    fds = {int(number): fd for number, fd in plan.fds.items() if number is not InstanceFd.MANAGER_LINK}
    fds[int(RelayFd.GUEST_PORT)] = port_fd
    spec = ConfinementSpec(
        program="vtpm-relay",
        allow_list=AllowList.RELAY,
        target=RELAY_TARGET,
        keep_fds=tuple(fds),
        hold_fd=int(RelayFd.HOLD),
        target_args=plan.args.to_json(),
        **identity(plan),
    )
    return ConfinedProcess(spawn(spec, fds=fds, log_fd=plan.log_fd))


def _end(process: ConfinedProcess) -> None:
    """End a process whose start has failed half-way."""
    process.kill()
    process.reap()


def _status_field(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
