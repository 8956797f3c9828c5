"""Takes a guest's parts from Debian: its cloud kernel by `apt-get download`, programs of this machine.

Nothing is installed on the host and nothing is kept outside the cache folder. Used by `image` alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
_KERNEL_NAME = re.compile(r"linux-image-(\d[\w.+~-]*-cloud-amd64)$")
_LDD_LINE = re.compile(r"(?:=>\s+)?(/\S+)\s+\(0x[0-9a-f]+\)$")
_FETCH_TIMEOUT_S = 300


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


def fetch_kernel(cache: Path) -> Kernel:
    """Debian's current cloud kernel, unpacked below `cache`; fetched only when it is not there yet.

    A kernel in the cache is used when apt knows of no package, as on a machine without a network.

    Raises:
        GuestImageError: apt knows of no such package and none is cached, or the download failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    release = _current_release()
    if release is None:
        cached = sorted(cache.glob("kernel-*"))
        if not cached:
            raise GuestImageError(f"apt knows no package {KERNEL_META_PACKAGE}: run `apt-get update`")
        return Kernel(cached[-1].name.removeprefix("kernel-"), cached[-1])
    final = cache / f"kernel-{release}"
    if not final.is_dir():
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as work:
            try:
                _command(["apt-get", "download", f"linux-image-{release}"], cwd=Path(work))
            except GuestImageError as error:
                raise GuestImageError(f"{error}. Run `apt-get update` if the lists are old") from error
            packages = list(Path(work).glob("*.deb"))
            if len(packages) != 1:
                raise GuestImageError(f"apt-get download linux-image-{release} left {len(packages)} packages")
            unpacked = Path(work) / "root"
            _command(["dpkg-deb", "-x", str(packages[0]), str(unpacked)])
            unpacked.rename(final)
    return Kernel(release, final)


def program(name: str, package: str) -> Path:
    """Path of an installed program; its absence names the package that brings it."""
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise GuestImageError(f"{name} is not installed: apt-get install {package}")
    return Path(found)


def shared_libraries(binary: Path) -> tuple[Path, ...]:
    """The dynamic loader and every library that `binary` needs, as the host's loader finds them."""
    result = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, timeout=30, check=False)
    if result.returncode != 0:  # a static program
        return ()
    if "not found" in result.stdout:
        raise GuestImageError(f"{binary} misses a library: {result.stdout.strip()}")
    matches = (_LDD_LINE.search(line.strip()) for line in result.stdout.splitlines())
    return tuple(Path(match[1]) for match in matches if match)


def package_files(package: str) -> tuple[Path, ...]:
    """Every file and link of an installed Debian package, without documentation and translations."""
    listing = _command(["dpkg", "-L", package]).splitlines()
    left_out = ("/usr/share/doc", "/usr/share/man", "/usr/share/locale", "/usr/share/lintian")
    paths = (Path(line) for line in listing if line.startswith("/") and not line.startswith(left_out))
    return tuple(path for path in paths if path.is_symlink() or path.is_file())


def _current_release() -> str | None:
    listing = subprocess.run(
        ["apt-cache", "depends", "--important", KERNEL_META_PACKAGE],
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
