"""Debian's swtpm as the emulator behind a guest's TPM: the peer that harness and checks are tried against."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def swtpm_emulator(state_folder: Path, tpm_version: str = "2.0") -> Iterator[Path]:
    """Run swtpm for QEMU's emulator protocol while the block runs.

    Args:
        state_folder: swtpm's state, kept afterwards; made when absent. An empty one gets a new TPM.
        tpm_version: "2.0" or "1.2".
    Yields:
        Path of the control socket, for one client: swtpm ends when QEMU shuts it down at its own end.
    """
    state_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vtpm-swtpm-") as folder:
        control = Path(folder) / "ctrl"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # Bound here and handed over, so that a client never finds the path absent.
            listener.bind(str(control))
            listener.listen(1)
            process = subprocess.Popen(
                [
                    *("swtpm", "socket", "--tpmstate", f"dir={state_folder}"),
                    *(("--tpm2",) if tpm_version == "2.0" else ()),
                    *("--ctrl", f"type=unixio,fd={listener.fileno()}"),
                ],
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        try:
            yield control
        finally:
            process.kill()
            process.wait(10)
