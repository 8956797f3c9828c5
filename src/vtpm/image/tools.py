"""Runs programs for the builder: of this machine, and of the pinned packages; each with an environment of its own.

Nothing of the caller's environment gets to them but PATH, and proxies to apt: locale, time zone and hash seed are the
same for everybody.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtpm.errors import ImageError, StoreError, UnavailableError

_TIMEOUT_S = 300
_LOADER = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
# The last is swtpm's own, where its programs say to look.
LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/swtpm")


class ToolError(ImageError):
    """A program failed; `stderr` has its words."""

    def __init__(self, message: str, stderr: str) -> None:
        super().__init__(message)
        self.stderr = stderr


def run(
    words: Sequence[str | Path],
    *,
    stdin: bytes = b"",
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program, return what it wrote to stdout.

    Args:
        words: program and arguments.
        stdin: what it reads.
        cwd: where it runs.
        variables: more of its environment.
    Raises:
        UnavailableError: it is not installed, or takes longer than five minutes.
        StoreError: the disk is full.
        ToolError: it failed.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC", **(variables or {})}
    name = Path(words[0]).name
    try:
        done = subprocess.run(
            words, input=stdin, cwd=cwd, env=environment, capture_output=True, timeout=_TIMEOUT_S, umask=0o022
        )
    except FileNotFoundError as error:
        raise UnavailableError(
            f"the program {name} is not installed",
            next_step="Images are built on Debian 12 with the packages apt, dpkg, gcc and binutils",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{name} did not end within {_TIMEOUT_S} s, and was ended") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        if os.strerror(errno.ENOSPC) in said or "enough free space" in said:
            raise StoreError(f"{name} failed: there is no space left on the disk")
        raise ToolError(f"{name} failed: {said[-2000:] or f'status {done.returncode}'}", said)
    return done.stdout


@dataclass(frozen=True)
class PinnedTools:
    """Programs of unpacked packages, run with the loader and libraries of those packages; `root` has their files."""

    root: Path

    def run(
        self, program: str, *arguments: str | Path, stdin: bytes = b"", variables: Mapping[str, str] | None = None
    ) -> bytes:
        """Run a program of the packages, as usr/bin/python3.11; see `run`."""
        libraries = ":".join(str(self.root / folder) for folder in LIBRARY_FOLDERS)
        loader = self.root / _LOADER
        words = (loader, "--inhibit-cache", "--library-path", libraries, self.root / program, *arguments)
        return run(words, stdin=stdin, variables=variables)

    def python(self, *arguments: str | Path, stdin: bytes = b"") -> bytes:
        """Run the pinned interpreter, with a fixed hash seed; it sees the pinned standard library alone."""
        return self.run(
            "usr/bin/python3.11",
            *("-s", "-S", "-B", "-P"),
            *arguments,
            stdin=stdin,
            variables={"PYTHONHOME": str(self.root / "usr"), "PYTHONHASHSEED": "0"},
        )
