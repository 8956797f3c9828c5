"""The back-end of Xen's PV TPM on real Xen, with the kernel's own front-end in unmodified guests on the other side."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.guest import checks12
from tests.support.in_guest import with_vtpm
from tests.support.xen import DOM0, FRONT_END, GUEST, XenGuest, XenGuestConfig, XenHost

pytestmark = pytest.mark.timeout(240)
PROGRAM = "/usr/bin/pv_tpm"
FIXTURE = Path(__file__).parent / "fixture" / "pv_tpm.py"
BACKEND = "/local/domain/0/backend/vtpm"
UUID_12, UUID_20 = "8c1d3a52-0f4c-4f0f-9d6d-3f6c6f1f7a01", "8c1d3a52-0f4c-4f0f-9d6d-3f6c6f1f7a02"
START_TIMEOUT_S = 90
NEEDS = ("cffi",)
# What a domain needs that serves another, beside the program.
LIBRARIES = ("libxencall1", "libxenevtchn1", "libxengnttab1", "libxenstore4", "libxentoolcore1", "libxentoollog1")
DOMAIN_MEMORY_MIB = 320
# Of TPM 2.0: Startup(CLEAR), and GetRandom of eight bytes.
STARTUP, GET_RANDOM = "80010000000c000001440000", "80010000000c0000017b0008"


class Backend:
    """One back-end process, in dom0 or in a domain of its own."""

    def __init__(self, place: XenHost | XenGuest, uuid: str, version: str) -> None:
        self._place = place
        self.uuid = uuid
        self._version = version
        self._starts = 0
        self.start()

    def start(self) -> None:
        """Start it, with another TPM each time, and wait until it serves."""
        self._starts += 1
        self._log = f"/run/{self.uuid}.{self._starts}"
        command = f"setsid python3.11 -I -u {PROGRAM} {self.uuid} {self._version} > {self._log} 2>&1 & echo $!"
        self.pid = int(self._place.check(command))
        script = f"until grep -q serves {self._log} || ! test -d /proc/{self.pid}; do sleep 0.5; done; cat {self._log}"
        assert "serves" in self._place.check(script, START_TIMEOUT_S)

    def kill(self) -> None:
        self._place.check(f"kill -9 {self.pid}; while test -d /proc/{self.pid}; do sleep 0.1; done")

    def said(self) -> str:
        return self._place.check(f"cat {self._log}")

    def wait_holding(self, pages: int) -> None:
        """Wait until it has mapped so many pages of other domains."""
        self._place.check(f"until [ $(grep -c gntdev /proc/{self.pid}/maps) = {pages} ]; do sleep 0.1; done")


@dataclass(frozen=True)
class Hosted:
    """Two back-ends, and a guest of each whose driver is loaded."""

    host: XenHost
    backends: dict[str, Backend]
    guests: dict[str, XenGuest]


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    dom0 = with_vtpm(replace(DOM0, name="dom0-pv-tpm", files={**DOM0.files, PROGRAM: FIXTURE.read_bytes()}), {}, NEEDS)
    with XenHost(tmp_path_factory.mktemp("xen"), dom0=dom0) as host:
        backends = {version: Backend(host, uuid, version) for version, uuid in (("1.2", UUID_12), ("2.0", UUID_20))}
        guests = {version: start_guest(host, backend) for version, backend in backends.items()}
        yield Hosted(host, backends, guests)


def start_guest(host: XenHost, backend: Backend, domain: str = "0", memory_mib: int = 128) -> XenGuest:
    device = f"backend={domain},uuid={backend.uuid}"
    guest = host.start_guest(f"guest-{backend.uuid[-2:]}", XenGuestConfig(memory_mib, (device,)))
    guest.check(f"insmod {FRONT_END} && test -c /dev/tpm0")
    return guest


def channels(host: XenHost, domid: int) -> str:
    """Event channels of dom0 to a domain."""
    return host.run(f"/usr/lib/xen-4.17/bin/lsevtchn 0 | grep 'Remote Domain {domid},'").stdout


def test_kernel_uses_its_tpm_when_it_is_a_tpm_1_2(hosted: Hosted) -> None:
    guest = hosted.guests["1.2"]
    assert guest.check("cat /sys/class/tpm/tpm0/tpm_version_major") == "1"
    assert (
        "IBM" in bytes.fromhex(re.findall(r"0x([0-9a-f]{8})", guest.check("cat /sys/class/tpm/tpm0/caps"))[0]).decode()
    )
    checks12.check_extend(guest)


def test_tpm_2_0_answers_its_own_guest_when_its_commands_are_sent_raw(hosted: Hosted) -> None:
    script = "exec 4<>/dev/tpm0; echo {} | xxd -r -p >&4; dd bs=4096 count=1 <&4 2> /dev/null | xxd -p"
    assert hosted.guests["2.0"].check(script.format(STARTUP)) == "80010000000a00000000"
    answers = {hosted.guests["2.0"].check(script.format(GET_RANDOM)) for _ in range(3)}
    assert all(re.fullmatch("800100000014000000000008[0-9a-f]{16}", answer) for answer in answers)
    assert len(answers) == 3


def test_tpm_is_the_same_when_the_front_end_comes_again(hosted: Hosted) -> None:
    guest = hosted.guests["1.2"]
    checks12.check_extend(guest)
    before = checks12.read_pcrs(guest)
    driver = "/sys/bus/xen/drivers/vtpm"
    guest.check(f"echo vtpm-0 > {driver}/unbind && ! test -e /dev/tpm0")
    hosted.backends["1.2"].wait_holding(0)
    guest.check(f"echo vtpm-0 > {driver}/bind && test -c /dev/tpm0")
    assert checks12.read_pcrs(guest) == before
    hosted.backends["1.2"].wait_holding(1)


def test_device_goes_and_comes_when_the_toolstack_takes_and_gives_it(hosted: Hosted) -> None:
    host, guest = hosted.host, hosted.guests["2.0"]
    host.check(f"xl vtpm-detach {guest.name} 0")
    assert UUID_20 not in host.check(f"xl vtpm-list {guest.name}")
    hosted.backends["2.0"].wait_holding(0)
    guest.check("while test -e /dev/tpm0; do sleep 0.1; done")
    host.check(f"xl vtpm-attach {guest.name} backend=0 uuid={UUID_20}")
    guest.check("until test -c /dev/tpm0; do sleep 0.1; done")


def test_guest_is_served_on_when_another_back_end_comes_for_a_killed_one(hosted: Hosted) -> None:
    backend, guest = hosted.backends["1.2"], hosted.guests["1.2"]
    backend.kill()
    backend.start()
    # It has a TPM of its own, which nobody has started yet.
    transmit = functools.partial(checks12.transmit, guest)
    transmit(0x99, bytes.fromhex("0001"))
    checks12.check_extend(guest)
    assert "connected" in backend.said()


def test_nothing_is_held_when_the_guests_are_gone(hosted: Hosted) -> None:
    host = hosted.host
    assert all(channels(host, guest.domid) for guest in hosted.guests.values())
    hosted.guests["1.2"].power_off()
    hosted.guests["2.0"].destroy()
    for version, guest in hosted.guests.items():
        host.check(f"while xenstore-exists {BACKEND}/{guest.domid}; do sleep 0.1; done")
        hosted.backends[version].wait_holding(0)
        assert channels(host, guest.domid) == ""
    again = start_guest(host, hosted.backends["2.0"])
    assert again.domid not in {guest.domid for guest in hosted.guests.values()}
    hosted.backends["2.0"].wait_holding(1)


def test_guest_has_its_tpm_when_that_runs_in_an_unprivileged_domain(tmp_path: Path) -> None:
    spec = replace(
        GUEST,
        name="vtpm-domain",
        modules=("xen-gntdev", "xen-evtchn"),
        fetched=LIBRARIES,
        files={PROGRAM: FIXTURE.read_bytes()},
    )
    # One image for both: the guest does without most of it.
    with XenHost(tmp_path, guest=with_vtpm(spec, {}, NEEDS)) as host:
        domain = host.start_guest("vtpm", XenGuestConfig(DOMAIN_MEMORY_MIB))
        backend = Backend(domain, UUID_12, "1.2")
        guest = start_guest(host, backend, domain.name, DOMAIN_MEMORY_MIB)
        checks12.check_extend(guest)
        backend.wait_holding(1)
        place = f"/local/domain/{domain.domid}/backend/vtpm/{guest.domid}"
        host.check(f"xenstore-exists {place}")
        assert host.run(f"xenstore-exists {BACKEND}").status != 0
        guest.power_off()
        backend.wait_holding(0)
        assert host.run(f"xenstore-exists {place}").status != 0
