"""A disk that is full or fails under vTPMs that write: nothing is acknowledged, and only who writes too long notices.

Real services on a real file system: an ext4 of 16 MiB holds what is to fail, or strace makes the manager's calls fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fault.powerloss.checker import make_file_system
from tests.fault.writer import TpmGone, Writer, closing, data_socket
from tests.support.host import Host
from vtpm.client.manager_client import ManagerClient
from vtpm.config import MANAGER_UID_OFFSET, load_config
from vtpm.errors import StoreError, VtpmError
from vtpm.wire.api import LifeState

IMAGE_BYTES = 16 << 20
STALL_S = 0.3
REFILL_S = 0.002
PATIENCE_S = 1.5
"""As SPECIFICATION.md promises."""
LIMIT_S = 30.0
WRITER, READER = "writes", "reads"


class FullDisk:
    """A file system that somebody fills, again and again: a store in need empties its own log."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"
        self._ended = threading.Event()
        self._filling = threading.Thread(target=self._fill, name="filler", daemon=True)

    def begin(self) -> None:
        self._filling.start()

    def end(self) -> None:
        self._ended.set()
        if self._filling.is_alive():
            self._filling.join(LIMIT_S)
        self._filler.unlink(missing_ok=True)

    def _fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            while not self._ended.wait(REFILL_S):
                for size in (1 << 16, 1024, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass


class FailingCalls:
    """Calls of one process on one file fail with EIO, by strace."""

    def __init__(self, pid: int, calls: str, path: Path) -> None:
        self._command = ["strace", "-f", "-o", os.devnull, "-P", str(path), "-e", f"inject={calls}:error=EIO"]
        self._command += ["-p", str(pid)]
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        assert b"attached" in self._process.stderr.readline()

    def end(self) -> None:
        if self._process is not None:
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process.terminate()
            self._process.wait(LIMIT_S)
            self._process = None


Trouble = FullDisk | FailingCalls


@dataclass(frozen=True)
class Scene:
    """A host whose store is about to have trouble; one of its two vTPMs is written to, the other only read."""

    host: Host
    client: ManagerClient
    writer: Writer
    reader: Writer
    trouble: Trouble

    def await_stall(self) -> None:
        """Wait until a write has been without an answer for some time."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            before = self.writer.answered
            time.sleep(STALL_S)
            if self.writer.answered == before:
                break
            assert time.monotonic() < deadline, "the trouble troubles nobody"
        assert self.writer.error is None, self.writer.error

    def read(self) -> None:
        """The other vTPM answers at once, and nobody thinks that it failed."""
        for _ in range(10):
            began = time.monotonic()
            self.reader.read_undisturbed()
            assert time.monotonic() - began < STALL_S


@contextlib.contextmanager
def small_file_system(folder: Path, inside: str) -> Iterator[Path]:
    """Mount an ext4 in this folder of a host; gone at the end, with whoever uses it."""
    with tempfile.TemporaryDirectory(prefix="vtpm-disk-") as images:
        image, place = Path(images, "disk"), folder / inside
        make_file_system(image, IMAGE_BYTES)
        place.mkdir(parents=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True, timeout=LIMIT_S)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True, timeout=LIMIT_S)


@pytest.fixture(params=["full vault", "full state", "failing flushes", "failing writes"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        host = Host()
        stack.callback(host.end)
        trouble: Trouble
        match request.param:
            case "full vault":
                place = stack.enter_context(small_file_system(host.folder, "state/vault"))
                trouble = FullDisk(place)
                place.chmod(0o700)
                uid = load_config(host.config, {}).uid_base + MANAGER_UID_OFFSET
                os.chown(place, uid, uid)
            case "full state":
                trouble = FullDisk(stack.enter_context(small_file_system(host.folder, "state")))
        # Ended before its file system goes, and its folder removed after that.
        stack.callback(host.end)
        host.start()
        if request.param.startswith("failing"):
            calls = "fsync,fdatasync" if request.param == "failing flushes" else "pwrite64"
            pid = host.pid("manager")
            assert pid is not None
            trouble = FailingCalls(pid, calls, host.state_dir / "vault" / "vtpm.db-wal")
        client = stack.enter_context(host.client())
        writers = []
        for name in (WRITER, READER):
            client.create(name)
            writers.append(Writer(data_socket(client.start(name).tcti)))
        stack.enter_context(closing(writers))
        stack.callback(trouble.end)
        yield Scene(host, client, *writers, trouble)


def test_a_guest_does_not_notice_when_the_store_recovers_within_the_wait(scene: Scene) -> None:
    scene.writer.start()
    scene.writer.await_writes(3)
    scene.trouble.begin()
    scene.await_stall()
    scene.read()
    scene.trouble.end()
    scene.writer.await_writes(3)
    assert scene.writer.stop(), f"a write failed: {scene.writer.error}"
    assert STALL_S <= scene.writer.longest_s < PATIENCE_S + STALL_S
    scene.writer.check()
    assert {vtpm.state for vtpm in scene.client.list()} == {LifeState.RUNNING}


def test_that_tpm_alone_fails_until_it_is_started_anew_when_the_store_does_not_recover(scene: Scene) -> None:
    scene.writer.start()
    scene.writer.await_writes(3)
    scene.trouble.begin()
    scene.writer.await_writes(1 << 30)
    assert not scene.writer.stop()
    assert scene.writer.longest_s < PATIENCE_S, "a write was acknowledged after the wait"
    scene.read()
    assert re.search("full|No space|I/O error|Input/output error", _why(scene.client))
    scene.trouble.end()
    # Well again is the store, and not the TPM.
    with pytest.raises(TpmGone, match="0x101"):
        scene.writer.reconnect()
    scene.read()
    assert [scene.client.show(name).state for name in (WRITER, READER)] == [LifeState.FAILED, LifeState.RUNNING]
    _start(scene.client)
    scene.writer.reconnect()
    scene.writer.check()
    scene.writer.start()
    scene.writer.await_writes(3)
    assert scene.writer.stop()
    scene.writer.check()


def _why(client: ManagerClient) -> str:
    """What `vtpm show` says of the vTPM that failed; a store that cannot even be opened again is named itself."""
    deadline = time.monotonic() + LIMIT_S
    try:
        # The guest may hear of it before the manager does.
        while (shown := client.show(WRITER)).state is not LifeState.FAILED:
            assert time.monotonic() < deadline
    except StoreError as error:
        return str(error)
    return shown.reason


def _start(client: ManagerClient) -> None:
    """Start the vTPM that failed; the keeper may need a moment to find its platform TPM again."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            client.start(WRITER)
            return
        except VtpmError:
            if time.monotonic() > deadline:
                raise
            time.sleep(STALL_S)
