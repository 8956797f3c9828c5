"""A confined process as the launcher holds it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vtpm.confine.spawn import SpawnedProcess
from vtpm.domains import process
from vtpm.domains.process import ConfinedProcess, ProcessDomain
from vtpm.errors import DomainError

SOURCE = Path(__file__).parents[3] / "src"


def test_no_descriptor_is_left_when_a_process_is_reaped_that_never_reported() -> None:
    before = len(os.listdir("/proc/self/fd"))
    report_read, report_write = os.pipe()
    child = subprocess.Popen(["sleep", "60"])
    confined = ConfinedProcess(SpawnedProcess(child.pid, os.pidfd_open(child.pid), 0, report_read))
    confined.kill()
    assert asyncio.run(confined.ended()) == "signal SIGKILL"
    child.returncode = -9
    os.close(report_write)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what instances import, which the process domain takes for it."""
    _, *others = process._import_paths()
    shutil.copytree(SOURCE / "vtpm", tmp_path / "vtpm", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(process, "_import_paths", lambda: (str(tmp_path), *others))
    return tmp_path


def _measured(domain: ProcessDomain) -> str:
    asyncio.run(domain.prepare())
    return domain.measurement


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("vtpm/instance/outbox.py", True),
        ("vtpm/errors.py", True),
        ("vtpm/confine/seccomp_vtpmd.toml", True),
        ("vtpm/engine/new.py", True),
        ("_cffi_backend.py", True),
        ("vtpm/manager/api.py", False),
        ("vtpm/instance/notes.txt", False),
    ],
)
def test_measurement_is_another_when_a_file_changes_that_an_instance_could_import(
    copied: Path, file: str, counts: bool
) -> None:
    domain = ProcessDomain()
    before = _measured(domain)
    with (copied / file).open("a") as changed:
        changed.write("#")
    assert (_measured(domain) != before) is counts
    # What is known from the last time does not hide it, nor does it make another measurement.
    assert domain.measurement == _measured(ProcessDomain())


@pytest.mark.usefixtures("copied")
def test_measurement_is_the_same_when_the_software_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = _measured(ProcessDomain())
    monkeypatch.undo()
    assert _measured(ProcessDomain()) == elsewhere


def test_measurement_covers_interpreter_standard_library_engine_and_what_the_loader_finds() -> None:
    domain = ProcessDomain()
    _measured(domain)
    for name in ("interpreter", "library/libc.so.6", "library/libtpms.so.0", "library/libcrypto.so.3", "1/socket.py"):
        assert name in domain._contents
    assert domain.engine_version > 0x000900
    assert "libtpms.so" in domain.label


@pytest.mark.usefixtures("copied")
def test_nothing_is_measured_when_the_loader_finds_no_libtpms(tmp_path: Path) -> None:
    domain = ProcessDomain()
    before = _measured(domain)
    (engine,) = (tmp_path / "vtpm" / "engine").glob("_libtpms*.so")
    engine.write_bytes(b"")
    with pytest.raises(DomainError, match="no libtpms"):
        _measured(domain)
    assert domain.measurement == before
