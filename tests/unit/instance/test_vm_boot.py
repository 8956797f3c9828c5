"""Init of a virtual machine, outside of one: what it asks of the kernel, and how it finds ports."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vtpm.engine import library
from vtpm.errors import DomainError
from vtpm.instance import vm_boot


class FakeKernel:
    """Takes the engine's calls; refuses all when `error` is set."""

    def __init__(self) -> None:
        self.mounted: list[tuple[bytes, bytes]] = []
        self.loaded: list[str] = []
        self.error = 0

    def vtpm_mount(self, kind: bytes, place: bytes) -> int:
        self.mounted.append((kind, place))
        return -1 if self.error else 0

    def vtpm_load_module(self, fd: int) -> int:
        self.loaded.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        return -1 if self.error else 0

    def vtpm_power_off(self) -> int:
        return -1 if self.error else 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernel:
    fake = FakeKernel()
    monkeypatch.setattr(library, "load", lambda: (SimpleNamespace(errno=fake.error), fake))
    monkeypatch.setattr(vm_boot, "_MODULES", str(tmp_path))
    monkeypatch.setattr(vm_boot, "_MODULES_DISABLED", str(tmp_path.parent / f"{tmp_path.name}-disabled"))
    return fake


def test_devices_come_first_when_file_systems_are_mounted(kernel: FakeKernel) -> None:
    before = set(os.listdir("/proc/self/fd"))
    vm_boot.mount_file_systems()
    assert kernel.mounted == [(b"devtmpfs", b"/dev"), (b"proc", b"/proc"), (b"sysfs", b"/sys")]
    assert set(os.listdir("/proc/self/fd")) == before


def test_modules_load_by_name_and_then_no_more_when_the_kernel_takes_them(kernel: FakeKernel, tmp_path: Path) -> None:
    for name in ("01-b.ko", "10-c.ko", "00-z.ko"):
        (tmp_path / name).touch()
    vm_boot.load_modules()
    assert kernel.loaded == ["00-z.ko", "01-b.ko", "10-c.ko"]
    assert (tmp_path.parent / f"{tmp_path.name}-disabled").read_text() == "1"


def test_error_names_object_and_cause_when_the_kernel_refuses(kernel: FakeKernel, tmp_path: Path) -> None:
    kernel.error = errno.EPERM
    (tmp_path / "00-x.ko").touch()
    with pytest.raises(DomainError, match=r"devtmpfs cannot be mounted on /dev: Operation not permitted"):
        vm_boot.mount_file_systems()
    with pytest.raises(DomainError, match=r"00-x\.ko cannot be loaded: Operation not permitted"):
        vm_boot.load_modules()
    with pytest.raises(DomainError, match="cannot be powered off: Operation not permitted"):
        vm_boot.power_off()


def test_the_door_tells_the_kernels_error_when_it_refuses() -> None:
    ffi, lib = library.load()
    assert lib.vtpm_mount(b"no such kind", b"/none") == -1
    assert ffi.errno in (errno.EPERM, errno.ENOENT)
    assert lib.vtpm_load_module(-1) == -1
    # ENOSYS: a kernel that has no modules at all.
    assert ffi.errno in (errno.EPERM, errno.EBADF, errno.ENOSYS)


def test_it_is_an_error_when_the_machine_goes_on(kernel: FakeKernel) -> None:
    with pytest.raises(DomainError, match="went on"):
        vm_boot.power_off()


@pytest.fixture
def ports(tmp_path: Path) -> Path:
    folder = tmp_path / "ports"
    for port, name in (("vport0p1", "org.vtpm.manager\n"), ("vport0p2", "org.vtpm.guest\n"), ("vport0p3", None)):
        (folder / port).mkdir(parents=True)
        if name is not None:
            (folder / port / "name").write_text(name)
    return folder


def test_port_is_found_by_its_name_when_there_are_others(ports: Path) -> None:
    assert vm_boot.find_port("org.vtpm.guest", ports=str(ports)) == "/dev/vport0p2"


def test_port_is_an_error_when_there_is_none_of_its_name(ports: Path) -> None:
    with pytest.raises(DomainError, match="has 0 virtio-serial ports of the name org"):
        vm_boot.find_port("org", ports=str(ports))


def test_port_is_an_error_when_there_are_two_of_its_name(ports: Path) -> None:
    (ports / "vport0p3" / "name").write_text("org.vtpm.guest\n")
    with pytest.raises(DomainError, match="has 2 virtio-serial ports"):
        vm_boot.find_port("org.vtpm.guest", ports=str(ports))


def test_port_is_an_error_when_the_kernel_has_no_ports_at_all(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="has 0 virtio-serial ports"):
        vm_boot.find_port("org.vtpm.guest", ports=str(tmp_path / "none"))
