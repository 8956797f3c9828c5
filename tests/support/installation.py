"""A second installation of vtpm, whose files a test may change: a virtual environment over a copy of the source."""

from __future__ import annotations

import importlib.util
import marshal
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
_SCRIPT = "#!{python}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"


class Installation:
    """See the module.

    Args:
        folder: an existing one that services of other users may pass to; gets venv/ and src/.
    """

    def __init__(self, folder: Path) -> None:
        self.source = folder / "src"
        self.programs = folder / "venv" / "bin"
        self.python = self.programs / "python"
        subprocess.run(
            [sys._base_executable, "-m", "venv", "--without-pip", folder / "venv"],  # type: ignore[attr-defined]
            check=True,
            timeout=60,
        )
        shutil.copytree(SOURCE, self.source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        # The dependencies stay where they are; start-up code of that folder is not run.
        spec = importlib.util.find_spec("tpm2_pytss")
        assert spec is not None
        assert spec.origin is not None
        (site / "copy.pth").write_text(f"{self.source}\n{Path(spec.origin).parents[1]}\n")
        for name, module in {"vtpm-managerd": "vtpm.starter.main", "vtpm": "vtpm.cli.main"}.items():
            script = self.programs / name
            script.write_text(_SCRIPT.format(python=self.python, module=module))
            script.chmod(0o755)

    def module(self, name: str) -> Path:
        """Return a module's source, such as of "vtpm.manager.lifecycle"."""
        return self.source / f"{name.replace('.', '/')}.py"

    def change(self, name: str, line: str = "# another version\n") -> None:
        """Add a line to a module, as a new version has."""
        with self.module(name).open("a") as file:
            file.write(line)

    def measurement(self) -> str:
        """Return the measurement of its services."""
        done = subprocess.run(
            [self.python, "-I", "-m", "vtpm.measurement.closure"],
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    def plant(self, name: str, code: str) -> None:
        """Put a compiled file beside a module that the interpreter takes for the module's own, and is not."""
        source = self.module(name)
        status = source.stat()
        compiled = Path(importlib.util.cache_from_source(str(source)))
        compiled.parent.mkdir(exist_ok=True)
        body = compile(f"{source.read_text()}\n{code}\n", str(source), "exec")
        header = b"".join(word.to_bytes(4, "little") for word in (0, int(status.st_mtime), status.st_size))
        compiled.write_bytes(importlib.util.MAGIC_NUMBER + header + marshal.dumps(body))
