"""Runs a Linux guest in QEMU (TCG) whose TPM is an emulator behind a unix socket.

Knows nothing of who serves that socket: vtpmd or another make. For tests and the demo. All waits are
bounded and end at once when QEMU dies; errors carry the tail of the guest's console.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import UUID

from tests.support.guest.agent import Agent, Result
from tests.support.guest.channel import Deadline, GuestEnded, GuestError, LineChannel
from tests.support.guest.image import Image
from tests.support.guest.qmp import Qmp

BOOT_TIMEOUT_S = 90.0
KERNEL_ARGUMENTS = "console=ttyS0,115200 loglevel=5 random.trust_cpu=on"
_OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_OVMF_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
_CONSOLE_TAIL_BYTES = 6000
_MIGRATION_ENDS = frozenset({"completed", "failed", "cancelled"})


class TpmModel(enum.StrEnum):
    """QEMU's TPM front-ends."""

    CRB = "tpm-crb"
    TIS = "tpm-tis"


class Firmware(enum.Enum):
    """What boots the guest and makes the first measurements."""

    SEABIOS = "seabios"
    OVMF = "ovmf"


class Reboot(enum.Enum):
    """How a guest is made to boot again.

    Each takes 2 to 6 s under TCG, and SeaBIOS answers every one with one or two more resets of its own: the TPM is
    initialised several times before it is started.
    """

    ORDERLY = "orderly"
    """The guest's kernel shuts its devices down, so its driver sends TPM2_Shutdown."""
    SUDDEN = "sudden"
    """The guest's kernel resets the machine at once; the TPM is told nothing."""
    HOST = "host"
    """QMP system_reset, the machine's reset button."""


@dataclass(frozen=True)
class Hypervisor:
    """What is booted in the kernel's place, by multiboot, and starts the kernel in its first domain.

    Args:
        file: the hypervisor, uncompressed.
        arguments: its command line.
    """

    file: Path
    arguments: str


@dataclass(frozen=True)
class GuestConfig:
    """One virtual machine.

    Args:
        image: kernel and initramfs, booted directly by either firmware.
        tpm_control_socket: what `-chardev socket,path=` takes; None when `command_prefix` adds the TPM or the
            guest has none.
        tpm_model: CRB speaks TPM 2.0 alone, TIS both.
        firmware: OVMF gets a copy of its variable store in the work folder, kept for later boots.
        memory_mib: 192 is enough for the TPM image under SeaBIOS; OVMF needs 256 to place the initramfs.
        uuid: the machine's, as SMBIOS tells it; None for QEMU's default.
        boot_folder: None, or a folder that is seen as a FAT disk, whose EFI/BOOT/BOOTX64.EFI the firmware boots
            instead of the image; then only OVMF boots, and `kernel_arguments` has no effect.
        drives: raw images, seen as /dev/vda, /dev/vdb, ... by guests that load virtio_blk.
        kernel_arguments: appended to the kernel's command line.
        extra_arguments: appended to QEMU's command line.
        command_prefix: put before QEMU's command, such as `vtpm run NAME --`; it must exec or wait for QEMU.
        ports: names of virtio-serial ports, for guests that load virtio_console; see `Guest.port`.
        hypervisor: None, or what is booted before the kernel.
        cpu: QEMU's model of it.
        processors: how many.
    """

    image: Image
    tpm_control_socket: Path | None = None
    tpm_model: TpmModel = TpmModel.CRB
    firmware: Firmware = Firmware.SEABIOS
    memory_mib: int = 256
    uuid: UUID | None = None
    boot_folder: Path | None = None
    drives: tuple[Path, ...] = ()
    kernel_arguments: str = ""
    extra_arguments: tuple[str, ...] = ()
    command_prefix: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    hypervisor: Hypervisor | None = None
    cpu: str = "max"
    processors: int = 1


class Guest:
    """A guest that runs while the `with` block does; entering it waits for the agent, leaving it kills QEMU.

    Args:
        config: the machine.
        work_folder: console log, QEMU's log and UEFI variables stay here; made when absent.
        boot_timeout_s: bound on one boot, firmware included.
        incoming: it is migrated here, so it boots nothing; then `adopt` says from where.
    """

    def __init__(
        self, config: GuestConfig, work_folder: Path, boot_timeout_s: float = BOOT_TIMEOUT_S, *, incoming: bool = False
    ) -> None:
        self._config = config
        self._incoming = incoming
        self._work_folder = work_folder
        self._boot_timeout_s = boot_timeout_s
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: Agent | None = None
        self._qmp: Qmp | None = None
        self._ports: dict[str, LineChannel] = {}
        self.boot_id = ""
        """Differs in every boot; drawn by the guest's kernel."""

    @property
    def console_log(self) -> Path:
        return self._work_folder / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self._work_folder / "qemu.log"

    @property
    def process_id(self) -> int:
        """Of QEMU, or of what `command_prefix` names."""
        return self._running().pid

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise GuestError("the guest is not started")
        return self._qmp

    def port(self, name: str) -> LineChannel:
        """The host's end of a virtio-serial port."""
        return self._ports[name]

    def __enter__(self) -> Guest:
        try:
            with self._with_console():
                self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, script: str, timeout_s: float = 30.0) -> Result:
        """Run a shell script in the guest, with pipefail set; any exit status is a result."""
        with self._with_console():
            return self._running_agent().run(script, timeout_s)

    def check(self, script: str, timeout_s: float = 30.0) -> str:
        """Run a shell script that must end with status 0; returns its standard output."""
        result = self.run(script, timeout_s)
        if result.status != 0:
            raise GuestError(f"in the guest, status {result.status} of:\n{script}\n{result.stdout}\n{result.stderr}")
        return result.stdout

    def reboot(self, how: Reboot = Reboot.ORDERLY) -> None:
        """Make the guest boot again and wait for its agent."""
        before = self.boot_id
        deadline = Deadline(self._boot_timeout_s)
        with self._with_console():
            agent = self._running_agent()
            match how:
                case Reboot.ORDERLY:
                    agent.send("reboot -f", deadline)
                case Reboot.SUDDEN:
                    agent.send("echo b > /proc/sysrq-trigger", deadline)
                case Reboot.HOST:
                    self.qmp.execute("system_reset")
            self.boot_id = agent.wait_ready(deadline)
        if self.boot_id == before:
            raise GuestError("the guest's agent came back without a boot")

    def migrate(self, other: Guest, uri: str, timeout_s: float = 60.0) -> str:
        """Have this guest migrated to an emulator that waits for one, and return how that ended; see wait_migrated.

        With return-path, without which QEMU takes a guest for arrived whose TPM was refused.
        """
        for one in (self, other):
            one.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
        other.qmp.execute("migrate-incoming", uri=uri)
        self.qmp.execute("migrate", uri=uri)
        return self.wait_migrated(timeout_s)

    def wait_migrated(self, timeout_s: float = 60.0) -> str:
        """Wait for the end of a migration from here, and return how it ended: completed, failed or cancelled."""
        deadline = Deadline(timeout_s)
        while (status := str(self.qmp.execute("query-migrate").get("status"))) not in _MIGRATION_ENDS:
            if not deadline.remaining_s():
                raise GuestError(f"the migration is {status}")
            time.sleep(0.05)
        return status

    def adopt(self, source: Guest) -> None:
        """Say which guest this one is now, its agent with it."""
        self.boot_id = source.boot_id
        self._running_agent().go_on(source._running_agent())

    def suspend(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Suspend the guest to RAM (ACPI S3), and wake it again; returns when it is back where it was.

        Once in a boot: then QEMU 7.2's q35 under SeaBIOS, with a TPM or without one, neither suspends again nor
        powers off, until it is reset.

        Args:
            meanwhile: called while it is suspended.
        """
        deadline = Deadline(self._boot_timeout_s)
        with self._with_console():
            agent = self._running_agent()
            script = "echo mem > /sys/power/state"
            number = agent.send(script, deadline)
            self.qmp.wait_event("SUSPEND", self._boot_timeout_s)
            meanwhile()
            self.qmp.execute("system_wakeup")
            # Nothing may be sent before this answer: the firmware, which comes first, would take it as typed keys.
            result = agent.finish(script, number, deadline)
        if result.status != 0:
            raise GuestError(f"the guest did not suspend: {result.stderr}")

    def power_off(self, timeout_s: float = 30.0) -> None:
        """Power the guest off from inside, in order, and wait until QEMU has ended with status 0."""
        with self._with_console():
            self._running_agent().send("poweroff -f", Deadline(timeout_s))
            self.wait_ended(timeout_s)

    def wait_ended(self, timeout_s: float) -> None:
        """Wait until QEMU has ended by itself with status 0."""
        try:
            status = self._running().wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"QEMU did not end within {timeout_s} s") from error
        if status != 0:
            raise GuestError(f"QEMU ended with status {status}: {_tail(self.qemu_log)}")

    def kill(self) -> None:
        """Kill QEMU at once, as a host's power loss would."""
        process = self._running()
        if process.returncode is None:
            # A group of its own, so that what a command prefix started goes too. The group is surely this one while
            # its leader was not waited for.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def close(self) -> None:
        """Kill QEMU if it runs and close the channels. Calling it again does nothing."""
        if self._process is not None:
            self.kill()
        self._cleanup.close()

    def console(self) -> str:
        """The last part of what the guest's kernel and firmware wrote to the first serial port."""
        return _tail(self.console_log)

    def _start(self) -> None:
        deadline = Deadline(self._boot_timeout_s)
        self._work_folder.mkdir(parents=True, exist_ok=True)
        # Socket paths are limited to 107 bytes, which a test's own folder may exceed.
        sockets = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="vtpm-guest-")))
        qmp_channel = self._listen("QMP", sockets / "qmp")
        agent_channel = self._listen("agent", sockets / "agent")
        self._ports = {name: self._listen(name, sockets / f"port-{name}") for name in self._config.ports}
        with self.qemu_log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(sockets), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        qmp_channel.accept(self._process.pid, deadline)
        agent_channel.accept(self._process.pid, deadline)
        for port in self._ports.values():
            port.accept(self._process.pid, deadline)
        self._qmp = Qmp(qmp_channel)
        self._qmp.negotiate(deadline)
        self._agent = Agent(agent_channel)
        if self._incoming:
            return
        self.boot_id = self._agent.wait_ready(deadline)

    def _listen(self, name: str, path: Path) -> LineChannel:
        channel = LineChannel(name, path)
        self._cleanup.callback(channel.close)
        return channel

    def _command(self, sockets: Path) -> list[str]:
        config = self._config
        command = [
            *config.command_prefix,
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35,accel=tcg", "-cpu", config.cpu, "-smp", str(config.processors)),
            *("-m", str(config.memory_mib)),
            *("-chardev", f"file,id=console,path={self.console_log},append=on", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,path={sockets / 'agent'}", "-serial", "chardev:agent"),
            *("-chardev", f"socket,id=qmp,path={sockets / 'qmp'}", "-mon", "chardev=qmp,mode=control"),
            *self._boot_source(),
        ]
        if config.uuid is not None:
            command += ["-uuid", str(config.uuid)]
        if config.tpm_control_socket is not None:
            command += [
                *("-chardev", f"socket,id=chrtpm,path={config.tpm_control_socket}"),
                *("-tpmdev", "emulator,id=tpm0,chardev=chrtpm"),
                *("-device", f"{config.tpm_model},tpmdev=tpm0"),
            ]
        if config.firmware is Firmware.OVMF:
            command += self._uefi_flash()
        if config.ports:
            command += ["-device", "virtio-serial-pci"]
        for name in config.ports:
            command += ["-chardev", f"socket,id=port-{name},path={sockets / f'port-{name}'}"]
            command += ["-device", f"virtserialport,chardev=port-{name},name={name}"]
        for drive in config.drives:
            command += ["-drive", f"if=virtio,format=raw,file={drive}"]
        return [*command, *config.extra_arguments]

    def _boot_source(self) -> list[str]:
        config = self._config
        if config.boot_folder is not None:
            return ["-drive", f"if=virtio,format=raw,readonly=on,file=fat:{config.boot_folder}"]
        image = config.image
        arguments = f"{KERNEL_ARGUMENTS} {config.kernel_arguments}".strip()
        if config.hypervisor is None:
            return ["-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", arguments]
        # Multiboot modules stand in one list, each with its own command line; a comma within one is doubled.
        modules = (f"{image.kernel} {arguments}", str(image.initramfs))
        return [
            *("-kernel", str(config.hypervisor.file), "-append", config.hypervisor.arguments),
            *("-initrd", ",".join(module.replace(",", ",,") for module in modules)),
        ]

    def _uefi_flash(self) -> list[str]:
        variables = self._work_folder / "uefi-variables.fd"
        if not variables.exists():
            shutil.copyfile(_OVMF_VARS, variables)
        return [
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_OVMF_CODE}"),
            *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
        ]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise GuestError("the guest is not started")
        return self._process

    def _running_agent(self) -> Agent:
        if self._agent is None:
            raise GuestError("the guest is not started")
        return self._agent

    @contextlib.contextmanager
    def _with_console(self) -> Iterator[None]:
        try:
            yield
        except GuestError as error:
            kind = GuestEnded if isinstance(error, GuestEnded) else GuestError
            raise kind(
                f"{error}\n--- end of {self.console_log}\n{self.console()}\n--- end of {self.qemu_log}\n"
                f"{_tail(self.qemu_log)}"
            ) from error


def _tail(path: Path) -> str:
    if not path.exists():
        return "(absent)"
    return path.read_bytes()[-_CONSOLE_TAIL_BYTES:].decode("utf-8", "replace")
