"""`make demo`: a real Linux guest whose /dev/tpm0 is a vTPM, from nothing to a value that outlives a reboot.

Uses the commands that a user types, in a folder of its own, and leaves nothing behind.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from uuid import uuid4

from tests.support.guest import Guest, GuestConfig, Reboot, build_image
from tests.support.host import BIN, Host

NAME = "web1"
NV_INDEX = "0x1500016"
NV_TEXT = "written before the reboot"


def main() -> int:
    """Run the demo; return the exit status."""
    _say("making the guest: Debian's cloud kernel, busybox, tpm2-tools")
    image = build_image()
    with Host() as host, tempfile.TemporaryDirectory(prefix="vtpm-demo-") as folder:
        vtpm = f"vtpm --socket {host.socket}"
        _show(f"$ {vtpm} status", host.cli("status").stdout)
        uuid = str(uuid4())
        _show(f"$ {vtpm} create {NAME} --vm-uuid {uuid}", host.cli("create", NAME, "--vm-uuid", uuid).stdout)
        _say(f"{vtpm} run {NAME} -- qemu-system-x86_64 …   (emulated: takes some seconds)")
        config = GuestConfig(
            image=image, command_prefix=(str(BIN / "vtpm"), "--socket", str(host.socket), "run", NAME, "--")
        )
        with Guest(config, Path(folder)) as guest:
            _show("guest# ls -l /dev/tpm0", guest.check("ls -l /dev/tpm0"))
            _show("$ ps: the vTPM in a process of its own", _process(host))
            guest.check(f"tpm2_nvdefine -Q -s {len(NV_TEXT)} {NV_INDEX}")
            guest.check(f"printf '{NV_TEXT}' | tpm2_nvwrite -Q -i - {NV_INDEX}")
            guest.check("tpm2_pcrextend 14:sha256=" + "ab" * 32)
            _show("guest# tpm2_pcrread, after firmware measured", guest.check("tpm2_pcrread sha256:0,1,2,4,5,7,14"))
            _say("guest# reboot")
            guest.reboot(Reboot.ORDERLY)
            _show("guest# tpm2_pcrread, measured anew", guest.check("tpm2_pcrread sha256:0,1,2,4,5,7,14"))
            outlived = guest.check(f"tpm2_nvread {NV_INDEX}")
            _show(f"guest# tpm2_nvread {NV_INDEX}", outlived)
            if NV_TEXT not in outlived:
                _say("the NV value did not outlive the reboot")
                return 1
            _show(f"$ {vtpm} list", host.cli("list").stdout)
            guest.power_off()
    return 0


def _process(host: Host) -> str:
    with host.client() as client:
        pid = client.show(NAME).pid
    status = Path(f"/proc/{pid}/status").read_text()
    wanted = ("Uid:", "CapEff:", "NoNewPrivs:", "Seccomp:")
    lines = [line for line in status.splitlines() if line.startswith(wanted)]
    return "\n".join([Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip(), *lines])


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _show(title: str, text: str) -> None:
    _say(title)
    print(text.rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
