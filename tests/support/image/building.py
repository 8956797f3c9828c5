"""Builds images with the command, from a copy of this checkout's sources whose entry is a stand-in."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vtpm.image.definition import lock_file
from vtpm.tpm.types import Make

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".cache" / "image-packages"
STAND_IN = ROOT / "tests/integration/image/fixture/vm_main.py"
BUILD_TIMEOUT_S = 110


def copy_sources(place: Path) -> Path:
    """Copy the sources below `place`, with the stand-in as entry; return the folder that holds the package vtpm."""
    source = place / "src"
    shutil.copytree(ROOT / "src" / "vtpm", source / "vtpm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(STAND_IN, source / "vtpm" / "instance" / "vm_main.py")
    return source


def build(
    source: Path,
    images: Path,
    *,
    make: Make = Make.LIBTPMS,
    lock: Path | None = None,
    cache: Path = CACHE,
    environ: Mapping[str, str] | None = None,
    umask: int = -1,
    before: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `vtpm image build` of the copied sources; with --json, so that its folder is on stdout.

    Args:
        make: of the vTPMs that it is to run.
        environ: more of its environment.
        umask: its umask; -1 for this process's own.
        before: words that run the command, as setpriv.
    """
    words = [*before, sys.executable, "-B", "-m", "vtpm.cli.main", "image", "build", "--json", "--make", make]
    words += ["--images", str(images), "--lock", str(lock or lock_file(make)), "--cache", str(cache)]
    own = {"PYTHONPATH": str(source), "PATH": os.environ["PATH"], **(environ or {})}
    return subprocess.run(
        words, env=own, umask=umask, cwd=source, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
    )


def renew_lock(path: Path, make: Make = Make.LIBTPMS) -> None:
    """Pin what the mirrors have today."""
    words = [sys.executable, "-m", "vtpm.cli.main", "image", "lock", "--make", make, "--lock", str(path)]
    subprocess.run(words, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)


def built_folder(done: subprocess.CompletedProcess[str]) -> Path:
    """Return the folder that a successful build names."""
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["folder"])


def build_for_tests(place: Path) -> tuple[Path, Path]:
    """Build an image with the stand-in below `place`; return its folder and the lock that it was built with."""
    return _build_by_a_lock(copy_sources(place), place)


def build_vtpmd(place: Path, make: Make = Make.LIBTPMS, *, source: Path | None = None) -> Path:
    """Give the image of this checkout, or build that of other sources, below `place`; return the folder of images."""
    if source is not None:
        return _build_by_a_lock(source, place, make)[0].parents[1]
    shutil.copytree(_built(make), place / "images", dirs_exist_ok=True)
    return place / "images"


@functools.cache
def _built(make: Make) -> Path:
    """Build it, once in a session."""
    place = tempfile.mkdtemp(prefix="vtpm-built-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return _build_by_a_lock(ROOT / "src", Path(place), make)[0].parents[1]


def _build_by_a_lock(source: Path, place: Path, make: Make = Make.LIBTPMS) -> tuple[Path, Path]:
    """Build by the shipped lock, unless the mirrors have gone on since it was written."""
    lock = lock_file(make)
    done = build(source, place / "images", make=make)
    if done.returncode == 6 and "vtpm image lock" in json.loads(done.stderr)["next_step"]:
        lock = place / f"renewed-{make}.toml"
        renew_lock(lock, make)
        done = build(source, place / "images", make=make, lock=lock)
    return built_folder(done), lock
