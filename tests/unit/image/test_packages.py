"""Fetching pinned packages: an apt-get that plays what mirrors and disks do, on PATH."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from vtpm.errors import ImageError, StoreError, UnavailableError, VtpmError
from vtpm.image.definition import Definition, Package, read_definition
from vtpm.image.packages import fetch, read, resolve

CONTENT = b"package"
PACKAGE = Package("libx", "1:2-3", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class FakePrograms:
    """Programs that come first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePrograms:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakePrograms(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_package_is_fetched_by_name_and_version_when_it_is_not_in_the_cache(
    programs: FakePrograms, cache: Path
) -> None:
    programs.write("apt-get", f'[ "$3" = libx:amd64=1:2-3 ] && printf {CONTENT.decode()} > libx_1%3a2-3_amd64.deb')
    fetch([PACKAGE], cache)
    assert read(PACKAGE, cache) == CONTENT
    assert [path.name for path in cache.iterdir()] == [f"{PACKAGE.sha256}.deb"]


def test_apt_gets_the_proxy_and_nothing_else_when_there_is_one(
    programs: FakePrograms, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("APT_CONFIG", "/none")
    test = '[ "$http_proxy" = http://proxy:1 ] && [ -z "$APT_CONFIG" ]'
    programs.write("apt-get", f"{test} && printf {CONTENT.decode()} > libx.deb")
    fetch([PACKAGE], cache)
    assert read(PACKAGE, cache) == CONTENT


def test_nothing_is_fetched_when_the_cache_has_it(programs: FakePrograms, cache: Path) -> None:
    programs.write("apt-get", "exit 1")
    cache.mkdir()
    (cache / f"{PACKAGE.sha256}.deb").write_bytes(CONTENT)
    fetch([PACKAGE], cache)
    assert read(PACKAGE, cache) == CONTENT


def test_package_is_refused_when_the_mirror_gives_another_file(programs: FakePrograms, cache: Path) -> None:
    programs.write("apt-get", "printf other > libx.deb")
    with pytest.raises(ImageError, match="libx 1:2-3 is not the file that the lock pins"):
        fetch([PACKAGE], cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("content", [b"packagf", CONTENT + b"x", b""])
def test_package_is_refused_when_the_cache_has_another_file(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / f"{PACKAGE.sha256}.deb").write_bytes(content)
    with pytest.raises(ImageError, match="its SHA-256 differs") as raised:
        read(PACKAGE, cache)
    assert str(cache) in raised.value.next_step


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("E: Version '1:2-3' for 'libx' was not found", UnavailableError, "no longer have all"),
        ("E: Unable to locate package libx", UnavailableError, "no longer have all"),
        ("E: Failed to fetch http://m/libx.deb  404  Not Found [IP: 1]", UnavailableError, "no longer have all"),
        (
            "E: Failed to fetch http://m/libx.deb  Temporary failure resolving 'm'",
            UnavailableError,
            "cannot be fetched",
        ),
        ("E: You don't have enough free space in /x/.", StoreError, "no space left"),
        ("W: Write error - write (28: No space left on device)", StoreError, "no space left"),
    ],
)
def test_error_says_what_to_do_when_apt_fails(
    programs: FakePrograms, cache: Path, said: str, kind: type[VtpmError], message: str
) -> None:
    programs.write("apt-get", f'echo "{said}" >&2; exit 100')
    with pytest.raises(kind, match=message) as raised:
        fetch([PACKAGE], cache)
    assert ("vtpm image lock" in raised.value.next_step) == ("no longer" in message)
    assert list(cache.iterdir()) == []


def test_error_names_the_program_when_there_is_no_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="apt-get is not installed"):
        fetch([PACKAGE], tmp_path / "cache")


def test_error_names_the_cache_when_it_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cache cannot be used"):
        fetch([PACKAGE], tmp_path / "file" / "cache")


APT_CACHE = """case $1 in
depends) echo linux-image-cloud-amd64; echo "  Depends: linux-image-6.1.0-9-cloud-amd64";;
policy) echo "$2:"; echo "  Installed: 0"; echo "  Candidate: 1:2-3";;
show) printf 'Package: x\\nDescription: one\\n SHA256: not this\\nSize: 5\\nSHA256: {sha256}\\n\\nPackage: x\\n';;
esac"""


def test_lock_has_version_and_hash_of_each_package_when_apt_knows_them(programs: FakePrograms) -> None:
    programs.write("apt-cache", APT_CACHE.format(sha256="c" * 64))
    definition: Definition = read_definition()
    lock = resolve(definition)
    assert lock.kernel == "linux-image-6.1.0-9-cloud-amd64"
    assert set(lock.packages) == {lock.kernel, *definition.packages, *definition.build_packages}
    assert lock.packages["libtpms0"] == Package("libtpms0", "1:2-3", "c" * 64, 5)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "no kernel behind"),
        (APT_CACHE.replace("1:2-3", "(none)"), "apt knows no package"),
        (APT_CACHE.replace("SHA256: {sha256}", "X: y"), "without a hash"),
    ],
)
def test_nothing_is_locked_when_apt_knows_too_little(programs: FakePrograms, script: str, message: str) -> None:
    programs.write("apt-cache", script)
    with pytest.raises(UnavailableError, match=message):
        resolve(read_definition())
