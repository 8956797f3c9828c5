"""What an entry module needs: modules by reading and running imports, libraries by asking files. For the builder."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import ImageError, UsageError
from vtpm.image.tools import LIBRARY_FOLDERS, PinnedTools, run

_PACKAGE = "vtpm"
ENGINE = "vtpm.engine._libtpms"
_NEEDED = re.compile(r"\(NEEDED\)\s+Shared library: \[([^\]/]+)\]")
_DEPENDS = re.compile(rb"\0depends=([\w,-]*)\0")


@dataclass(frozen=True)
class Loaded:
    """What importing loads.

    Args:
        files: file of each module that is not part of the interpreter.
        engine_version: of libtpms, MAJOR<<16 | MINOR<<8 | MICRO.
    """

    files: dict[str, Path]
    engine_version: int


def trace(tools: PinnedTools, paths: Iterable[Path], names: Iterable[str], left_out: Iterable[str]) -> Loaded:
    """Import modules in the pinned interpreter; return what that loads.

    Args:
        paths: where to look for them, beside the standard library.
        names: modules to import.
        left_out: modules that are not there for those.
    Raises:
        ToolError: one of them cannot be imported.
    """
    script = Path(__file__).with_name("inside.py")
    lists = (map(str, paths), sorted(names), sorted(left_out))
    found = json.loads(tools.python(script, "trace", *map(":".join, lists)))
    files = {name: Path(file) for name, file in found["modules"].items() if file is not None}
    return Loaded(files, found["engine_version"])


def imported(source: Path, entry: str) -> frozenset[str]:
    """Return every module that `entry` imports, also inside functions and through other modules of vtpm, and itself.

    What is imported for type checkers alone does not count.

    Args:
        source: folder that holds the package vtpm.
        entry: a module of vtpm.
    Raises:
        UsageError: there is no module `entry`.
        ImageError: a module cannot be read.
    """
    if _module_file(source, entry) is None:
        raise UsageError(f"there is no module {entry} in {source}, which the image's definition names as its entry")
    found: set[str] = set()
    left = [entry]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        path = _module_file(source, name)
        if path is not None:
            left += [parent for parent in _parents(name) if parent not in found]
            left += _imports(source, path)
    return frozenset(found)


def libraries(files: Iterable[Path], root: Path) -> dict[str, Path]:
    """Return the file below `root` of each library that `files` need, by the name that they need it by.

    Raises:
        ImageError: no package has one of them.
    """
    found: dict[str, Path] = {}
    left = list(files)
    while left:
        listing = run(["readelf", "--dynamic", "--wide", *left]).decode()
        left = []
        for name in sorted(set(_NEEDED.findall(listing)) - set(found)):
            places = (root / folder / name for folder in LIBRARY_FOLDERS)
            place = next((place for place in places if place.exists()), None)
            if place is None:
                raise ImageError(f"no package of the image's definition has the library {name}, which is needed")
            found[name] = place
            left.append(place)
    return found


def kernel_modules(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """Return the files of kernel modules and of those that they depend on, in the order in which they load.

    Args:
        folder: the kernel's modules, lib/modules/RELEASE.
        names: modules; those built in are left out.
    Raises:
        ImageError: one is neither a module nor built in.
    """
    files = {_module_name(path.name): path for path in folder.rglob("*.ko")}
    built_in = {_module_name(line.rpartition("/")[2]) for line in (folder / "modules.builtin").read_text().splitlines()}
    ordered: dict[Path, None] = {}

    def visit(name: str) -> None:
        path = files.get(name)
        if path is None:
            if name in built_in:
                return
            raise ImageError(f"the kernel {folder.name} has no module {name}")
        if path in ordered:
            return
        # .modinfo is a run of NUL-ended "key=value" texts; each module has one "depends=".
        match = _DEPENDS.search(path.read_bytes())
        for dependency in match[1].decode().split(",") if match else ():
            if dependency:
                visit(_module_name(dependency))
        ordered[path] = None

    for name in names:
        visit(_module_name(name))
    return tuple(ordered)


def _module_name(file_or_name: str) -> str:
    return file_or_name.removesuffix(".ko").replace("-", "_")


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _module_file(source: Path, name: str) -> Path | None:
    if name.partition(".")[0] != _PACKAGE:
        return None
    place = source.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imports(source: Path, path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{path} cannot be read: {error}") from error
    for node in _run_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ImageError(f"{path} has a relative import, line {node.lineno}")
            yield node.module
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if _module_file(source, name) is not None)


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_nodes(child)
