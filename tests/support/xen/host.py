"""A host with real Xen, and its guests: hypervisor and dom0 in QEMU (TCG), paravirtualised guests within.

For tests. All waits are bounded and end at once when QEMU dies; errors carry the tail of the consoles.
"""

from __future__ import annotations

import base64
import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.guest import Guest, GuestConfig, GuestEnded, GuestError, ImageSpec, Result, TpmModel
from tests.support.guest.agent import Agent
from tests.support.guest.channel import Deadline
from tests.support.guest.guest import Hypervisor
from tests.support.xen.images import (
    DOM0,
    GUEST,
    GUEST_INITRAMFS,
    GUEST_KERNEL,
    GUEST_LOGS,
    OWN_ROOT,
    PORTS,
    READY,
    build_host,
    fetch_hypervisor,
)

MEMORY_MIB = 2048
DOM0_MEMORY_MIB = 1024
BOOT_TIMEOUT_S = 120.0
GUEST_BOOT_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
TRANSFER_TIMEOUT_S = 60.0
FILES = "files"
CONSOLES = ("guest-1", "guest-2", "guest-3")
"""As many guests can run at a time as there are ports, each with its console on one."""
# QEMU's "max" has what this Xen lets dom0 see, and then cannot give it: dom0 dies early.
_CPU = "qemu64"


@dataclass(frozen=True)
class XenGuestConfig:
    """A guest's configuration, as far as it differs from the others'.

    Args:
        memory_mib: of the guest.
        vtpm: devices as xl.cfg(5) has them, such as "backend=0,uuid=...".
        kernel_arguments: appended to the kernel's command line.
    """

    memory_mib: int = 128
    vtpm: tuple[str, ...] = ()
    kernel_arguments: str = ""

    def xl(self, name: str) -> str:
        """Return it as a configuration file of xl. Source: xl.cfg(5)."""
        lines = [
            f'name = "{name}"',
            'type = "pv"',
            f'kernel = "{GUEST_KERNEL}"',
            f'ramdisk = "{GUEST_INITRAMFS}"',
            f'extra = "console=hvc0 loglevel=5 agent_port=/dev/hvc0 {self.kernel_arguments}"',
            f"memory = {self.memory_mib}",
            "vcpus = 1",
            'on_reboot = "destroy"',
            'on_crash = "destroy"',
            f"vtpm = [{', '.join(map(repr, self.vtpm))}]",
        ]
        return "\n".join(lines) + "\n"


class XenHost(Guest):
    """A host; entering it waits for dom0 and Xen's daemons, leaving it kills QEMU.

    `run` and `check` run scripts in dom0.

    Args:
        work_folder: logs stay here; made when absent.
        dom0: what dom0 holds.
        guest: what each guest holds.
        memory_mib, dom0_memory_mib: of the machine, and of that for dom0.
        tpm_control_socket: of the emulator of the machine's TPM, which dom0 has; None for a machine without one.
    """

    def __init__(
        self,
        work_folder: Path,
        *,
        dom0: ImageSpec = DOM0,
        guest: ImageSpec = GUEST,
        memory_mib: int = MEMORY_MIB,
        dom0_memory_mib: int = DOM0_MEMORY_MIB,
        tpm_control_socket: Path | None = None,
    ) -> None:
        config = GuestConfig(
            build_host(dom0, guest),
            tpm_control_socket,
            TpmModel.TIS,
            hypervisor=Hypervisor(
                fetch_hypervisor(),
                f"console=com1 com1=115200,8n1 dom0_mem={dom0_memory_mib}M,max:{dom0_memory_mib}M noreboot",
            ),
            kernel_arguments=f"console=hvc0 rdinit={OWN_ROOT}",
            cpu=_CPU,
            processors=2,
            memory_mib=memory_mib,
            ports=(FILES, *CONSOLES),
        )
        super().__init__(config, work_folder, BOOT_TIMEOUT_S)
        self._free_ports = list(CONSOLES)

    def __enter__(self) -> Self:
        super().__enter__()
        if self.run(f"test -e {READY}").status != 0:
            self.close()
            raise GuestError(f"Xen's daemons do not run in dom0:\n{self.console()}")
        return self

    def put(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Write a file in dom0; its folder is made."""
        place = shlex.quote(path)
        script = f'mkdir -p "$(dirname {place})" && head -n 1 < {PORTS}/{FILES} | base64 -d > {place}'
        self._transfer(f"{script} && chmod {mode:o} {place}", sent=base64.b64encode(content))

    def get(self, path: str) -> bytes:
        """Read a file in dom0."""
        script = f"{{ base64 -w 0 {shlex.quote(path)}; echo; }} > {PORTS}/{FILES}"
        return base64.b64decode(self._transfer(script))

    def _transfer(self, script: str, sent: bytes | None = None) -> bytes:
        """Run a script that reads a line from the port for files, or writes one to it, and return what it wrote."""
        # Not over the agent's own line: the kernel's terminal drops what comes faster than it is read.
        deadline = Deadline(TRANSFER_TIMEOUT_S)
        agent, port = self._running_agent(), self.port(FILES)
        with self._with_console():
            number = agent.send(script, deadline)
            received = b""
            if sent is None:
                received = port.read_line(deadline)
            else:
                port.send_line(sent, deadline)
            result = agent.finish(script, number, deadline)
            if result.status != 0:
                raise GuestError(f"in dom0, status {result.status} of:\n{script}\n{result.stderr}")
        return received

    def start_guest(self, name: str, config: XenGuestConfig | None = None) -> XenGuest:
        """Create a guest and wait for its agent.

        With a vTPM its back-end has to be there: xl waits some seconds for it, and then gives the guest up.

        Raises:
            GuestError: xl refused, or the guest did not boot in time.
        """
        file = f"/run/xen/{name}.cfg"
        self.put(file, (config or XenGuestConfig()).xl(name).encode())
        self.check(f"xl create -q {file}", GUEST_BOOT_TIMEOUT_S)
        port = self._free_ports.pop(0)
        domid = int(self.check(f"xl domid {name}"))
        # It waits for the console by itself.
        relay = self.check(
            f"setsid xenconsole {domid} --type pv --interactive <> {PORTS}/{port} >&0 2> /dev/null & echo $!"
        )
        guest = XenGuest(self, name, domid, port, int(relay))
        guest.wait_booted()
        return guest

    def forget(self, guest: XenGuest) -> None:
        """Let another guest have an ended one's port."""
        self.check(f"kill {guest.relay} 2> /dev/null; while test -d /proc/{guest.relay}; do sleep 0.1; done")
        self._free_ports.append(guest.port)


class XenGuest:
    """A guest, made by `XenHost.start_guest`.

    Args:
        host: where it runs.
        name, domid: as xl has them.
        port: of the host, with its console.
        relay: process id, in dom0, of what passes its console on.
    """

    def __init__(self, host: XenHost, name: str, domid: int, port: str, relay: int) -> None:
        self._host = host
        self.name = name
        self.domid = domid
        self.port = port
        self.relay = relay
        self._agent = Agent(host.port(port))
        self.boot_id = ""

    def wait_booted(self, timeout_s: float = GUEST_BOOT_TIMEOUT_S) -> None:
        """Wait for the agent of the guest's next boot."""
        with self._with_console():
            self.boot_id = self._agent.wait_ready(Deadline(timeout_s))

    def run(self, script: str, timeout_s: float = 30.0) -> Result:
        """Run a shell script in the guest, with pipefail set; any exit status is a result."""
        with self._with_console():
            return self._agent.run(script, timeout_s)

    def check(self, script: str, timeout_s: float = 30.0) -> str:
        """Run a shell script that must end with status 0; returns its standard output."""
        result = self.run(script, timeout_s)
        if result.status != 0:
            raise GuestError(f"in the guest, status {result.status} of:\n{script}\n{result.stdout}\n{result.stderr}")
        return result.stdout

    def console(self) -> str:
        """The last of what its kernel wrote; what its agent did is left out."""
        return self._host.run(f"grep -v ^@agent {GUEST_LOGS}/guest-{self.name}.log | tail -n 40").stdout

    def power_off(self) -> None:
        """Power it off from inside, and wait until xl has let go of it."""
        with self._with_console():
            self._agent.send("poweroff -f", Deadline(END_TIMEOUT_S))
        self._host.check(f"while xl domid {self.name} 2> /dev/null; do sleep 0.1; done", END_TIMEOUT_S)
        self._host.forget(self)

    def destroy(self) -> None:
        """End it at once, as a crash would."""
        self._host.check(f"xl destroy {self.name}", END_TIMEOUT_S)
        self._host.forget(self)

    @contextlib.contextmanager
    def _with_console(self) -> Iterator[None]:
        try:
            yield
        except GuestEnded:
            raise
        except GuestError as error:
            raise GuestError(f"{error}\n--- console of {self.name}\n{self.console()}") from error
