"""What is said when libtpms or the extension is absent, and what the feature table makes of a version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vtpm
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import MemoryStore
from vtpm.engine.engine import Engine
from vtpm.engine.features import ABSENCE, Feature, LibraryFacts, lacking
from vtpm.tpm.types import TpmVersion

SONAME = b"libtpms.so.0\0"
START = """
from vtpm.engine.engine import Engine
from vtpm.errors import EngineError
from vtpm.tpm.types import TpmVersion
try:
    Engine(TpmVersion.V2_0, lambda kind, blob: None)
except EngineError as error:
    print(error)
"""


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the engine and what it imports, in a package that can be damaged."""
    source = Path(vtpm.__file__).parent
    target = tmp_path / "vtpm"
    target.mkdir()
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, target / name)
    for name in ("engine", "tpm"):
        shutil.copytree(source / name, target / name)
    return target


def _start(package: Path) -> str:
    outcome = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert outcome.stderr == ""
    return outcome.stdout


def _extension(package: Path) -> Path:
    (found,) = (package / "engine").glob("_libtpms*.so")
    return found


def test_error_names_library_cause_and_package_when_libtpms_is_absent(copied_package: Path) -> None:
    extension = _extension(copied_package)
    binary = extension.read_bytes()
    assert binary.count(SONAME) == 1
    # The dynamic linker now looks for a library that no machine has.
    extension.write_bytes(binary.replace(SONAME, b"libtpms.so.9\0"))
    message = _start(copied_package)
    assert "libtpms.so.9: cannot open shared object file" in message
    assert "libtpms0" in message


def test_error_says_what_to_install_when_the_extension_was_not_built(copied_package: Path) -> None:
    _extension(copied_package).unlink()
    message = _start(copied_package)
    assert "has not been built" in message
    assert "libtpms-dev" in message


def test_nothing_is_said_when_libtpms_is_there(copied_package: Path) -> None:
    assert _start(copied_package) == ""


def _facts(version: tuple[int, int, int], *, has_1_2: bool, is_later: bool) -> LibraryFacts:
    return LibraryFacts(version, has_1_2, True, is_later, is_later)


def test_table_has_one_line_for_every_feature() -> None:
    assert set(ABSENCE) == set(Feature)
    assert all(line and "\n" not in line for line in ABSENCE.values())


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            _facts((0, 9, 2), has_1_2=True, is_later=False),
            {Feature.CANCEL_1_2, Feature.SET_PROFILE, Feature.PROFILE_INFO, Feature.WAS_MANUFACTURED},
        ),
        (_facts((0, 10, 0), has_1_2=True, is_later=True), {Feature.CANCEL_1_2}),
        (_facts((0, 11, 0), has_1_2=False, is_later=True), {Feature.CANCEL_1_2, Feature.TPM_1_2}),
    ],
    ids=["0.9.2", "0.10.0", "0.11.0 without 1.2"],
)
def test_lacking_features_follow_when_facts_are_given(facts: LibraryFacts, expected: set[Feature]) -> None:
    assert set(lacking(facts)) == expected


def _installed() -> tuple[tuple[int, int, int], set[Feature]]:
    engine = Engine(TpmVersion.V2_0, MemoryStore())
    return engine.library_version, set(engine.lacks)


def test_installed_libtpms_is_described_alike_when_asked_twice() -> None:
    version, lacks = in_process(_installed)
    assert (version, lacks) == in_process(_installed)
    assert version >= (0, 9, 0)
    assert (Feature.SET_PROFILE in lacks) is (version < (0, 10, 0))
