"""Xen itself: it boots, runs guests beside each other, and gives the kernel's front-end the vTPM that is configured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.xen import FRONT_END, XenGuest, XenGuestConfig, XenHost

BACKEND = "/local/domain/0/backend/vtpm"
UUIDS = ("8c1d3a52-0f4c-4f0f-9d6d-3f6c6f1f7a01", "8c1d3a52-0f4c-4f0f-9d6d-3f6c6f1f7a02")
# Says of each vTPM what a back-end says that waits for its front-end (2) and that lets go of it (6); it has no TPM.
STAND_IN = f"""
setsid xenstore-watch {BACKEND} | while read -r path; do
    case "$path" in */state)
        case "$(xenstore-read "$path" 2> /dev/null)" in
            1) xenstore-write "${{path%state}}feature-protocol-v2" 1 "$path" 2 ;;
            5) xenstore-write "$path" 6 ;;
        esac
    esac
done > /dev/null 2>&1 &
"""


@dataclass(frozen=True)
class Hosted:
    """A host with the stand-in, and two guests."""

    host: XenHost
    guests: tuple[XenGuest, ...]


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with XenHost(tmp_path_factory.mktemp("xen")) as host:
        host.check(STAND_IN)
        guests = (
            host.start_guest(f"guest{number}", XenGuestConfig(vtpm=(f"backend=0,uuid={uuid}",)))
            for number, uuid in enumerate(UUIDS)
        )
        yield Hosted(host, tuple(guests))


def test_host_lists_every_guest_when_two_run(hosted: Hosted) -> None:
    lines = hosted.host.check("xl list").splitlines()[1:]
    listed = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert listed == {"Domain-0": 0} | {guest.name: guest.domid for guest in hosted.guests}


def test_guests_run_apart_when_asked_at_the_same_time(hosted: Hosted) -> None:
    said = [guest.check("cat /proc/sys/kernel/random/boot_id") for guest in hosted.guests]
    assert said == [guest.boot_id for guest in hosted.guests]
    assert len({*said, hosted.host.boot_id}) == 3


@pytest.mark.parametrize("number", [0, 1])
def test_front_end_offers_its_ring_when_the_guest_has_a_vtpm(hosted: Hosted, number: int) -> None:
    host, guest = hosted.host, hosted.guests[number]
    device = f"/local/domain/{guest.domid}/device/vtpm/0"
    # Nobody answers, so that it does not end.
    guest.check(f"insmod {FRONT_END} > /dev/null 2>&1 &")
    host.check(f"until [ $(xenstore-read {device}/state) = 3 ]; do sleep 0.1; done")
    assert guest.check("grep -o '^xen_tpmfront' /proc/modules") == "xen_tpmfront"
    assert host.check(f"xenstore-read {BACKEND}/{guest.domid}/0/uuid") == UUIDS[number]
    said = host.check(f"xenstore-read {device}/backend {device}/feature-protocol-v2").split()
    assert said == [f"{BACKEND}/{guest.domid}/0", "1"]
    ring, channel = host.check(f"xenstore-read {device}/ring-ref {device}/event-channel").split()
    assert int(ring) > 0
    assert int(channel) > 0


def test_files_are_as_they_were_put_when_they_come_back(hosted: Hosted) -> None:
    content = bytes(range(256)) * 4096
    hosted.host.put("/run/put/file", content, mode=0o600)
    assert hosted.host.check("stat -c %a /run/put/file") == "600"
    assert hosted.host.get("/run/put/file") == content


def test_another_guest_gets_the_console_when_one_is_gone(hosted: Hosted) -> None:
    host = hosted.host
    gone = host.start_guest("gone")
    gone.power_off()
    assert "gone" not in host.check("xl list")
    again = host.start_guest("again")
    assert again.port == gone.port
    assert again.boot_id != gone.boot_id
    again.destroy()
    assert "again" not in host.check("xl list")
