"""What an entry imports, found by reading; and kernel modules in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtpm.errors import ImageError, UsageError
from vtpm.image.closure import imported, kernel_modules


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files = {
        "__init__.py": "",
        "a.py": "import os.path\nfrom vtpm import b\nif TYPE_CHECKING:\n    import vtpm.unused\n",
        "b.py": "def lazy():\n    try:\n        import json\n    finally:\n        from vtpm.c.d import X\n",
        "c/__init__.py": "import struct",
        "c/d.py": "from vtpm.a import Y",
        "unused.py": "import socket",
        "relative.py": "from . import a",
        "broken.py": "def",
    }
    for name, text in files.items():
        path = tmp_path / "vtpm" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_closure_has_packages_and_late_imports_and_nothing_of_type_checkers_when_read(source: Path) -> None:
    own = {"vtpm", "vtpm.a", "vtpm.b", "vtpm.c", "vtpm.c.d"}
    assert imported(source, "vtpm.a") == own | {"os.path", "json", "struct"}


def test_entry_is_named_when_there_is_no_such_module(source: Path) -> None:
    with pytest.raises(UsageError, match=r"no module vtpm\.none"):
        imported(source, "vtpm.none")


@pytest.mark.parametrize("entry", ["vtpm.relative", "vtpm.broken"])
def test_module_is_refused_when_its_imports_cannot_be_told(source: Path, entry: str) -> None:
    with pytest.raises(ImageError, match=entry.rpartition(".")[2]):
        imported(source, entry)


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    for name, depends in (("virtio.ko", "ring"), ("ring.ko", ""), ("virtio-rng.ko", "virtio,ring")):
        (tmp_path / name).write_bytes(b"\0license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/char/hw_random/rng-core.ko\n")
    return tmp_path


def test_modules_come_after_what_they_depend_on_when_ordered(modules: Path) -> None:
    found = kernel_modules(modules, ["virtio_rng", "rng_core", "virtio"])
    assert [path.name for path in found] == ["ring.ko", "virtio.ko", "virtio-rng.ko"]


def test_module_is_named_when_the_kernel_has_none(modules: Path) -> None:
    with pytest.raises(ImageError, match="no module virtio_net"):
        kernel_modules(modules, ["virtio_net"])
