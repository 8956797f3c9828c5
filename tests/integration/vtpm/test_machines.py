"""vTPMs in virtual machines of their own, through the whole host: real guests, restarts, deaths, changed images.

Everything is emulated, so a machine takes seconds to boot; each test has several at work.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.guest import Firmware, Guest, GuestConfig, Image, Reboot, TpmModel, build_image, checks
from tests.support.host import Host, wait_ended
from tests.support.image.building import build_vtpmd
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import ConflictError, VtpmError
from vtpm.tpm.types import TpmVersion
from vtpm.wire.api import DomainName

pytestmark = pytest.mark.timeout(600)
LET_GO_S = 20.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vtpmd(tmp_path_factory.mktemp("vm"))


@pytest.fixture(scope="module")
def host(images: Path) -> Iterator[Host]:
    with Host(settings=_settings(images)) as host:
        yield host


@pytest.fixture(scope="module")
def image() -> Image:
    return build_image()


def _settings(images: Path) -> str:
    return f'vm_accelerator = "tcg"\nvm_images = "{images}"\n'


def _started(host: Host, name: str) -> Path:
    with host.client() as client:
        client.create(name, TpmVersion.V2_0, DomainName.QEMU)
        return Path(client.start(name).control_socket)


def _stop(client: ManagerClient, name: str) -> None:
    """Stop it once its guest's emulator is let go, which takes its way through the relay."""
    deadline_s = time.monotonic() + LET_GO_S
    while client.show(name).client is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    client.stop(name)


def _restarted(host: Host, name: str) -> Path:
    with host.client() as client:
        before = client.show(name).pid
        _stop(client, name)
        after = client.start(name)
        assert after.pid != before
        return Path(after.control_socket)


def test_guest_finds_what_it_wrote_when_it_was_rebooted_and_its_vtpms_machine_restarted(
    host: Host, image: Image, tmp_path: Path
) -> None:
    control = _started(host, "web1")
    config = GuestConfig(image, control, TpmModel.CRB, Firmware.SEABIOS, uuid=uuid4())
    checks.exercise(config, tmp_path, reboots=(Reboot.ORDERLY,), power_cycle=lambda: _restarted(host, "web1"))
    with host.client() as client:
        vtpm = client.show("web1")
        assert (vtpm.state, vtpm.domain) == ("running", "qemu")
        _stop(client, "web1")


def test_four_guests_use_their_tpms_when_each_has_a_machine_of_its_own(
    host: Host, image: Image, tmp_path: Path
) -> None:
    names = [f"four{number}" for number in range(4)]
    with host.client() as client:
        for name in names:
            client.create(name, TpmVersion.V2_0, DomainName.QEMU)

    def use(name: str) -> checks.Pcrs:
        with host.client() as client:
            control = Path(client.start(name).control_socket)
        folder = tmp_path / name
        folder.mkdir()
        with Guest(GuestConfig(image, control, uuid=uuid4()), folder) as guest:
            checks.check_fresh_pcrs(guest)
            checks.check_extend(guest)
            checks.check_traces(guest, checks.leave_traces(guest))
            pcrs = checks.read_pcrs(guest)
            guest.power_off()
        return pcrs

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        values = list(pool.map(use, names))
    # Each extended a digest of its own: no two TPMs are one.
    assert len({pcrs[checks.FREE_PCR] for pcrs in values}) == len(names)
    with host.client() as client:
        for name in names:
            client.stop(name)


@pytest.mark.parametrize("dead", ["machine", "relay"])
def test_guest_goes_on_after_a_reset_when_its_vtpms_machine_or_relay_died(
    host: Host, image: Image, tmp_path: Path, dead: str
) -> None:
    name = f"dies-{dead}"
    control = _started(host, name)
    with Guest(GuestConfig(image, control, uuid=uuid4()), tmp_path) as guest:
        traces = checks.leave_traces(guest)
        with host.client() as client:
            machine = client.show(name).pid
            assert machine is not None
            victim = machine if dead == "machine" else _relay(name)
            os.kill(victim, signal.SIGKILL)
            assert wait_ended(machine, 30)
            # The guest's TPM fails, and says so; nothing comes back that is older than what it was told.
            assert guest.run("tpm2_pcrread sha256:0", timeout_s=120).status != 0
            assert client.show(name).state == "failed"
            guest.reboot(Reboot.HOST)
            checks.check_traces(guest, traces)
            assert client.show(name).state == "running"
        guest.power_off()
    with host.client() as client:
        _stop(client, name)


def test_guest_finds_its_pcrs_when_its_vtpms_machine_ran_on_or_died_while_it_was_suspended(
    host: Host, image: Image, tmp_path: Path
) -> None:
    name = "sleeper"
    control = _started(host, name)
    with Guest(GuestConfig(image, control, uuid=uuid4()), tmp_path) as guest, host.client() as client:

        def refuse_to_stop() -> None:
            with pytest.raises(ConflictError, match="in use by a virtual machine"):
                client.stop(name)

        def die() -> None:
            machine = client.show(name).pid
            assert machine is not None
            os.kill(machine, signal.SIGKILL)
            assert wait_ended(machine, 30)

        checks.check_resume(guest, refuse_to_stop)
        guest.reboot(Reboot.HOST)
        # TPM2_Shutdown(STATE) was answered, so what it saved is there, whichever machine the guest wakes up with.
        checks.check_resume(guest, die)
        assert client.show(name).state == "running"
    with host.client() as client:
        # The manager may not have heard yet that the guest has gone.
        client.stop(name, force=True)


def test_changed_image_is_not_started_and_named_when_one_byte_differs(images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    (initramfs,) = copy.glob("*/*/initramfs")
    content = bytearray(initramfs.read_bytes())
    content[len(content) // 2] ^= 1
    initramfs.write_bytes(content)
    with Host(settings=_settings(copy)) as host, host.client() as client:
        client.create("web1", TpmVersion.V2_0, DomainName.QEMU)
        with pytest.raises(VtpmError, match=r"initramfs is not the file that the image was built with"):
            client.start("web1")
        assert client.show("web1").state == "stopped"


def test_start_says_how_to_build_an_image_when_there_is_none(tmp_path: Path) -> None:
    with Host(settings=_settings(tmp_path)) as host, host.client() as client:
        client.create("web1", TpmVersion.V2_0, DomainName.QEMU)
        with pytest.raises(VtpmError, match="there is no image") as refused:
            client.start("web1")
        assert refused.value.next_step == "Build one: vtpm image build --make libtpms"


def _relay(name: str) -> int:
    (found,) = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _title(folder) == f"vtpm-relay {name}"]
    return found


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""
