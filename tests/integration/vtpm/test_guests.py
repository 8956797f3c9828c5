"""Real guests in QEMU (TCG) whose TPM is a vTPM of ours: firmware, kernel driver, tools, reboots, power-offs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.guest import Firmware, Guest, GuestConfig, Image, Reboot, TpmModel, build_image, checks, checks12
from tests.support.host import Host
from vtpm.tpm.types import TpmVersion

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def image() -> Image:
    return build_image()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def _started(host: Host, name: str, version: TpmVersion) -> Path:
    with host.client() as client:
        client.create(name, tpm_version=version)
        return Path(client.start(name).control_socket)


@pytest.mark.parametrize(
    ("model", "firmware", "reboot"),
    [(TpmModel.CRB, Firmware.SEABIOS, Reboot.ORDERLY), (TpmModel.TIS, Firmware.OVMF, Reboot.HOST)],
)
def test_tpm_20_serves_a_guest_when_rebooted_and_powered_off(
    host: Host, image: Image, tmp_path: Path, model: TpmModel, firmware: Firmware, reboot: Reboot
) -> None:
    name = f"g20-{model.name.lower()}"
    control = _started(host, name, TpmVersion.V2_0)
    config = GuestConfig(image=image, tpm_control_socket=control, tpm_model=model, firmware=firmware, uuid=uuid4())
    power_cycle = (lambda: control) if firmware is Firmware.SEABIOS else None
    checks.exercise(config, tmp_path, reboots=(reboot,), power_cycle=power_cycle)
    with host.client() as client:
        assert client.show(name).state == "running"


def test_tpm_12_serves_a_guest_when_rebooted_and_powered_off(host: Host, image: Image, tmp_path: Path) -> None:
    control = _started(host, "g12", TpmVersion.V1_2)
    config = GuestConfig(image=image, tpm_control_socket=control, tpm_model=TpmModel.TIS)
    checks12.exercise(config, tmp_path, reboots=(Reboot.ORDERLY,), power_cycle=lambda: control)


def test_guest_finds_its_pcrs_when_it_was_suspended(host: Host, image: Image, tmp_path: Path) -> None:
    control = _started(host, "sleeper", TpmVersion.V2_0)
    with Guest(GuestConfig(image, control, TpmModel.TIS), tmp_path) as guest, host.client() as client:
        checks.check_resume(guest)
        assert client.show("sleeper").state == "running"


def test_guest_goes_on_when_its_qemu_migrates_and_no_move_is_under_way(
    host: Host, image: Image, tmp_path: Path
) -> None:
    control = _started(host, "stays", TpmVersion.V2_0)
    with Guest(GuestConfig(image, control), tmp_path) as guest:
        guest.qmp.execute("migrate", uri=f"exec:cat > {tmp_path / 'saved'}")
        assert guest.wait_migrated() == "failed"
        checks.check_extend(guest)
    with host.client() as client:
        assert any("no migration of vTPM stays is under way" in str(event.detail) for event in client.all_events())
