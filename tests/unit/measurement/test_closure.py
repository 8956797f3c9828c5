"""The measurement of the services: all that counts changes it, and nothing else does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vtpm.errors import UnavailableError
from vtpm.measurement import closure
from vtpm.measurement.closure import MAX_DEPTH, Closure, find_closure, measurement_of

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders and an archive of an import path, and a library."""
    root = tmp_path / "software"
    monkeypatch.setattr(
        closure, "_libraries", lambda _, path, __: {"library/libx.so.1": path[0].parent / "lib" / "libx.so.1"}
    )
    for name, content in {
        "first/package/__init__.py": b"pass\n",
        "first/package/module.py": b"x = 1\n",
        "first/package/rules.toml": b"x = 1\n",
        "first/package/compiled.abi3.so": b"not really\n",
        "first/sourceless.pyc": b"not really\n",
        "first/package.libs/libbundled-1a2b.so.3": b"not really\n",
        "first/package.dist-info/entry_points.txt": b"[pydantic]\nx = y\n",
        "first/package/readme.txt": b"hello\n",
        "second/module.py": b"x = 1\n",
        "second/start.pth": b"/opt/elsewhere\nimport os\n",
        "second/__pycache__/module.cpython-311.pyc": b"whatever",
        "archive.zip": b"not really\n",
        "lib/libx.so.1": b"not really\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _find(root: Path, *path: str) -> Closure:
    return find_closure(None, [str(root / entry) for entry in path or ("archive.zip", "first", "second", "gone")])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_measurement_is_the_same_when_the_software_is_elsewhere(software: Path, tmp_path: Path) -> None:
    before = _find(software).measurement()
    assert _find(software).measurement() == before
    other = tmp_path / "at another place"
    shutil.copytree(software, other)
    assert _find(other).measurement() == before


@pytest.mark.parametrize(
    "name",
    [
        "first/package/__init__.py",
        "first/package/module.py",
        "first/package/rules.toml",
        "first/package/compiled.abi3.so",
        "first/sourceless.pyc",
        "first/package.libs/libbundled-1a2b.so.3",
        "first/package.dist-info/entry_points.txt",
        "second/module.py",
        "second/start.pth",
        "archive.zip",
        "lib/libx.so.1",
    ],
)
def test_measurement_is_another_when_one_bit_of_a_file_changed(software: Path, name: str) -> None:
    before = _find(software)
    measurement = before.measurement()
    _flip(software / name)
    after = _find(software)
    assert after.measurement() != measurement
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "first" / "uvloop.py").touch(),
        lambda root: (root / "first" / "more").mkdir() or (root / "first" / "more" / "m.py").touch(),
        lambda root: (root / "second" / "other.pth").write_text("import os\n"),
        lambda root: (root / "first" / "package" / "module.py").unlink(),
        lambda root: (root / "first" / "package" / "module.py").rename(root / "first" / "module.py"),
        lambda root: (root / "second" / "link").symlink_to(root / "first" / "package"),
    ],
    ids=["module added", "folder added", "start-up code added", "removed", "moved", "folder linked"],
)
def test_measurement_is_another_when_files_come_or_go(software: Path, change: Callable[[Path], object]) -> None:
    before = _find(software)
    measurement = before.measurement()
    change(software)
    after = _find(software)
    assert after.measurement() != measurement
    assert after.fingerprint != before.fingerprint


def test_measurement_is_another_when_the_import_path_has_another_order(software: Path) -> None:
    assert _find(software, "first", "second").measurement() != _find(software, "second", "first").measurement()


def test_measurement_is_another_when_startup_code_changed_behind_a_byte_order_mark(software: Path) -> None:
    start = software / "second" / "start.pth"
    start.write_bytes(b"\xef\xbb\xbfimport os\n")
    before = _find(software).measurement()
    start.write_bytes(b"\xef\xbb\xbfimport os; os.abort()\n")
    assert _find(software).measurement() != before


def test_both_libraries_are_measured_when_two_have_one_name(software: Path) -> None:
    found: dict[str, Path] = {}
    places = [software / "lib" / "libx.so.1", software / "first" / "libx.so.1"]
    places[1].write_text("other")
    linked = software / "second" / "libx.so.1"
    linked.symlink_to(places[0])
    closure._add(found, [places[0], linked, places[1]])
    assert list(found) == ["library/libx.so.1", "library/libx.so.1+"]
    assert [place.read_bytes() for place in found.values()] == [place.read_bytes() for place in places]


def test_loader_is_asked_for_transports_as_tpm2_tss_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    loaded = closure._loaded

    def listen(interpreter: Path, folder: Path, modules: Iterable[str]) -> list[Path]:
        asked.extend(modules := list(modules))
        return loaded(interpreter, folder, modules)

    monkeypatch.setattr(closure, "_loaded", listen)
    find_closure()
    # Not where the installed one is: one in /usr/local/lib, or a file named "device", is what would be loaded.
    assert {"device", "libtss2-tcti-device.so.0", "swtpm", "libtss2-tcti-swtpm.so.0"} <= set(asked)


def test_loader_is_asked_for_all_when_the_names_do_not_fit_one_variable(tmp_path: Path) -> None:
    interpreter = Path(os.path.realpath(sys.executable))
    many = [f"./{'x' * 200}{number}.so" for number in range(2000)]
    last = "libtss2-tcti-device.so.0"
    assert last not in {place.name for place in closure._loaded(interpreter, tmp_path, many)}
    assert last in {place.name for place in closure._loaded(interpreter, tmp_path, [*many, last])}


def test_closure_is_refused_when_vtpm_was_imported_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vtpm.elsewhere")
    module.__file__ = "/opt/elsewhere/vtpm/elsewhere.py"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(UnavailableError, match="is not on the import path"):
        find_closure()


def test_measurement_is_the_same_when_what_changed_is_not_executed(software: Path) -> None:
    before = _find(software).measurement()
    (software / "first" / "package" / "readme.txt").write_text("other")
    (software / "second" / "__pycache__" / "module.cpython-311.pyc").write_text("other")
    # A folder of the import path is measured itself; its place is not.
    (software / "second" / "start.pth").write_text("/srv/other\nimport os\n")
    os.utime(software / "first" / "package" / "module.py")
    assert _find(software).measurement() == before


def test_fingerprint_is_another_when_content_changed_and_times_were_put_back(software: Path) -> None:
    path = software / "first" / "package" / "module.py"
    before, status = _find(software), path.stat()
    _flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert _find(software).fingerprint != before.fingerprint


def test_closure_is_refused_when_links_make_its_folders_endless(software: Path) -> None:
    (software / "first" / "loop").symlink_to(software / "first")
    with pytest.raises(UnavailableError, match="no end"):
        _find(software)
    assert MAX_DEPTH >= 10


def test_closure_is_refused_when_a_file_cannot_be_read(software: Path) -> None:
    found = _find(software)
    (software / "first" / "sourceless.pyc").unlink()
    with pytest.raises(UnavailableError, match="sourceless"):
        found.measurement()


def test_files_are_read_again_when_the_kernel_says_that_they_changed(software: Path) -> None:
    contents = _find(software).contents({})
    known = {name: (seen, "00" * 32) for name, (seen, _) in contents.items()}
    assert _find(software).contents(known) == known
    _flip(software / "second" / "module.py")
    found = _find(software)
    again = found.contents(contents)
    assert [name for name in again if again[name] != contents[name]] == ["2/module.py"]
    assert measurement_of(again) == found.measurement()


def test_loader_is_asked_again_when_what_it_goes_by_changed(software: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _find(software)
    monkeypatch.setattr(closure, "_libraries", lambda *_: {})
    path = [str(software / entry) for entry in ("archive.zip", "first", "second", "gone")]
    assert find_closure((before.libraries, before.fingerprint), path) == before
    (software / "ld.so.preload").touch()
    monkeypatch.setattr(closure, "_RESOLUTION", (software / "ld.so.preload",))
    assert find_closure((before.libraries, before.fingerprint), path).libraries == {}


def test_closure_is_refused_when_the_loader_does_not_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closure, "_LIST_TIMEOUT_S", 0.0)
    with pytest.raises(UnavailableError, match="timed out"):
        find_closure()


def test_closure_of_this_interpreter_has_what_the_services_load() -> None:
    names = {name.partition("/")[2].partition(".so")[0] for name in find_closure().libraries}
    assert {"libc", "libcrypto", "libtpms", "libtss2-esys", "libtss2-tcti-device", "libsqlite3"} <= names


def test_printed_measurement_is_that_of_an_isolated_interpreter_when_run_as_a_program(tmp_path: Path) -> None:
    def printed(*options: str, **environment: str) -> str:
        return subprocess.run(
            [sys.executable, *options, "-m", "vtpm.measurement.closure"],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    (tmp_path / "added.py").touch()
    assert len(printed("-I")) == 65
    assert printed("-I", PYTHONPATH=str(tmp_path)) == printed("-I")
