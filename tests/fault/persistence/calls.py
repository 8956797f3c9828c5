"""The system calls by which programs of a host make something last, as strace shows them.

strace holds each call for a moment before it is carried out and says so at once; whoever listens may kill the process
meanwhile, and the call never happens. So calls are counted over all threads of a program, which strace's own counters
(one for each thread) cannot do.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.support.host import kill_process

LIMIT_S = 30.0
CHANGING = (
    "write", "writev", "pwrite64", "pwritev", "pwritev2", "truncate", "ftruncate", "fallocate", "copy_file_range",
    "sendfile", "splice", "fsync", "fdatasync", "sync_file_range", "syncfs", "sync", "msync", "rename", "renameat",
    "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir",
)  # fmt: skip
"""All calls that change a file's content or a name, or make either last. Files are made by open, too: what a kill just
after that leaves is seen by the kill before the first write."""
TPM = "platform TPM"
# Spec: TPM 2.0 Part 2 (revision 1.59), 6.5.2: what a TPM keeps, as far as the keeper sends it.
_NV_COMMANDS = {
    0x120: "TPM2_EvictControl",
    0x122: "TPM2_NV_UndefineSpace",
    0x12A: "TPM2_NV_DefineSpace",
    0x134: "TPM2_NV_Increment",
    0x135: "TPM2_NV_SetBits",
    0x136: "TPM2_NV_Extend",
    0x137: "TPM2_NV_Write",
    0x138: "TPM2_NV_WriteLock",
    0x182: "TPM2_PCR_Extend",
}
_BEGIN = re.compile(r"^(?P<thread>\d+)<(?P<comm>[^>]*)> +(?P<name>\w+)\((?P<rest>.*)$")
_OF_DESCRIPTOR = re.compile(r"^\d+<(?P<path>[^>]*)>(?:, \"(?P<data>(?:[^\"\\]|\\.)*)\")?")
_OF_PATH = re.compile(r'^(?:AT_FDCWD(?:<[^>]*>)?, )?"(?P<path>[^"]*)"')
_END = re.compile(r"^(?P<thread>\d+)<[^>]*> .*\) += -?\d")
_ATTACHED = re.compile(rb"Process \d+ attached")
_PROGRAMS = {"vtpm-managerd": "manager", "vtpm-keeper": "keeper", "vtpm-embedded-t": "embedded TPM"}
# Neither state nor lasting: what says who runs, what is told to a reader, an index and a view that are made anew at
# each opening.
_NO_STATE = re.compile(r"\.(log|lock)$|^log(/|$)|-shm$|vtpm\.db\.check")


@dataclass(frozen=True, order=True)
class Step:
    """One kind of call: which program does what to which file (relative to the state directory)."""

    program: str
    call: str
    file: str

    def __str__(self) -> str:
        return f"{self.program}: {self.call} {self.file}"


def step_of(line: str, state_dir: Path) -> tuple[int, Step] | None:
    """The thread and the step that a line of strace tells of; None when it is about nothing that lasts."""
    begin = _BEGIN.match(line)
    if begin is None:
        return None
    program = _PROGRAMS.get(begin["comm"], begin["comm"])
    thread, rest = int(begin["thread"]), begin["rest"]
    found = _OF_DESCRIPTOR.match(rest) or _OF_PATH.match(rest)
    if found is None:
        return None
    if found["path"].startswith("socket:"):
        command = _nv_command(found.groupdict().get("data") or "")
        return (thread, Step(program, command, TPM)) if program == "keeper" and command else None
    path = Path(found["path"].removesuffix(" (deleted)"))
    if path != state_dir and state_dir not in path.parents:
        return None
    file = str(path.relative_to(state_dir))
    if _NO_STATE.search(file):
        return None
    # The draft of a database, with SQLite's side files.
    file = re.sub(r"vtpm\.db\.new.*", "vtpm.db.new*", file)
    return thread, Step(program, begin["name"], file)


def _nv_command(data: str) -> str | None:
    raw = codecs.decode(data, "unicode_escape").encode("latin-1")
    if len(raw) < 10 or raw[:2] not in (b"\x80\x01", b"\x80\x02"):
        return None
    return _NV_COMMANDS.get(int.from_bytes(raw[6:10], "big"))


class Watcher(Protocol):
    """Whoever is told, in a thread of its own."""

    def begins(self, thread: int, step: Step) -> None:
        """Hear that a thread is about to take a step."""
        ...

    def ends(self, thread: int) -> None:
        """Hear that the call of a thread came to its end; not when it was killed before."""
        ...


class Trace:
    """strace on one process and all that it starts. A context manager, which lets go of those that still live.

    Args:
        folder: takes a named pipe.
        state_dir: whose files count.
        calls: names of system calls.
        paths: only calls about these; about anything when there are none.
        hold_s: how long each call is held before it is carried out.
        watcher: told of each step.
    """

    def __init__(
        self, folder: Path, state_dir: Path, watcher: Watcher, *,
        calls: Sequence[str] = CHANGING, paths: Sequence[Path] = (), hold_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._pipe = folder / "trace"
        self._state_dir = state_dir
        self._watcher = watcher
        self._options = ["-f", "-y", "-Y", "-s", "16", "-e", "signal=none", "-o", str(self._pipe)]
        self._options += ["-e", f"trace={','.join(calls)}", *(word for path in paths for word in ("-P", str(path)))]
        if hold_s:
            self._options += ["-e", f"inject={','.join(calls)}:delay_enter={int(hold_s * 1e6)}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = threading.Thread(target=self._read, name="trace", daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> Trace:
        os.mkfifo(self._pipe, 0o600)
        return self

    def attach(self, pid: int) -> None:
        """Trace from here on."""
        self._process = subprocess.Popen(
            ["strace", *self._options, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._reader.start()
        said = b""
        assert self._process.stderr is not None
        while not _ATTACHED.search(said):
            part = os.read(self._process.stderr.fileno(), 4096)
            assert part, f"strace does not attach: {said!r}"
            said += part

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process.terminate()
            self._process.wait(LIMIT_S)
            self._reader.join(LIMIT_S)
            assert not self._reader.is_alive()
        self._pipe.unlink()
        if self.error is not None:
            raise self.error

    def _read(self) -> None:
        try:
            with self._pipe.open("rb", buffering=0) as pipe:
                self._follow(pipe)
        except BaseException as error:  # noqa: BLE001 - raised where the trace ends
            self.error = error

    def _follow(self, pipe: io.FileIO) -> None:
        """Tell of each call as soon as it begins; a line ends only when its call does."""
        line, told = "", False
        while data := pipe.read(65536):
            for part in data.decode(errors="replace").splitlines(keepends=True):
                line += part
                if not told and (found := step_of(line, self._state_dir)) is not None:
                    told = True
                    self._watcher.begins(*found)
                if line.endswith("\n"):
                    if (end := _END.match(line)) is not None:
                        self._watcher.ends(int(end["thread"]))
                    line, told = "", False


class Killer:
    """Kills a program when it is about to take a step for the n-th time.

    Args:
        grace_s: how long it lives on with that call held: an answer that was given too early arrives meanwhile.
    """

    def __init__(self, step: Step, number: int, grace_s: float) -> None:
        self.step = step
        self.killing = threading.Event()
        """Set just before the kill."""
        self.late = False
        """Whether the call was carried out all the same, before the kill."""
        self._left = number
        self._grace_s = grace_s
        self._victim: int | None = None

    def begins(self, thread: int, step: Step) -> None:
        """See Watcher."""
        if step != self.step:
            return
        self._left -= 1
        if self._left == 0:
            self._victim = thread
            process = _process_of(thread)
            time.sleep(self._grace_s)
            self.killing.set()
            kill_process(process)

    def ends(self, thread: int) -> None:
        """See Watcher."""
        self.late = self.late or thread == self._victim


class Counted:
    """Counts steps, in the order of their first time."""

    def __init__(self) -> None:
        self.steps: Counter[Step] = Counter()

    def begins(self, _: int, step: Step) -> None:
        """See Watcher."""
        self.steps[step] += 1

    def ends(self, thread: int) -> None:
        """See Watcher."""


def _process_of(thread: int) -> int:
    status = Path(f"/proc/{thread}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Tgid:")).split()[1])
