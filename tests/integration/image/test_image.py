"""An image is the same wherever it is built, holds what it needs and no more, boots, and is refused if changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.image.building import CACHE, build, build_for_tests, built_folder, copy_sources
from tests.support.image.machine import Machine
from vtpm.image.manifest import INITRAMFS, KERNEL, MANIFEST
from vtpm.image.opened import OpenImage

MAX_INITRAMFS_BYTES = 10_000_000
MEMORY_MB = 96
# TPM2_GetRandom of 16 bytes on a TPM that had no TPM2_Startup: TPM_RC_INITIALIZE, Part 2 6.6.3.
GET_RANDOM = bytes.fromhex("80010000000c0000017b0010")
NOT_STARTED = bytes.fromhex("80010000000a00000100")

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image's folder, and the lock that it was built with."""
    return build_for_tests(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def image(built: tuple[Path, Path]) -> Iterator[OpenImage]:
    with OpenImage(built[0]) as opened:
        yield opened


@pytest.fixture(scope="module")
def content(image: OpenImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the initramfs holds, unpacked by the usual programs; the one device left out."""
    place = tmp_path_factory.mktemp("content")
    with open(f"/proc/self/fd/{image.initramfs_fd}", "rb") as file:
        plain = subprocess.run(["lz4", "-d", "-c"], stdin=file, capture_output=True, timeout=60, check=True).stdout
    words = ["cpio", "-id", "--quiet", "--nonmatching", "dev/console"]
    subprocess.run(words, input=plain, cwd=place, timeout=60, check=True)
    return place


def test_initramfs_is_small_enough_when_built(image: OpenImage) -> None:
    assert image.manifest.initramfs.size <= MAX_INITRAMFS_BYTES


def test_image_has_the_same_bytes_when_everything_around_the_build_differs(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    first, lock = built
    source = copy_sources(tmp_path / "another place")
    # In the opposite order, so that folders list them in another, and of another year.
    files = sorted(source.rglob("*.py"), reverse=True)
    for path in files:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    before: tuple[str, ...] = ()
    cache = tmp_path / "cache"
    shutil.copytree(CACHE, cache)
    shutil.copy(lock, tmp_path / "lock.toml")
    home = tmp_path / "home"
    home.mkdir()
    if os.geteuid() == 0:
        before = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
        subprocess.run(["chown", "-R", "54321:54321", str(tmp_path)], check=True, timeout=60)
        for parent in (tmp_path, *list(tmp_path.parents)[:2]):
            parent.chmod(0o755)
    environ = {"TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "HOME": str(home), "PYTHONHASHSEED": "7"}
    environ |= {"TMPDIR": str(home), "SOURCE_DATE_EPOCH": "5", "CFLAGS": "-O0", "LANGUAGE": "tr"}
    done = build(
        source,
        home / "images",
        lock=tmp_path / "lock.toml",
        cache=cache,
        environ=environ,
        umask=0o077,
        before=before,
    )
    second = built_folder(done)
    assert second.name == first.name
    for name in (KERNEL, INITRAMFS, MANIFEST):
        assert (second / name).read_bytes() == (first / name).read_bytes()


def test_initramfs_holds_what_the_manifest_lists_and_nothing_else_when_unpacked(
    image: OpenImage, content: Path
) -> None:
    found = {f"/{path.relative_to(content)}": path for path in content.rglob("*") if not path.is_dir()}
    listed = {file.path: file for file in image.manifest.files}
    assert set(found) == set(listed)
    assert {path: file.stat().st_size for path, file in found.items()} == {
        path: file.size for path, file in listed.items()
    }


def test_only_loader_interpreter_and_init_can_be_executed_when_unpacked(content: Path) -> None:
    executable = {path.name for path in content.rglob("*") if path.is_file() and path.stat().st_mode & 0o111}
    assert executable == {"init", "python3.11", "ld-linux-x86-64.so.2"}


def test_no_source_no_debug_data_and_no_path_of_the_build_is_inside_when_unpacked(
    built: tuple[Path, Path], content: Path
) -> None:
    files = [path for path in content.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".py"]
    place = str(built[0].parents[2]).encode()
    assert not [path for path in files if place in path.read_bytes() or b"/vtpm-image-" in path.read_bytes()]
    binaries = [path for path in files if path.read_bytes()[:4] == b"\x7fELF"]
    sections = subprocess.run(
        ["readelf", "-SW", *binaries], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert ".text" in sections
    assert ".debug_" not in sections


def test_machine_starts_and_a_tpm_answers_and_it_powers_off_when_booted_in_little_memory(image: OpenImage) -> None:
    with Machine(image, memory_mb=MEMORY_MB) as machine:
        assert machine.hello()[:2] == ["hello", hex(image.manifest.engine_version)]
        machine.port.sendall(GET_RANDOM)
        assert machine.port.recv(4096) == NOT_STARTED
        machine.port.sendall(b"x")
        assert machine.wait()[0] == 0


def test_machine_ends_and_the_console_says_why_when_its_port_has_another_name(image: OpenImage) -> None:
    with Machine(image, port_name="org.vtpm.other") as machine:
        machine.wait()
        assert "has 0 virtio-serial ports of the name org.vtpm.test" in machine.console.read_text()


def test_same_folder_is_named_when_built_again_and_a_changed_image_is_not_touched(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    copied = images / "vtpmd" / built[0].name
    shutil.copytree(built[0], copied)
    source = copy_sources(tmp_path)
    assert built_folder(build(source, images, lock=built[1])) == copied
    with (copied / KERNEL).open("r+b") as file:
        file.write(b"x")
    done = build(source, images, lock=built[1])
    assert (done.returncode, json.loads(done.stderr)["code"]) == (14, "image")
    assert KERNEL in json.loads(done.stderr)["message"]
    assert (copied / KERNEL).read_bytes()[:1] == b"x"
    assert [path.name for path in (images / "vtpmd").iterdir()] == [copied.name]


def test_build_is_refused_and_leaves_nothing_when_the_entry_imports_more_than_is_allowed(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    source = copy_sources(tmp_path)
    with (source / "vtpm/instance/vm_main.py").open("a") as module:
        module.write("\n\ndef later() -> None:\n    import http.client\n")
    done = build(source, tmp_path / "images", lock=built[1])
    assert done.returncode == 14
    assert "http.client" in json.loads(done.stderr)["message"]
    assert not (tmp_path / "images").exists()


def test_build_leaves_nothing_when_the_place_of_images_is_full(built: tuple[Path, Path], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        small = Path("/dev/full")
    else:
        small = tmp_path / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True, timeout=20)
    try:
        done = build(copy_sources(tmp_path), small / "images", lock=built[1])
        assert (done.returncode, json.loads(done.stderr)["code"]) == (9, "store")
        assert not list(small.glob("images/*/*"))
    finally:
        if small.is_mount():
            subprocess.run(["umount", str(small)], check=True, timeout=20)
