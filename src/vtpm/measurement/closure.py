"""What the services execute: all that their interpreter could import, the interpreter, and the libraries under both.

`python -I -m vtpm.measurement.closure` prints the measurement of the services of that interpreter.

Everything on the import path counts, not only what vtpm is known to import: a file that was added is imported in the
place of another, or because a library tries whether it is there. Compiled files in `__pycache__` do not count, because
the services are told to take none (`-X pycache_prefix`). For the starter, and for predictions.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import UnavailableError
from vtpm.measurement.digest import Contents, combine, content_digest

MAX_FILES = 50_000
MAX_DEPTH = 32
"""Of folders in folders; links among them can be endless."""
_SUFFIXES = (*importlib.machinery.all_suffixes(), ".toml", ".pth", "entry_points.txt")
"""What is imported, what site runs, and the data that says what is loaded and what an instance may do."""
_BUNDLED = re.compile(r"\.so(\.[0-9]+)+$")
"""A library that a package brings with it."""
_CONFIGURATION = (Path("/etc/ssl/openssl.cnf"),)
"""What has a library load another one; the services are told to take none, but the engine is not."""
_RESOLUTION = (Path("/etc/ld.so.cache"), Path("/etc/ld.so.preload"))
"""What says which libraries are loaded; when these change, the libraries are looked for again."""
_LOADED = re.compile(r"^\t(?:\S+ => (.+)|(/.+)) \(0x[0-9a-f]+\)$")
"""A line of the loader's list: NAME => PLACE (ADDRESS), or for the loader itself PLACE (ADDRESS)."""
_TCTI = "libtss2-tcti-"
_LIST_TIMEOUT_S = 20.0
_MAX_VARIABLE_CHARS = 32_000
"""Of one variable of the environment, of which the kernel takes 128 KiB. Source: execve(2)."""

Files = dict[str, Path]
"""Place of each measured file by its name."""


@dataclass(frozen=True)
class Closure:
    """What the services execute.

    Args:
        files: all of it.
        libraries: what the loader finds for it, with its name; part of `files`.
        fingerprint: hex; the same as long as no file was changed, added or removed in this boot, by the kernel's word.
    """

    files: Files
    libraries: Files
    fingerprint: str

    def measurement(self) -> str:
        """Read everything, and return SHA-256 in hex. Raises UnavailableError: a file cannot be read."""
        return measurement_of(self.contents({}))

    def contents(self, known: Contents) -> Contents:
        """Read all files that are not known as they are. Raises UnavailableError: one cannot be read."""
        return read_contents(self.files, known)


def read_contents(files: Files, known: Contents) -> Contents:
    """Read all files that are not known as they are. Raises UnavailableError: one cannot be read."""
    try:
        return {name: _content(place, known.get(name, ("", ""))) for name, place in files.items()}
    except OSError as error:
        raise _unreadable(error) from error


def measurement_of(contents: Contents) -> str:
    """Return SHA-256, in hex, over all names and contents."""
    return combine((name, bytes.fromhex(digest)) for name, (_, digest) in contents.items())


def find_closure(last: tuple[Files, str] | None = None, import_path: Sequence[str] | None = None) -> Closure:
    """Find what services of this interpreter execute; nothing is read yet.

    Args:
        last: libraries and fingerprint of an earlier closure: while that is still the same, the libraries are too.
        import_path: folders that modules come from; default: this process's, which must be isolated (`-I`).
    Raises:
        UnavailableError: a folder cannot be read, or the loader does not say what it loads.
    """
    path = [Path(entry) for entry in (sys.path if import_path is None else import_path)]
    interpreter = Path(os.path.realpath("/proc/self/exe"))
    try:
        files = _importable(path) | {"interpreter": interpreter}
        files |= {f"configuration/{place.name}": place for place in _CONFIGURATION if place.exists()}
        if import_path is None:
            _check_covers(files)
        if last is not None:
            libraries, fingerprint = last
            if _fingerprint(files | libraries) == fingerprint:
                return Closure(files | libraries, libraries, fingerprint)
        libraries = _libraries(interpreter, path, files)
        return Closure(files | libraries, libraries, _fingerprint(files | libraries))
    except OSError as error:
        raise _unreadable(error) from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"the services cannot be measured: {error}") from error


def _unreadable(error: OSError) -> UnavailableError:
    return UnavailableError(
        f"the software cannot be measured: {error.filename}: {error.strerror}",
        next_step="Install it where the user who starts it can read all of it",
    )


def _check_covers(files: Files) -> None:
    """Refuse an installation of vtpm that comes from elsewhere, as some editable ones do, by a hook at start-up."""
    places = {os.fspath(place) for place in files.values()}
    for name, module in sorted(sys.modules.items()):
        place = getattr(module, "__file__", None)
        if name.startswith("vtpm.") and place is not None and place not in places:
            raise UnavailableError(
                f"the services cannot be measured: {name} was imported from {place}, which is not on the import path",
                next_step="Install vtpm as a package, or by a path in a .pth file",
            )


def _importable(path: Sequence[Path]) -> Files:
    files: Files = {}
    for number, entry in enumerate(path):
        # By their number: which of two files of one name is imported depends on it.
        if entry.is_dir():
            for name, place in _below(os.fspath(entry), str(number), MAX_DEPTH):
                files[name] = Path(place)
                if len(files) > MAX_FILES:
                    raise UnavailableError(f"the services cannot be measured: {entry} has more than {MAX_FILES} files")
        elif entry.is_file():
            files[str(number)] = entry
    return files


def _below(folder: str, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if not depth:
        raise UnavailableError(f"the services cannot be measured: the folders in {folder} have no end")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _below(entry.path, f"{name}/{entry.name}", depth - 1)
            elif (entry.name.endswith(_SUFFIXES) or _BUNDLED.search(entry.name)) and entry.is_file():
                yield f"{name}/{entry.name}", entry.path


def _libraries(interpreter: Path, path: Sequence[Path], files: Files) -> Files:
    found: Files = {}
    _add(found, _loaded(interpreter, Path("/"), ()))
    compiled = [place for place in files.values() if place.suffix == ".so"]
    for entry in path:
        # With a folder, so that it is these which are loaded; relative, as a space or colon ends a name.
        inside = [f"./{place.relative_to(entry)}" for place in compiled if place.is_relative_to(entry)]
        _add(found, _loaded(interpreter, entry, inside))
    # tpm2-tss loads what a TCTI names when it is asked for. Without a folder: wherever the loader finds it first, and
    # it looks for the TCTI's plain name before that of its library. Source: tpm2-tss, src/tss2-tcti/tcti-dl.c.
    for loader in [place for name, place in found.items() if name.startswith("library/libtss2-tctildr.so")]:
        modules = sorted(place.name for place in loader.parent.glob(f"{_TCTI}*.so*"))
        plain = sorted({name.removeprefix(_TCTI).partition(".so")[0] for name in modules})
        _add(found, [loader.parent / name for name in modules])
        for name in (*modules, *plain):
            _add(found, _loaded(interpreter, loader.parent, [name]))
    if not any(name.startswith("library/libc.") for name in found):
        raise UnavailableError(f"the services cannot be measured: the loader does not say what {interpreter} loads")
    return found


def _add(found: Files, places: Iterable[Path]) -> None:
    """Name libraries by their file; of two that have one name, and are not one file, both count."""
    for place in places:
        name = f"library/{place.name}"
        while name in found and not place.samefile(found[name]):
            name += "+"
        found[name] = place


def _loaded(interpreter: Path, folder: Path, modules: Iterable[str]) -> list[Path]:
    """Have the loader itself say what it would load for an interpreter with these modules. Source: ld.so(8), ldd."""
    if not folder.is_dir():
        return []
    return [place for some in _in_variables(modules) for place in _listed(interpreter, folder, some)]


def _in_variables(modules: Iterable[str]) -> Iterator[str]:
    """Put names together so that each variable is one that the kernel takes; one at least."""
    some = ""
    for name in modules:
        if len(some) + len(name) >= _MAX_VARIABLE_CHARS:
            yield some
            some = ""
        some += f":{name}" if some else name
    yield some


def _listed(interpreter: Path, folder: Path, preloaded: str) -> list[Path]:
    listed = subprocess.run(
        [interpreter, "-I", "-c", ""],
        env={"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": preloaded, "LC_ALL": "C"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what cannot be loaded is not loaded by the services either
        timeout=_LIST_TIMEOUT_S,
        check=False,
    )
    words = [_LOADED.match(line) for line in listed.stdout.decode(errors="surrogateescape").splitlines()]
    places = [folder / (word[1] or word[2]) for word in words if word is not None]
    return [place for place in places if place.exists()]


def _fingerprint(files: Files) -> str:
    total = hashlib.sha256()
    for name, place in sorted([*files.items(), *((str(place), place) for place in _RESOLUTION)]):
        try:
            seen = _seen(place)
        except FileNotFoundError:
            continue
        total.update(f"{name}\0{place}\0{seen}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _seen(place: Path) -> str:
    """Return what the kernel says of a file; a change of content or name changes ctime, which only the kernel sets."""
    status = place.stat()
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _content(place: Path, known: tuple[str, str]) -> tuple[str, str]:
    seen = _seen(place)
    return known if known[0] == seen else (seen, content_digest(place).hex())


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{find_closure().measurement()}\n")
    except UnavailableError as failure:
        sys.exit(str(failure))
