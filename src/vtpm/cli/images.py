"""Commands on images of vTPMs' virtual machines: build, list, show, lock; with their caller's rights, no manager.

The builder is imported when used, as whatever other commands do not need.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

import vtpm
from vtpm.cli.files import replace_file
from vtpm.cli.output import Output, print_fields, print_json, print_line, print_message, print_table, progress
from vtpm.cli.session import Session, json_option, pass_session
from vtpm.errors import NotFoundError, UsageError
from vtpm.tpm.types import Make
from vtpm.wire.paths import default_cache_dir, default_image_dir

_PATH = click.Path(path_type=Path)
_SHORTEST_PREFIX = 6

images_option = click.option(
    "--images", type=_PATH, metavar="DIR", help="Where images are kept.  [default: /var/lib/vtpm/images, or the user's]"
)
make_option = click.option(
    "--make",
    type=click.Choice([make.value for make in Make]),
    default=Make.LIBTPMS.value,
    show_default=True,
    help="Of the vTPMs that it is to run.",
)
lock_option = click.option(
    "--lock", "lock_file", type=_PATH, metavar="FILE", help="Pins packages.  [default: that of this version of vtpm]"
)


@click.group()
def image() -> None:
    """Build and look at images for vTPMs in virtual machines of their own."""


@image.command()
@make_option
@images_option
@lock_option
@click.option("--cache", type=_PATH, metavar="DIR", help="Where fetched packages are kept.")
@json_option
@pass_session
def build(session: Session, make: str, images: Path | None, lock_file: Path | None, cache: Path | None) -> None:
    """Build the image of a vTPM's virtual machine, the same bytes on every machine."""
    from vtpm.image import definition
    from vtpm.image.build import build as build_image
    from vtpm.image.opened import read_manifest

    def report(step: str) -> None:
        if session.output is Output.HUMAN:
            print_message(f"{step} ...")

    folder = build_image(
        definition.read_definition(definition.definition_file(Make(make))),
        definition.read_lock(lock_file or definition.lock_file(Make(make))),
        source=Path(next(iter(vtpm.__path__))).parent,
        images=_images(images),
        cache=cache or default_cache_dir(os.geteuid(), os.environ) / "packages",
        report=report,
    )
    _print_image(session, folder, read_manifest(folder).measurement)


@image.command("list")
@images_option
@json_option
@pass_session
def list_images(session: Session, images: Path | None) -> None:
    """List the images that there are; what they hold is not verified."""
    from vtpm.image.opened import image_folders, read_manifest

    found = [(folder, read_manifest(folder)) for folder in image_folders(_images(images))]
    if session.output is Output.JSON:
        print_json(
            [
                {"name": m.name, "make": m.make, "measurement": m.measurement, "folder": str(folder)}
                for folder, m in found
            ]
        )
        return
    rows = [(m.name, m.make, m.measurement[:16], m.kernel.origin, _megabytes(m.initramfs.size)) for _, m in found]
    print_table(("NAME", "MAKE", "MEASUREMENT", "KERNEL", "INITRAMFS"), rows)


@image.command()
@click.argument("which", metavar="MEASUREMENT|FOLDER")
@images_option
@click.option("--files", is_flag=True, help="List every file of the initramfs, with its origin.")
@json_option
@pass_session
def show(session: Session, which: str, images: Path | None, files: bool) -> None:
    """Verify one image and tell what it is: by the start of its measurement, or by its folder."""
    from vtpm.image.opened import OpenImage

    folder = Path(which) if "/" in which else _find(_images(images), which)
    with OpenImage(folder) as opened:
        found = opened.manifest
    if session.output is Output.JSON:
        print_json({"measurement": found.measurement, "folder": str(folder), "make": found.make, **vars(found)})
    elif files:
        rows = [(file.path, str(file.size), file.sha256[:16], file.origin) for file in found.files]
        print_table(("PATH", "BYTES", "SHA-256", "ORIGIN"), rows)
    else:
        version = found.engine_version
        print_fields(
            [
                ("name", found.name),
                ("make", found.make),
                ("measurement", found.measurement),
                ("folder", str(folder)),
                ("kernel", f"{found.kernel.origin}, {_megabytes(found.kernel.size)}, {found.kernel.sha256}"),
                ("initramfs", f"{_megabytes(found.initramfs.size)}, {found.initramfs.sha256}"),
                ("in memory", f"{_megabytes(found.unpacked_bytes)} in {len(found.files)} files"),
                ("command line", found.command_line),
                ("engine", f"{version >> 16}.{version >> 8 & 0xFF}.{version & 0xFF}"),
                ("built with", ", ".join(found.built_with)),
            ]
        )


@image.command()
@make_option
@lock_option
@json_option
@pass_session
def lock(session: Session, make: str, lock_file: Path | None) -> None:
    """Pin the packages that apt would install today; builds use them from then on."""
    from vtpm.image import definition
    from vtpm.image.packages import resolve

    path = lock_file or definition.lock_file(Make(make))
    with progress("Asking apt", session.output):
        found = resolve(definition.read_definition(definition.definition_file(Make(make))))
    replace_file(path, definition.encode_lock(found).encode())
    if session.output is Output.JSON:
        print_json({"file": str(path), "packages": {item.name: item.version for item in found.packages.values()}})
    else:
        print_line(f"{path} pins {len(found.packages)} packages; the kernel is {found.packages[found.kernel].origin}")


def _images(chosen: Path | None) -> Path:
    return chosen or default_image_dir(os.geteuid(), os.environ)


def _find(images: Path, prefix: str) -> Path:
    if len(prefix) < _SHORTEST_PREFIX:
        raise UsageError(f"{prefix!r} is too short: give {_SHORTEST_PREFIX} or more characters of the measurement")
    from vtpm.image.opened import image_folders

    found = [folder for folder in image_folders(images) if folder.name.startswith(prefix)]
    if not found:
        raise NotFoundError(f"no image in {images} has a measurement that starts with {prefix}")
    if len(found) > 1:
        raise UsageError(f"{prefix} is the start of {len(found)} measurements", next_step="Give more of it")
    return found[0]


def _print_image(session: Session, folder: Path, measurement: str) -> None:
    if session.output is Output.JSON:
        print_json({"measurement": measurement, "folder": str(folder)})
    else:
        print_line(f"image {measurement} in {folder}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
