"""Archives of initramfs files, read by cpio itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vtpm.image.cpio import File, archive

FILES = {"/usr/bin/x": File(b"program", executable=True), "/etc/a": File(b""), "/init": File(b"#!/usr/bin/x\n")}


def _listing(data: bytes) -> list[list[str]]:
    done = subprocess.run(["cpio", "-itvn", "--quiet"], input=data, capture_output=True, timeout=20, check=True)
    return [line.split() for line in done.stdout.decode().splitlines()]


def test_archive_is_the_same_when_files_come_in_another_order() -> None:
    assert archive(FILES) == archive(dict(reversed(FILES.items())))


def test_entries_are_roots_without_times_and_parents_first_when_cpio_lists_them() -> None:
    lines = _listing(archive(FILES, ("/proc",)))
    assert [line[-1] for line in lines] == [
        *("dev", "dev/console", "etc", "etc/a", "init", "proc", "usr", "usr/bin", "usr/bin/x")
    ]
    assert all(line[2:4] == ["0", "0"] and "1970" in line for line in lines)
    modes = {line[-1]: line[0] for line in lines}
    assert modes["usr/bin/x"] == "-rwxr-xr-x"
    assert modes["init"] == "-rw-r--r--"
    assert modes["proc"] == "drwxr-xr-x"
    assert modes["dev/console"] == "crw-------"


def test_content_is_what_went_in_when_cpio_unpacks_it(tmp_path: Path) -> None:
    data = archive(FILES, console=False)
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, timeout=20, check=True)
    assert {f"/{path.relative_to(tmp_path)}": path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == {
        path: file.content for path, file in FILES.items()
    }
