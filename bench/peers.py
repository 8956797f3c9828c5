"""The two TPMs side by side: one of ours through the real services, and Debian's swtpm."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.swtpm import SwtpmPlatform

from bench.client import RawClient, succeed
from bench.commands import PCR_READ
from vtpm.tpm.types import Startup
from vtpm.wire.api import DomainName


@dataclass(frozen=True)
class Peer:
    """A TPM that answers: its client, process id, and how long from the order to start to the first answer."""

    client: RawClient
    pid: int
    start_s: float

    def pss_kib(self) -> int:
        """Return the proportional set size of the TPM's process, KiB."""
        return pss_kib(self.pid)


def pss_kib(pid: int) -> int:
    """Return the proportional set size of a process, KiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the kernel gives no PSS for process {pid}")
    return int(found[1])


@contextlib.contextmanager
def ours(host: Host, name: str, domain: DomainName = DomainName.PROCESS) -> Iterator[Peer]:
    """Create and start a vTPM as a user does, confined as users get it; the time is that of starting it."""
    with host.client() as manager:
        manager.create(name, domain=domain)
        begin = time.perf_counter()
        vtpm = manager.start(name, Startup.CLEAR)
        client = RawClient(Path(vtpm.tcti.removeprefix("swtpm:path=")))
        try:
            succeed(client.exchange, PCR_READ)
            if vtpm.pid is None:
                raise RuntimeError(f"{name} runs without a process id")
            yield Peer(client, vtpm.pid, time.perf_counter() - begin)
        finally:
            client.close()


@contextlib.contextmanager
def swtpm() -> Iterator[Peer]:
    """Start a new swtpm with a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="vb-"))
    try:
        begin = time.perf_counter()
        with SwtpmPlatform(folder) as process:
            client = RawClient(process.socket_path)
            try:
                succeed(client.exchange, PCR_READ)
                yield Peer(client, process.pid, time.perf_counter() - begin)
            finally:
                client.close()
    finally:
        shutil.rmtree(folder)
