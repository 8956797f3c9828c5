"""A vtpmd behind a relay, without the virtual machine around it: the same two programs, socket pairs for the ports.

The vtpmd is what the first process of the virtual machine runs once its ports are open.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tests.support import vtpmd as plain
from tests.support.vtpmd import TIMEOUT_S, Vtpmd
from vtpm.foreign.swtpm_engine import SwtpmEngine
from vtpm.foreign.swtpm_process import SWTPM
from vtpm.instance.vm_main import serve
from vtpm.relay.main import prepare
from vtpm.wire.instance_spec import InstanceArgs

MANAGER_LINK_AT = 1
"""Of the descriptors in the order of InstanceFd; the guest port is there for a relay."""


class RelayedVtpmd(Vtpmd):
    """See the module. `process` is the relay, which ends as the vtpmd says; `vm` is the vtpmd."""

    vm: subprocess.Popen[bytes]
    machine = "vm"
    """Which of MACHINES it is."""

    def _start(self, args: InstanceArgs, fds: list[int]) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            relay_fds = [*fds]
            relay_fds[MANAGER_LINK_AT] = ours.fileno()
            self.vm = self._run(
                "tests.support.relayed", f"{self.machine} {self.folder}", [theirs.fileno(), fds[MANAGER_LINK_AT]]
            )
            return self._run("tests.support.relayed", json.dumps(args.to_json()), relay_fds)

    def kill(self) -> None:
        """End both, as the launcher does when one has ended."""
        self.vm.kill()
        super().kill()
        self.vm.wait(TIMEOUT_S)

    def processor_s(self) -> float:
        """Of both."""
        return super().processor_s() + plain.processor_s(self.vm.pid)


class ForeignVtpmd(RelayedVtpmd):
    """The same with Debian's swtpm as the TPM."""

    machine = "vm-swtpm"


def _serve_vtpmd(folder: Path, guest_fd: int, manager_fd: int) -> int:
    return serve(guest_fd, manager_fd)


def _serve_swtpm(folder: Path, guest_fd: int, manager_fd: int) -> int:
    place = Path(tempfile.mkdtemp(dir=folder))
    # In a machine it ends with that; here, with the process whose death plays it.
    program = place / "swtpm"
    program.write_text(f'#!/bin/sh\nexec setpriv --pdeathsig KILL {SWTPM} "$@"\n')
    program.chmod(0o755)
    for fd in (guest_fd, manager_fd):
        os.set_inheritable(fd, False)
    return serve(guest_fd, manager_fd, partial(SwtpmEngine, folder=str(place), program=str(program)))


MACHINES: Mapping[str, Callable[[Path, int, int], int]] = {"vm": _serve_vtpmd, "vm-swtpm": _serve_swtpm}


def _main(args: str, fds: Sequence[int]) -> int:
    machine, _, folder = args.partition(" ")
    if machine in MACHINES:
        guest_fd, manager_fd = fds
        return MACHINES[machine](Path(folder), guest_fd, manager_fd)
    return plain.run_prepared(prepare, args, fds)


if __name__ == "__main__":
    os._exit(_main(sys.argv[1], json.loads(sys.argv[2])))
