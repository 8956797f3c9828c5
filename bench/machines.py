"""A vTPM in a process and one in a virtual machine of its own, beside Debian's swtpm, in one run. For bench.

Virtual machines are emulated (TCG), so that the figures are the same kind on every host.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.guest import Guest, swtpm_emulator
from tests.support.host import Host
from tests.support.image.building import build_vtpmd

from bench import in_guest
from bench.commands import READS
from bench.figures import Comparison, compare
from bench.image import START_RATIO_LIMIT, bare_boot, bare_initramfs
from bench.measure import alternate
from bench.peers import Peer, ours, pss_kib, swtpm
from vtpm.domains.qemu import newest_image
from vtpm.image.opened import OpenImage
from vtpm.tpm.types import TpmVersion
from vtpm.wire.api import DomainName

KINDS = (DomainName.PROCESS, DomainName.QEMU)
BLOCKS, ROUND_TRIPS = 10, 200
GUEST_BLOCKS, GUEST_ROUND_TRIPS = 6, 100
STARTS = 5


@dataclass(frozen=True)
class MachineFigures:
    """Medians over some starts: seconds to the first answer, KiB of PSS while all run; sizes in bytes.

    `bare_s`: a boot of the same kernel with an initramfs that only powers off. `ratio`: the machine's start to it.
    """

    starts: int
    process_start_s: float
    machine_start_s: float
    swtpm_start_s: float
    bare_s: float
    ratio: float
    process_pss_kib: float
    machine_pss_kib: float
    relay_pss_kib: float
    swtpm_pss_kib: float
    kernel_bytes: int
    initramfs_bytes: int

    @property
    def met(self) -> bool:
        """Whether a machine starts as soon as it is to."""
        return self.ratio <= START_RATIO_LIMIT


@contextlib.contextmanager
def host_with_image() -> Iterator[tuple[Host, Path]]:
    """Yield a host that has an image, and the image's folder."""
    with tempfile.TemporaryDirectory(prefix="vtpm-bench-") as work:
        images = build_vtpmd(Path(work))
        with Host(settings=f'vm_accelerator = "tcg"\nvm_images = "{images}"\n') as host:
            yield host, newest_image(images)


def roundtrips(host: Host) -> list[Comparison]:
    """Time the reading commands on both kinds over their sockets, each beside swtpm."""
    rows = []
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(swtpm())
        for kind in KINDS:
            mine = stack.enter_context(ours(host, f"socket-{kind}", kind))
            for name, command in READS.items():
                exchanges = mine.client.exchange, peer.client.exchange
                rows.append(alternate(f"{name}, {kind}", lambda data=command: data, *exchanges, BLOCKS, ROUND_TRIPS))
    return rows


def guests(host: Host) -> list[Comparison]:
    """Time the reading commands at /dev/tpm0 of guests with both kinds, and of one with swtpm, in turns."""
    with tempfile.TemporaryDirectory(prefix="vtpm-bench-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        made = in_guest.image(work)
        client = stack.enter_context(host.client())
        booted: dict[str, Guest] = {}
        for kind in KINDS:
            name = f"guest-{kind}"
            client.create(name, TpmVersion.V2_0, kind)
            control = Path(client.start(name).control_socket)
            booted[str(kind)] = stack.enter_context(in_guest.booted(made, control, work / name))
        control = stack.enter_context(swtpm_emulator(work / "tpm"))
        booted["swtpm"] = stack.enter_context(in_guest.booted(made, control, work / "guest-swtpm"))
        rows = []
        for name, command in READS.items():
            times: dict[str, list[list[float]]] = {who: [] for who in booted}
            for number in range(GUEST_BLOCKS + 1):
                for who, guest in booted.items():
                    block = in_guest.time_block(guest, command, GUEST_ROUND_TRIPS)
                    if number:
                        times[who].append(block)
            rows += [compare(f"{name}, {kind}", times[str(kind)], times["swtpm"]) for kind in KINDS]
    return rows


def footprint(host: Host, folder: Path) -> MachineFigures:
    """Start some of each in turns, and boot the bare kernel between them; then look at the memory of all."""
    processes: list[Peer] = []
    machines: list[Peer] = []
    theirs: list[Peer] = []
    bares = []
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(OpenImage(folder))
        bare = bare_initramfs(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtpm-bench-"))))
        relays = []
        for number in range(STARTS):
            processes.append(stack.enter_context(ours(host, f"process{number}")))
            theirs.append(stack.enter_context(swtpm()))
            bares.append(bare_boot(opened, bare)[0])
            name = f"machine{number}"
            machines.append(stack.enter_context(ours(host, name, DomainName.QEMU)))
            relays.append(_pid_of(f"vtpm-relay {name}"))
        machine_s, bare_s = statistics.median(peer.start_s for peer in machines), statistics.median(bares)
        return MachineFigures(
            starts=STARTS,
            process_start_s=statistics.median(peer.start_s for peer in processes),
            machine_start_s=machine_s,
            swtpm_start_s=statistics.median(peer.start_s for peer in theirs),
            bare_s=bare_s,
            ratio=machine_s / bare_s,
            process_pss_kib=statistics.median(peer.pss_kib() for peer in processes),
            machine_pss_kib=statistics.median(peer.pss_kib() for peer in machines),
            relay_pss_kib=statistics.median(map(pss_kib, relays)),
            swtpm_pss_kib=statistics.median(peer.pss_kib() for peer in theirs),
            kernel_bytes=opened.manifest.kernel.size,
            initramfs_bytes=opened.manifest.initramfs.size,
        )


def _pid_of(title: str) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().split(b"\0")[0].decode() == title:
                return int(folder.name)
    raise RuntimeError(f"there is no process {title}")
