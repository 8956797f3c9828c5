"""Run by the pinned interpreter, not by vtpm's own: says what imports load, and compiles modules. Imported by nothing.

    inside.py trace PATHS MODULES LEFT_OUT    each joined by colons; JSON on stdout: each loaded module's file
    inside.py compile < JSON                  [[source, compiled, name in tracebacks], ...]

Nothing is imported before the trace that the trace would then show: only what every interpreter has at its start.
"""

from __future__ import annotations

import sys


def trace(paths: list[str], modules: list[str], left_out: list[str]) -> None:
    """Import modules; print every loaded module's file, None for what is part of the interpreter."""
    sys.path += paths
    # The mark that makes importing them fail.
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]
    for name in modules:
        __import__(name)
    found = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        frozen = spec is None or spec.origin in ("frozen", "built-in")
        if name != "__main__" and module is not None:
            found[name] = None if frozen else getattr(module, "__file__", None)
    engine = sys.modules["vtpm.engine._libtpms"].lib.TPMLIB_GetVersion()
    import json

    print(json.dumps({"modules": found, "engine_version": engine}))  # noqa: T201


def compile_all(jobs: list[tuple[str, str, str]]) -> None:
    """Compile sources into files that are never compared with them: they are not there."""
    import py_compile

    for source, compiled, shown in jobs:
        py_compile.compile(
            source, compiled, shown, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


if __name__ == "__main__":
    if sys.argv[1] == "trace":
        trace(*(argument.split(":") for argument in sys.argv[2:]))
    else:
        import json

        compile_all(json.load(sys.stdin))
