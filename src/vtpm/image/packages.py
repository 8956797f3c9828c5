"""Debian packages: which version is current, fetching pinned ones, unpacking. Through apt and dpkg; needs no root.

A file is used only after its hash has been found to be the pinned one, fetched just now or from the cache.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from vtpm.errors import ImageError, StoreError, UnavailableError
from vtpm.image.definition import Definition, Lock, Package
from vtpm.image.tools import ToolError, run

_MAX_PACKAGE_BYTES = 256 * 1024 * 1024
_ARCHITECTURE = "amd64"
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")
"""What apt needs of the environment, where the way to the mirrors leads through one."""
_LISTS_ADVICE = "Run `apt-get update` as root"


def resolve(definition: Definition) -> Lock:
    """Return a lock with the versions that apt would install today.

    Raises:
        UnavailableError: apt knows none of a package.
        ToolError: apt failed.
    """
    kernel = _kernel_package(definition.kernel)
    names = sorted({kernel, *definition.packages, *definition.build_packages})
    return Lock(kernel, {name: _candidate(name) for name in names})


def fetch(packages: Sequence[Package], cache: Path) -> None:
    """See that the cache has the packages' files; what it has not comes from the mirrors that apt knows.

    Raises:
        UnavailableError: no mirror has one of the versions any more, or none can be reached.
        ImageError: what came is not what is pinned.
        StoreError: the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        missing = [package for package in packages if not _place(package, cache).exists()]
        if not missing:
            return
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as work:
            _download(missing, Path(work))
            came = {_sha256(path): path for path in Path(work).glob("*.deb")}
            for package in missing:
                if package.sha256 not in came:
                    raise _differs(package, "do not renew the lock before you know why")
                came[package.sha256].replace(_place(package, cache))
    except OSError as error:
        raise StoreError(f"the cache {cache} cannot be used: {error.strerror}") from error


def read(package: Package, cache: Path) -> bytes:
    """Return the content of a package's file in the cache, once it has been found to be what is pinned.

    Raises:
        ImageError: it is not.
        StoreError: it cannot be read.
    """
    path = _place(package, cache)
    try:
        with path.open("rb") as file:
            data = file.read(min(package.size, _MAX_PACKAGE_BYTES) + 1)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != package.sha256:
        raise _differs(package, f"Remove {path}, and it is fetched again")
    return data


def unpack(data: bytes, root: Path) -> tuple[str, ...]:
    """Unpack a verified package's file below `root`; return its paths, relative to that.

    Raises:
        StoreError, ToolError: it does not go.
    """
    listing = run(["dpkg-deb", "--vextract", "-", root], stdin=data).decode()
    return tuple(line.removeprefix("./") for line in listing.splitlines() if not line.endswith("/"))


def origins(packages: Iterable[tuple[Package, tuple[str, ...]]]) -> dict[str, str]:
    """Return which package each path is of, from what `unpack` told of each."""
    return {path: package.origin for package, paths in packages for path in paths}


def _kernel_package(meta_package: str) -> str:
    for line in run(["apt-cache", "depends", "--important", f"{meta_package}:{_ARCHITECTURE}"]).decode().splitlines():
        word, _, name = line.strip().partition(": ")
        if word == "Depends" and name.startswith("linux-image-"):
            return name.partition(":")[0]
    raise UnavailableError(f"apt knows no kernel behind the package {meta_package}", next_step=_LISTS_ADVICE)


def _candidate(name: str) -> Package:
    full = f"{name}:{_ARCHITECTURE}"
    policy = run(["apt-cache", "policy", full]).decode()
    versions = [line.split()[1] for line in policy.splitlines() if line.strip().startswith("Candidate: ")]
    if versions in ([], ["(none)"]):
        raise UnavailableError(f"apt knows no package {name}", next_step=_LISTS_ADVICE)
    # More than one paragraph: the same version from more than one mirror.
    shown = run(["apt-cache", "show", "--no-all-versions", f"{full}={versions[0]}"]).decode().split("\n\n")[0]
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line and not line.startswith(" "))
    if "SHA256" not in fields or "Size" not in fields:
        raise UnavailableError(
            f"apt knows {name} {versions[0]} only as it is installed here, without a hash", next_step=_LISTS_ADVICE
        )
    return Package(name, versions[0], fields["SHA256"], int(fields["Size"]))


def _download(packages: Sequence[Package], folder: Path) -> None:
    names = ", ".join(package.origin for package in packages)
    words = ["apt-get", "download", "-q", *(f"{item.name}:{_ARCHITECTURE}={item.version}" for item in packages)]
    try:
        run(words, cwd=folder, variables={name: os.environ[name] for name in _PROXIES if name in os.environ})
    except ToolError as error:
        if any(words in error.stderr for words in ("was not found", "Unable to locate", "404  Not Found")):
            raise UnavailableError(
                f"the mirrors no longer have all the pinned packages, or apt's lists are old: {error.stderr[-500:]}",
                next_step=f"{_LISTS_ADVICE}; if that does not help, pin what there is now: vtpm image lock",
            ) from error
        raise UnavailableError(
            f"{names} cannot be fetched: {error.stderr[-500:]}",
            next_step="See that this machine reaches the mirrors in /etc/apt",
        ) from error


def _place(package: Package, cache: Path) -> Path:
    return cache / f"{package.sha256}.deb"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differs(package: Package, next_step: str) -> ImageError:
    return ImageError(f"{package.origin} is not the file that the lock pins: its SHA-256 differs", next_step=next_step)
