"""Builds an image: fetch, unpack, compile, find what is needed, pack, describe. For the command line.

The same definition, lock and sources give the same bytes, whoever builds, where and when. Output is drafted beside its
place and renamed into it, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vtpm.errors import ImageError, StoreError
from vtpm.image import closure, manifest, packages
from vtpm.image.cpio import File, archive
from vtpm.image.definition import Definition, Lock, locked
from vtpm.image.engine_build import FILE_NAME, build_engine, built_with
from vtpm.image.opened import OpenImage
from vtpm.image.tools import PinnedTools

_INTERPRETER = "usr/bin/python3.11"
_LOADER_PATH = "/lib64/ld-linux-x86-64.so.2"
_LIBRARY_FOLDER = "/lib/x86_64-linux-gnu"
_STDLIB = "usr/lib/python3.11"
_OWN_FOLDER = "/usr/lib/vtpm"
_MODULE_FOLDER = "/lib/modules"
_MOUNT_POINTS = ("/dev", "/proc", "/sys", f"/{_STDLIB}/lib-dynload")
# The kernel reads LZ4's legacy form; under emulation it unpacks a fifth of a second faster than zstd's.
_LZ4 = ("-q", "-l", "-12", "-c")
# -I -S: nothing of the environment, no site-packages. The collector would find no garbage among what is imported.
_INIT = """#!/{interpreter} -ISB
import gc, sys
gc.disable()
sys.path.append("{folder}")
from {entry} import main
gc.enable()
gc.freeze()
main()
"""


@dataclass(frozen=True)
class _Piece:
    file: File
    origin: str


def build(
    definition: Definition, lock: Lock, *, source: Path, images: Path, cache: Path, report: Callable[[str], None]
) -> Path:
    """Build an image; return its folder, `images`/NAME/MEASUREMENT.

    Args:
        definition, lock: what it is made of.
        source: folder that holds the package vtpm, which need not be the one that runs.
        images: where images are kept.
        cache: where fetched packages are kept.
        report: is told what is being done.
    Raises:
        UnavailableError: a package's version has gone from the mirrors, no mirror or no compiler is there.
        ImageError: a package is not the pinned one, or the image would hold more than its definition allows.
        UsageError: definition and lock, or definition and sources, do not fit together.
        StoreError: the disk is full or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="vtpm-image-") as work:
            return _build(definition, lock, source, images, cache, Path(work).resolve(), report)
    except OSError as error:
        raise StoreError(f"the image cannot be built: {error.filename or images}: {error.strerror}") from error


def _build(
    definition: Definition,
    lock: Lock,
    source: Path,
    images: Path,
    cache: Path,
    work: Path,
    report: Callable[[str], None],
) -> Path:
    root = work / "root"
    pinned = locked(definition, lock)
    report("fetching packages")
    packages.fetch(pinned, cache)
    report("unpacking packages")
    origins = packages.origins((package, packages.unpack(packages.read(package, cache), root)) for package in pinned)
    tools = PinnedTools(root)

    report("compiling the engine")
    own = work / "own"
    shutil.copytree(source / "vtpm", own / "vtpm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (work / "engine").mkdir()
    engine = build_engine(own, root, work / "engine")
    shutil.copy(engine, own / "vtpm/engine" / FILE_NAME)

    report("collecting what is needed")
    modules = closure.imported(own, definition.entry)
    paths = (own, root / "usr/lib/python3/dist-packages")
    loaded = closure.trace(tools, paths, modules, definition.left_out)
    _check_stdlib(definition, loaded.files, root)
    pieces = _python(tools, loaded.files, own, root, origins, work)
    pieces |= _libraries(root, origins, loaded.files, definition.programs)
    pieces |= _kernel_modules(root, origins, definition.kernel_modules)
    init = _INIT.format(interpreter=_INTERPRETER, folder=_OWN_FOLDER, entry=definition.entry)
    pieces["/init"] = _Piece(File(init.encode(), executable=True), _own_origin())

    report("packing")
    unpacked = archive({path: piece.file for path, piece in pieces.items()}, _MOUNT_POINTS)
    initramfs = tools.run("usr/bin/lz4", *_LZ4, stdin=unpacked)
    release = lock.kernel.removeprefix("linux-image-")
    kernel = (root / f"boot/vmlinuz-{release}").read_bytes()
    described = manifest.Manifest(
        name=definition.name,
        kernel=_part(kernel, lock.packages[lock.kernel].origin),
        initramfs=_part(initramfs, "made of the files below"),
        command_line=definition.command_line,
        engine_version=loaded.engine_version,
        unpacked_bytes=len(unpacked),
        built_with=built_with(),
        files=tuple(
            manifest.ListedFile(path, _sha256(piece.file.content), len(piece.file.content), piece.origin)
            for path, piece in sorted(pieces.items())
        ),
    )
    content = {manifest.KERNEL: kernel, manifest.INITRAMFS: initramfs, manifest.MANIFEST: manifest.encode(described)}
    return _keep(images / definition.name, described.measurement, content)


def _check_stdlib(definition: Definition, files: Mapping[str, Path], root: Path) -> None:
    standard = {name for name, path in files.items() if path.is_relative_to(root / _STDLIB)}
    more = standard - definition.stdlib
    if more:
        raise ImageError(
            f"{definition.entry} imports more of the standard library than the image's definition allows: "
            + ", ".join(sorted(more)),
            next_step="Import less, or add them to `stdlib` in the definition",
        )


def _python(
    tools: PinnedTools,
    files: Mapping[str, Path],
    own: Path,
    root: Path,
    origins: Mapping[str, str],
    work: Path,
) -> dict[str, _Piece]:
    # By file, not by module: os.path and posixpath are one. The library's place is marked by os, which is frozen.
    found = {}
    jobs = []
    for number, path in enumerate(sorted({*files.values(), root / _STDLIB / "os.py"})):
        if path.is_relative_to(own):
            place, origin = f"{_OWN_FOLDER}/{path.relative_to(own)}", _own_origin()
        elif path.is_relative_to(root / _STDLIB):
            place, origin = f"/{path.relative_to(root)}", origins[str(path.relative_to(root))]
        else:
            place, origin = f"{_OWN_FOLDER}/{path.name}", origins[str(path.relative_to(root))]
        if path.suffix == ".py":
            compiled = work / f"{number}.pyc"
            jobs.append((str(path), str(compiled), place))
            found[f"{place}c"] = (compiled, origin)
        else:
            found[place] = (path, origin)
    tools.python(Path(closure.__file__).with_name("inside.py"), "compile", stdin=json.dumps(jobs).encode())
    return {place: _Piece(File(path.read_bytes()), origin) for place, (path, origin) in found.items()}


def _libraries(
    root: Path, origins: Mapping[str, str], files: Mapping[str, Path], more_programs: Iterable[str]
) -> dict[str, _Piece]:
    programs = (_INTERPRETER, *more_programs)
    extensions = [path for path in files.values() if path.suffix == ".so"]
    needed = closure.libraries([*(root / program for program in programs), *extensions], root)
    found = {_LOADER_PATH: needed.pop(Path(_LOADER_PATH).name)}
    found |= {f"/{program}": root / program for program in programs}
    executable = set(found)
    found |= {f"{_LIBRARY_FOLDER}/{name}": path for name, path in needed.items()}
    pieces = {}
    for place, path in found.items():
        real = path.resolve()
        pieces[place] = _Piece(File(real.read_bytes(), place in executable), origins[str(real.relative_to(root))])
    return pieces


def _kernel_modules(root: Path, origins: Mapping[str, str], names: Iterable[str]) -> dict[str, _Piece]:
    (folder,) = (root / "lib/modules").iterdir()
    # Init loads them in the order of their names.
    return {
        f"{_MODULE_FOLDER}/{number:02}-{path.name}": _Piece(
            File(path.read_bytes()), origins[str(path.relative_to(root))]
        )
        for number, path in enumerate(closure.kernel_modules(folder, names))
    }


def _keep(folder: Path, measurement: str, content: Mapping[str, bytes]) -> Path:
    final = folder / measurement
    if final.exists():
        # The same image, unless somebody changed it since: that is an error, and the evidence stays.
        OpenImage(final).close()
        return final
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
    try:
        for name, data in content.items():
            with (draft / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            (draft / name).chmod(0o644)
        draft.chmod(0o755)
        _sync(draft)
        draft.rename(final)
        _sync(folder)
    except BaseException:
        # Also when the builder is interrupted.
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _part(data: bytes, origin: str) -> manifest.Part:
    return manifest.Part(_sha256(data), len(data), origin)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _own_origin() -> str:
    return f"vtpm {version('vtpm')}"
