"""Removes one check at a time from a copy of the program and runs the tests that protect it.

A mutant is data, in the TOML files beside this: `name`, the `check` that it takes away, the `tests` that must then
fail, and `edits`, each a `file` under src/vtpm, the `old` text, which stands there once, and the `new` text. The copy
has a virtual environment of its own, so that services which tests start, isolated from PYTHONPATH, run the copy too.
For test_mutants alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent
RUN_LIMIT_S = 600
TEST_LIMIT_S = 90
_ENGINE = "vtpm.engine._libtpms"
_SCRIPT = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


@dataclass(frozen=True)
class Edit:
    """One place of the program and what stands there instead; `file` is under src/vtpm."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """Return the file's text with the edit. Raises ValueError: the old text does not stand there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times: {self.old!r}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutant:
    """The program without one check.

    Args:
        check: what is removed, for people.
        tests: ids of tests, each of which must fail; without a parameter, under one of its parameters at least.
    """

    name: str
    check: str
    tests: tuple[str, ...]
    edits: tuple[Edit, ...]

    def texts(self, package: Path) -> dict[Path, str]:
        """Return the changed files of a package folder. Raises ValueError as Edit.apply."""
        changed: dict[Path, str] = {}
        for edit in self.edits:
            path = package / edit.file
            changed[path] = edit.apply(changed.get(path) or path.read_text())
        return changed


def load_mutants() -> tuple[Mutant, ...]:
    """Return all mutants."""
    return tuple(
        Mutant(one["name"], one["check"], tuple(one["tests"]), tuple(Edit(**edit) for edit in one["edits"]))
        for path in sorted(FOLDER.glob("*.toml"))
        for one in tomllib.loads(path.read_text())["mutant"]
    )


@dataclass(frozen=True)
class Outcome:
    """Of one run of pytest.

    Args:
        passed: ids of tests, with their parameters.
        failed: why, by id.
        broken: those that could not be run: their fixtures or modules failed.
    """

    passed: frozenset[str]
    failed: Mapping[str, str]
    broken: frozenset[str]
    output: str

    def failure(self, test: str) -> str | None:
        """Why a test failed, under one of its parameters at least; None when it did not."""
        return next((why for one, why in self.failed.items() if one == test or one.startswith(f"{test}[")), None)


class Copy:
    """A copy of this checkout's program and tests, with an environment in which both are what is imported and run.

    Args:
        folder: empty; other users must be able to pass, for services give up root's rights.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._package = folder / "src" / "vtpm"
        self._python = folder / "venv" / "bin" / "python"
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src" / "vtpm", self._package, ignore=leave_out)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=leave_out)
        shutil.copy(ROOT / "pyproject.toml", folder)
        engine = importlib.util.find_spec(_ENGINE)
        assert engine is not None and engine.origin is not None
        shutil.copy(engine.origin, self._package / "engine")
        self._make_environment()

    def run(self, tests: Iterable[str], mutant: Mutant | None = None) -> Outcome:
        """Run tests, on the mutant if there is one; the copy is as before when this returns."""
        changed = {} if mutant is None else mutant.texts(self._package)
        originals = {path: path.read_text() for path in changed}
        try:
            self._write(changed)
            return self._pytest(tests)
        finally:
            self._write(originals)

    def _write(self, texts: dict[Path, str]) -> None:
        for path, text in texts.items():
            path.write_text(text)
            # Python tells by time and size whether compiled code is stale: a mutant may have both of its original.
            for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                stale.unlink()

    def _pytest(self, tests: Iterable[str]) -> Outcome:
        report = self._folder / "report.xml"
        report.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
        arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--timeout={TEST_LIMIT_S}", f"--junitxml={report}"]
        done = subprocess.run(
            [self._python, "-m", "pytest", *arguments, *tests],
            cwd=self._folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_LIMIT_S,
        )
        if not report.exists():
            raise AssertionError(f"pytest ended with {done.returncode} and no report:\n{done.stdout}")
        return _outcome(report, done.stdout)

    def _make_environment(self) -> None:
        venv = self._folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
        scheme = sysconfig.get_path("purelib", "venv", {"base": str(venv)})
        # The copy first: this environment's packages may hold the program itself.
        Path(scheme, "copy.pth").write_text(f"{self._package.parent}\n{sysconfig.get_path('purelib')}\n")
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        for name, target in scripts.items():
            module, function = target.split(":")
            path = venv / "bin" / name
            path.write_text(_SCRIPT.format(python=self._python, module=module, function=function))
            path.chmod(0o755)


def _outcome(report: Path, output: str) -> Outcome:
    passed, failed, broken = set(), {}, set()
    for case in ET.parse(report).getroot().iter("testcase"):
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        if (failure := case.find("failure")) is not None:
            failed[test] = failure.get("message", "").splitlines()[0]
        elif case.find("error") is not None:
            broken.add(test)
        else:
            passed.add(test)
    return Outcome(frozenset(passed), failed, frozenset(broken), output)
