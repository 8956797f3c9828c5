"""What dom0 and its guests hold: Debian's Xen, kernel and Python, a busybox; nothing of Xen is installed here.

Used by `host` alone.
"""

from __future__ import annotations

import gzip
import lzma
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.support.guest import DEFAULT_CACHE, Image, ImageSpec, build_image
from tests.support.guest.debian import fetch_packages

HYPERVISOR_PACKAGE = "xen-hypervisor-4.17-amd64"
KERNEL = "linux-image-amd64"
"""The one flavour of Debian's kernel that can be dom0; the guests have it too, so that there is one in the image."""
GUEST_KERNEL = "/boot/guest/vmlinux"
GUEST_INITRAMFS = "/boot/guest/initramfs"
PORTS = "/dev/virtio-ports"
"""Folder of the machine's ports in dom0, by their names."""
READY = "/run/xen/ready"
GUEST_LOGS = "/var/log/xen/console"
FRONT_END = "/usr/lib/modules/xen-tpmfront.ko"
"""In a guest. Loading it takes as long as the TPM behind it takes to answer the kernel's first commands."""
_BIN = "/usr/lib/xen-4.17/bin"
_XEN_PACKAGES = (
    *("xen-utils-4.17", "xen-utils-common", "xenstore-utils"),
    *("libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1"),
    *("libxenmisc4.17", "libxenstore4", "libxentoolcore1", "libxentoollog1", "libyajl2", "libncurses6"),
)
_PYTHON = ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib")

OWN_ROOT = "/etc/own-root"
# As switch_root does, but in place: a process is confined with pivot_root, which refuses to leave the initramfs.
_OWN_ROOT_SCRIPT = b"""#!/bin/sh
mount --bind / /mnt && cd /mnt && mount --move . / && exec chroot . /init
"""

# xen-init-dom0 writes dom0's own nodes, and does nothing where somebody wrote them before.
_SETUP = f"""
mkdir -p /dev/pts /var/lib/xen /var/lib/xenstored /run/xen /run/xenstored /run/lock {GUEST_LOGS}
ln -s /run /var/run
ln -s /run/lock /var/lock
mount -t devpts devpts /dev/pts
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xen/xenstored.pid || exit
for i in $(seq 100); do xenstore-read -s / > /dev/null 2>&1 && break; sleep 0.1; done
mkdir {PORTS}
for port in /sys/class/virtio-ports/*; do ln -s ../${{port##*/}} {PORTS}/$(cat $port/name); done
xen-init-dom0 && xenconsoled --log=guest --pid-file=/run/xen/xenconsoled.pid && touch {READY}
"""

DOM0 = ImageSpec(
    name="dom0",
    kernel=KERNEL,
    modules=("xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs", "virtio_pci", "virtio_console"),
    packages=_PYTHON,
    # glibc opens it at run time, when one of xl's threads is ended.
    libraries=(Path("/lib/x86_64-linux-gnu/libgcc_s.so.1"),),
    fetched=_XEN_PACKAGES,
    files={OWN_ROOT: _OWN_ROOT_SCRIPT},
    # In /usr/sbin Debian has a script under each of these names, which finds out which Xen is running.
    links={f"/usr/bin/{name}": f"{_BIN}/{name}" for name in ("xl", "xenstored", "xenconsoled", "xen-init-dom0")}
    | {"/usr/bin/xenconsole": f"{_BIN}/xenconsole"},
    setup=_SETUP,
)
"""A host without vTPMs."""

GUEST = ImageSpec(
    name="xen-guest",
    kernel=KERNEL,
    later_modules=("xen-tpmfront",),
    # Its agent is served on the console, where no message of the kernel may come between.
    setup="dmesg -n 1\n",
)


def build_host(dom0: ImageSpec = DOM0, guest: ImageSpec = GUEST, cache: Path = DEFAULT_CACHE) -> Image:
    """Build dom0's image, in which the guests' is.

    Raises:
        GuestImageError: a package, program, library or module is missing.
    """
    inner = build_image(guest, cache)
    kernel = _uncompressed_kernel(inner.kernel)
    files = {GUEST_KERNEL: kernel.read_bytes(), GUEST_INITRAMFS: inner.initramfs.read_bytes()}
    return replace(build_image(replace(dom0, files={**dom0.files, **files}), cache), kernel=kernel)


def fetch_hypervisor(cache: Path = DEFAULT_CACHE) -> Path:
    """Debian's Xen, uncompressed, as multiboot takes it. Raises GuestImageError: it cannot be fetched."""
    (root,) = fetch_packages((HYPERVISOR_PACKAGE,), cache)
    (compressed,) = (root / "boot").glob("xen-*-amd64.gz")
    return _kept(root / "xen.elf", lambda: gzip.decompress(compressed.read_bytes()))


def _uncompressed_kernel(vmlinuz: Path) -> Path:
    """The ELF file within a kernel: Xen and its tools take it too, and under emulation unpacking takes them seconds.

    Source: Linux Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    """

    def unpack() -> bytes:
        image = vmlinuz.read_bytes()
        offset, length = struct.unpack_from("<II", image, 0x248)
        start = (image[0x1F1] + 1) * 512 + offset
        return lzma.LZMADecompressor().decompress(image[start : start + length])

    return _kept(vmlinuz.with_name(vmlinuz.name.replace("vmlinuz", "vmlinux")), unpack)


def _kept(path: Path, make: Callable[[], bytes]) -> Path:
    """Make a file in the cache, once; several processes may ask at the same time."""
    if not path.is_file():
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(make())
        partial.rename(path)
    return path
