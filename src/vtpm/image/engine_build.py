"""Compiles the engine's door to libtpms for an image: with pinned headers and libraries, the same bytes in any folder.

The compiler and cffi, which writes the C, are this machine's; the manifest names both.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtpm.image.tools import run

_EMIT = "import runpy, sys; runpy.run_path(sys.argv[1])['ffibuilder'].emit_c_code(sys.argv[2])"
FILE_NAME = "_libtpms.abi3.so"


def build_engine(source: Path, root: Path, work: Path) -> Path:
    """Compile and return the extension's file.

    Args:
        source: folder that holds the package vtpm.
        root: has the unpacked packages.
        work: an empty folder.
    Raises:
        UnavailableError: there is no compiler.
        ToolError: cffi or the compiler failed.
    """
    run([sys.executable, "-I", "-c", _EMIT, source / "vtpm/engine/_build.py", work / "_libtpms.c"])
    # No debug data and no path gets in: the name of the source is relative, and the build id follows from the content.
    run(
        [
            *("gcc", f"--sysroot={root}", "-O2", "-g0", "-fPIC", "-shared", "-fstack-protector-strong"),
            *("-D_FORTIFY_SOURCE=2", f"-ffile-prefix-map={work}=.", "-frandom-seed=vtpm"),
            *("-Wl,-s", "-Wl,--build-id=sha1", "-Wl,-z,relro", "-Wl,-z,now"),
            f"-I{root}/usr/include/python3.11",
            *("-o", FILE_NAME, "_libtpms.c", "-ltpms"),
        ],
        cwd=work,
    )
    return work / FILE_NAME


def built_with() -> tuple[str, ...]:
    """Return the names and versions of what is not pinned."""
    compiler = run(["gcc", "--version"]).decode().splitlines()[0]
    cffi = run([sys.executable, "-I", "-c", "import cffi; print(cffi.__version__)"]).decode().strip()
    return compiler, f"cffi {cffi}"
