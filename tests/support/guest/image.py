"""Builds a bootable kernel and initramfs for test guests into a cache folder, once for each content.

What goes in is data (`ImageSpec`), so that other tests build images of their own: more modules, programs,
packages, files, a set-up script. `python -m tests.support.guest.image [CACHE]` builds the TPM image and
prints its paths.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.guest.cpio import CpioArchive
from tests.support.guest.debian import (
    KERNEL_META_PACKAGE,
    GuestImageError,
    Kernel,
    fetch_kernel,
    fetch_packages,
    package_files,
    program,
    shared_libraries,
    unpacked_files,
)

CHECKOUT = Path(__file__).resolve().parents[3]
DEFAULT_CACHE = CHECKOUT / "build" / "guest"
INIT_SCRIPT = CHECKOUT / "tests" / "guests" / "init.sh"
_LIBRARY_FOLDER = Path("/usr/lib/x86_64-linux-gnu")
# Debian's merged /usr: the host's paths through these links stay valid in the guest.
_USR_LINKS = ("bin", "sbin", "lib", "lib64")


@dataclass(frozen=True)
class ImageSpec:
    """What an image holds besides busybox, which every image has.

    Args:
        name: for file names; not part of the identity.
        modules: kernel modules by name, loaded in this order, dependencies first; built-in ones are fine.
        later_modules: kernel modules that are in /usr/lib/modules for whoever loads them.
        programs: name -> Debian package; copied from this machine with their shared libraries.
        libraries: shared libraries that programs open at run time, with their own libraries.
        packages: installed Debian packages, each copied whole, with the libraries of its ELF files.
        trees: guest folder -> folder of the host, copied whole (without __pycache__).
        files: guest path -> content.
        links: guest path -> target of the symbolic link.
        setup: shell script run once before the agent serves, after modules are loaded; empty for none.
        fetched: Debian packages that need not be installed here, each copied whole; the libraries of their ELF files
            come from these packages, or else from this machine.
        kernel: Debian's meta-package of the kernel.
    """

    name: str
    modules: tuple[str, ...] = ()
    later_modules: tuple[str, ...] = ()
    programs: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[Path, ...] = ()
    packages: tuple[str, ...] = ()
    trees: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    setup: str = ""
    fetched: tuple[str, ...] = ()
    kernel: str = KERNEL_META_PACKAGE


# All are names of one program, so the list costs nothing in the image.
_TPM2_TOOLS = (
    *("activatecredential", "certify", "changeauth", "checkquote", "clear", "create", "createak", "createek"),
    *("createpolicy", "createprimary", "dictionarylockout", "eventlog", "evictcontrol", "flushcontext"),
    *(
        "getcap",
        "getrandom",
        "hash",
        "import",
        "load",
        "loadexternal",
        "makecredential",
        "nvdefine",
        "nvextend",
    ),
    *(
        "nvincrement",
        "nvread",
        "nvreadpublic",
        "nvundefine",
        "nvwrite",
        "pcrallocate",
        "pcrevent",
        "pcrextend",
    ),
    *("pcrread", "pcrreset", "policyauthvalue", "policypcr", "print", "quote", "readclock", "readpublic"),
    *("selftest", "shutdown", "sign", "startauthsession", "startup", "unseal", "verifysignature"),
)

TPM_IMAGE = ImageSpec(
    name="tpm",
    # No modules: tpm, tpm_crb and tpm_tis are built into Debian's cloud kernel.
    programs={"tpm2": "tpm2-tools"} | {f"tpm2_{tool}": "tpm2-tools" for tool in _TPM2_TOOLS},
    libraries=(_LIBRARY_FOLDER / "libtss2-tcti-device.so.0",),
)


@dataclass(frozen=True)
class Image:
    """A bootable pair of files."""

    kernel: Path
    initramfs: Path
    kernel_release: str


def build_image(spec: ImageSpec = TPM_IMAGE, cache: Path = DEFAULT_CACHE) -> Image:
    """Build the image, or find it in the cache; several processes may ask at the same time.

    Args:
        spec: what goes in.
        cache: folder for kernels and images; made when absent; deleting it is always safe.
    Raises:
        GuestImageError: a package, program, library or module is missing.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        kernel = fetch_kernel(cache, spec.kernel)
        archive = _initramfs(spec, kernel, fetch_packages(spec.fetched, cache))
        digest = hashlib.sha256(archive).hexdigest()[:16]
        final = cache / f"initramfs-{spec.name}-{digest}.cpio"
        if not final.is_file():
            partial = final.with_suffix(".partial")
            partial.write_bytes(archive)
            partial.rename(final)
    return Image(kernel.vmlinuz, final, kernel.release)


def _initramfs(spec: ImageSpec, kernel: Kernel, fetched: tuple[Path, ...]) -> bytes:
    archive = CpioArchive()
    for folder in ("dev", "proc", "sys", "tmp", "root", "run", "etc", "mnt", "usr/bin", "usr/sbin"):
        archive.directory(folder)
    for link in _USR_LINKS:
        archive.directory(f"usr/{link}")
        archive.symlink(link, f"usr/{link}")
    archive.file("init", INIT_SCRIPT.read_bytes(), mode=0o755)
    for inside, content in spec.files.items():
        archive.file(_inside(inside), content, mode=0o755 if content.startswith(b"#!") else 0o644)
    for link, target in spec.links.items():
        archive.symlink(_inside(link), target)
    if spec.setup:
        archive.file("etc/setup", b"#!/bin/sh\n" + spec.setup.encode(), mode=0o755)
    _add_modules(archive, kernel, spec.modules, spec.later_modules)

    for name, package in spec.programs.items():
        _add_binary(archive, program(name, package))
    for library in spec.libraries:
        _add_binary(archive, library)
    for whole in spec.packages:
        for path in package_files(whole):
            _add_host_file(archive, path)
    _add_fetched(archive, fetched)
    for target, tree in spec.trees.items():
        _add_tree(archive, target, tree)
    # Last: an applet never hides a program that was asked for.
    _add_busybox(archive)
    return archive.finish()


def _add_modules(archive: CpioArchive, kernel: Kernel, names: tuple[str, ...], later: tuple[str, ...]) -> None:
    loaded = kernel.modules_in_order(names)
    for path in (*loaded, *kernel.modules_in_order(later)):
        archive.file(f"usr/lib/modules/{path.name}", path.read_bytes())
    archive.file("etc/modules-in-order", "".join(f"/usr/lib/modules/{path.name}\n" for path in loaded).encode())


def _add_busybox(archive: CpioArchive) -> None:
    busybox = program("busybox", "busybox-static")
    if shared_libraries(busybox):
        raise GuestImageError(f"{busybox} is not static: apt-get install busybox-static")
    archive.file("usr/bin/busybox", busybox.read_bytes(), mode=0o755)
    for applet in _applets(busybox):
        archive.symlink(f"usr/bin/{applet}", "busybox")


def _applets(busybox: Path) -> list[str]:
    listing = subprocess.run([str(busybox), "--list"], capture_output=True, text=True, timeout=30, check=True)
    return listing.stdout.split()


def _add_binary(archive: CpioArchive, path: Path) -> None:
    for needed in (path, *shared_libraries(path)):
        _add_through_links(archive, needed)


def _add_through_links(archive: CpioArchive, path: Path) -> None:
    # One name of many stays a link: Debian's tools and libraries are linked inside their own folder.
    while path.is_symlink() and len(path.readlink().parts) == 1:
        archive.symlink(_merged(path), str(path.readlink()))
        path = path.parent / path.readlink()
    archive.file(_merged(path), path.read_bytes(), mode=0o755)


def _add_host_file(archive: CpioArchive, path: Path) -> None:
    if path.is_symlink():
        archive.symlink(_merged(path), str(path.readlink()))
        return
    content = path.read_bytes()
    archive.file(_merged(path), content, mode=path.stat().st_mode & 0o777)
    if content.startswith(b"\x7fELF"):
        for needed in shared_libraries(path):
            _add_through_links(archive, needed)


def _add_fetched(archive: CpioArchive, roots: tuple[Path, ...]) -> None:
    folders = tuple(sorted({path.parent for root in roots for path in root.rglob("lib*.so.*")}))
    for root in roots:
        for path in unpacked_files(root):
            file = root / path
            if file.is_symlink():
                archive.symlink(_merged(path), str(file.readlink()))
                continue
            content = file.read_bytes()
            archive.file(_merged(path), content, mode=file.stat().st_mode & 0o777)
            if content.startswith(b"\x7fELF"):
                for needed in shared_libraries(file, folders):
                    if needed.parent not in folders:
                        _add_through_links(archive, needed)


def _add_tree(archive: CpioArchive, target: str, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if "__pycache__" in relative.parts:
            continue
        inside = f"{_inside(target)}/{relative}"
        if path.is_symlink():
            archive.symlink(inside, str(path.readlink()))
        elif path.is_file():
            archive.file(inside, path.read_bytes(), mode=path.stat().st_mode & 0o777)


def _merged(path: Path) -> str:
    inside = _inside(str(path))
    return f"usr/{inside}" if inside.split("/", 1)[0] in _USR_LINKS else inside


def _inside(path: str) -> str:
    return path.lstrip("/")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    image = build_image(cache=Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_CACHE)
    print(image.kernel, image.initramfs)
