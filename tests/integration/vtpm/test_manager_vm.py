"""Manager and keeper in a virtual machine of their own, a vTPM in a second one, its guest in a third; the launcher
beside them on the host, with nothing but a serial port to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.guest import Guest, GuestConfig, Reboot, build_image, checks
from tests.support.guest.swtpm import swtpm_emulator
from tests.support.host import wait_ended
from tests.support.image.building import build_vtpmd
from tests.support.manager_machine import LauncherAlone, ManagerMachine, make_disk
from tests.support.processes import short_directory

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LauncherAlone]:
    images = build_vtpmd(tmp_path_factory.mktemp("vm"))
    with short_directory() as folder:
        # The vTPMs' machines and their guests have users of their own.
        folder.chmod(0o755)
        with LauncherAlone(folder, images) as launcher:
            yield launcher


@pytest.fixture(scope="module")
def manager(launcher: LauncherAlone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagerMachine]:
    folder = tmp_path_factory.mktemp("manager")
    disk = folder / "disk"
    make_disk(disk)
    with (
        swtpm_emulator(folder / "platform-tpm") as platform_tpm,
        ManagerMachine(platform_tpm, launcher.port_socket, disk, folder / "machine") as machine,
    ):
        yield machine


def test_guest_finds_what_it_wrote_when_the_machines_of_its_vtpm_and_of_the_manager_were_restarted(
    manager: ManagerMachine, tmp_path: Path
) -> None:
    manager.cli("create", "web1", "--domain", "qemu")
    first = manager.cli("start", "web1")
    config = GuestConfig(build_image(), Path(first["control_socket"]), uuid=uuid4())
    with Guest(config, tmp_path / "guest") as guest:
        checks.check_fresh_pcrs(guest)
        traces = checks.leave_traces(guest)
        guest.power_off()

    manager.cli("stop", "web1")
    assert wait_ended(first["pid"], 10)
    second = manager.cli("start", "web1")
    assert second["pid"] != first["pid"]
    with Guest(config, tmp_path / "guest") as guest:
        checks.check_fresh_pcrs(guest)
        checks.check_traces(guest, traces)

        # The root key opens by the PCRs of the machine's own TPM, and the vTPM is taken up as it runs.
        manager.reboot(Reboot.SUDDEN)
        pcrs = checks.read_pcrs(guest)
        manager.wait_served()
        shown = manager.cli("show", "web1")
        assert (shown["state"], shown["pid"], shown["domain"]) == ("running", second["pid"], "qemu")
        assert checks.read_pcrs(guest) == pcrs
        guest.check(f"tpm2_nvundefine -C o {checks.NV_INDEX:#x} && tpm2_evictcontrol -Q -C o -c {checks.KEY_HANDLE:#x}")
        checks.leave_traces(guest)
        guest.power_off()
    manager.cli("stop", "web1")


@pytest.mark.soak
def test_vtpm_is_ended_and_can_be_started_again_when_the_bridge_on_the_host_was_restarted(
    launcher: LauncherAlone, manager: ManagerMachine
) -> None:
    manager.cli("create", "web2", "--domain", "qemu")
    before = manager.cli("start", "web2")
    launcher.stop("bridge")
    launcher.start_bridge()
    # To the manager the launcher had gone, so nothing of it may run on.
    assert wait_ended(before["pid"], 30)
    assert manager.cli("show", "web2")["state"] == "stopped"
    after = manager.cli("start", "web2")
    assert (after["state"], after["pid"] != before["pid"]) == ("running", True)
    manager.cli("stop", "web2")
