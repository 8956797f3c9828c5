"""Takes a guest's parts from Debian: kernels and other packages by `apt-get download`, programs of this machine.

Nothing is installed on the host and nothing is kept outside the cache folder. Used by `image` alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
_KERNEL_NAME = re.compile(r"linux-image-(\d[\w.+~-]*-amd64)$")
_LDD_LINE = re.compile(r"(?:=>\s+)?(/\S+)\s+\(0x[0-9a-f]+\)$")
_FETCH_TIMEOUT_S = 300
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian")


class GuestImageError(Exception):
    """A guest image cannot be made; the message names the part that is missing and how to get it."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked Debian kernel package.

    Args:
        release: as `uname -r` in the guest tells it.
        folder: root of the unpacked package, with boot/ and lib/modules/.
    """

    release: str
    folder: Path

    @property
    def vmlinuz(self) -> Path:
        return self.folder / "boot" / f"vmlinuz-{self.release}"

    def modules_in_order(self, names: tuple[str, ...]) -> tuple[Path, ...]:
        """Module files for `names` with all that they depend on, dependencies first.

        Raises:
            GuestImageError: a name is neither a module of this kernel nor built into it.
        """
        base = self.folder / "lib" / "modules" / self.release
        files = {_module_name(path.name): path for path in base.rglob("*.ko")}
        builtin = {_module_name(Path(line).name) for line in (base / "modules.builtin").read_text().splitlines()}
        ordered: dict[Path, None] = {}

        def visit(name: str) -> None:
            path = files.get(name)
            if path is None:
                if name in builtin:
                    return
                raise GuestImageError(f"kernel {self.release} has no module {name}")
            if path in ordered:
                return
            for dependency in _module_dependencies(path):
                visit(dependency)
            ordered[path] = None

        for name in names:
            visit(_module_name(name))
        return tuple(ordered)


def fetch_kernel(cache: Path, meta_package: str = KERNEL_META_PACKAGE) -> Kernel:
    """Debian's current kernel behind a meta-package, unpacked below `cache`; fetched only when it is not there yet.

    A kernel in the cache is used when apt knows of no package, as on a machine without a network.

    Raises:
        GuestImageError: apt knows of no such package and none is cached, or the download failed.
    """
    flavour = meta_package.removeprefix("linux-image-")
    release = _current_release(meta_package)
    if release is None:
        cached = sorted(cache.glob(f"kernel-*[0-9]-{flavour}"))
        if not cached:
            raise GuestImageError(f"apt knows no package {meta_package}: run `apt-get update`")
        return Kernel(cached[-1].name.removeprefix("kernel-"), cached[-1])
    return Kernel(release, _unpacked(f"linux-image-{release}", cache / f"kernel-{release}"))


def fetch_packages(names: tuple[str, ...], cache: Path) -> tuple[Path, ...]:
    """Root folders of Debian's current packages, each unpacked below `cache`; fetched only when it is not there yet.

    What they depend on is not fetched with them. One in the cache is used when apt knows of none.

    Raises:
        GuestImageError: apt knows of no such package and none is cached, or the download failed.
    """
    versions = _candidates(names) if names else {}
    return tuple(_fetch_package(name, versions.get(name), cache) for name in names)


def _fetch_package(name: str, version: str | None, cache: Path) -> Path:
    if version is None:
        cached = sorted(cache.glob(f"package-{name}_*"))
        if not cached:
            raise GuestImageError(f"apt knows no package {name}: run `apt-get update`")
        return cached[-1]
    return _unpacked(name, cache / f"package-{name}_{version}")


def _unpacked(package: str, final: Path) -> Path:
    """Download and unpack a package, unless that was done before."""
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix="fetch-") as work:
        try:
            _command(["apt-get", "download", package], cwd=Path(work))
        except GuestImageError as error:
            raise GuestImageError(f"{error}. Run `apt-get update` if the lists are old") from error
        archives = list(Path(work).glob("*.deb"))
        if len(archives) != 1:
            raise GuestImageError(f"apt-get download {package} left {len(archives)} packages")
        unpacked = Path(work) / "root"
        _command(["dpkg-deb", "-x", str(archives[0]), str(unpacked)])
        unpacked.rename(final)
    return final


def program(name: str, package: str) -> Path:
    """Path of an installed program; its absence names the package that brings it."""
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise GuestImageError(f"{name} is not installed: apt-get install {package}")
    return Path(found)


def shared_libraries(binary: Path, folders: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """The dynamic loader and every library that `binary` needs, from `folders` or as the host's loader finds them."""
    places = {"LD_LIBRARY_PATH": ":".join(map(str, folders))} if folders else {}
    result = subprocess.run(
        ["ldd", str(binary)], env={**os.environ, **places}, capture_output=True, text=True, timeout=30, check=False
    )
    if result.returncode != 0:  # a static program
        return ()
    if "not found" in result.stdout:
        raise GuestImageError(f"{binary} misses a library: {result.stdout.strip()}")
    matches = (_LDD_LINE.search(line.strip()) for line in result.stdout.splitlines())
    return tuple(Path(match[1]) for match in matches if match)


def package_files(package: str) -> tuple[Path, ...]:
    """Every file and link of an installed Debian package, without documentation and translations."""
    return _files(Path(line) for line in _command(["dpkg", "-L", package]).splitlines() if line.startswith("/"))


def unpacked_files(root: Path) -> tuple[Path, ...]:
    """Every file and link of an unpacked package, as `package_files`, relative to its root folder."""
    return tuple(path.relative_to(root) for path in _files(sorted(root.rglob("*")), root))


def _files(paths: Iterable[Path], root: Path = Path("/")) -> tuple[Path, ...]:
    left_out = tuple(str(root / folder) for folder in _LEFT_OUT)
    return tuple(p for p in paths if not str(p).startswith(left_out) and (p.is_symlink() or p.is_file()))


def _candidates(names: tuple[str, ...]) -> dict[str, str]:
    """Versions that apt would install, of those packages that it knows."""
    found: dict[str, str] = {}
    name = ""
    for line in _command(["apt-cache", "policy", *names]).splitlines():
        if not line.startswith(" "):
            name = line.removesuffix(":")
        elif line.startswith("  Candidate: ") and not line.endswith("(none)"):
            found[name] = line.split()[1]
    return found


def _current_release(meta_package: str) -> str | None:
    listing = subprocess.run(
        ["apt-cache", "depends", "--important", meta_package],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    for line in listing.stdout.splitlines():
        match = _KERNEL_NAME.search(line.strip())
        if match:
            return match[1]
    return None


def _module_name(file_or_name: str) -> str:
    return file_or_name.removesuffix(".ko").replace("-", "_")


def _module_dependencies(path: Path) -> tuple[str, ...]:
    # .modinfo is a run of NUL-ended "key=value" strings; each module has "depends=" once.
    match = re.search(rb"\0depends=([\w,-]*)\0", path.read_bytes())
    names = match[1].decode().split(",") if match else []
    return tuple(_module_name(name) for name in names if name)


def _command(arguments: list[str], *, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(
            arguments, cwd=cwd, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        raise GuestImageError(f"{' '.join(arguments)} failed: {error.stderr.strip()}") from error
